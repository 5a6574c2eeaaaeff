"""Rows that are made here are what transformers' Qwen2-VL takes: the same positions in time, row and column, the same
logits of the same pictures; and answers are those of the whole model.

Legend: T tokens, M patches.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from model.families import qwen2_vl
from model.place import Place
from model.vision.images import Images, normalized
from model.weights import bind
from tests.peers.vision_case import CASES, Case, arrays, opened
from train.config import DataConfig
from train.data.chat import packing
from train.data.chat.record import IMAGE, Conversation, Turn
from train.data.chat.template import Tokens, rope_positions
from train.data.text.tokenizer import ByteTokenizer
from train.evaluate import answers

DATA = DataConfig(context=40, image_fit="native", patches=48)


class Few(ByteTokenizer):
    """A few letters, for models of a few tokens."""

    vocab_size, end_of_document, beginning = 40, 0, 0

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % 40 for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(120 + (token if token != 39 else -1)) for token in ids)


@pytest.fixture(scope="module")
def case(one_device) -> Case:
    with jax.set_mesh(one_device):
        return opened(CASES / "qwen2_vl_0", one_device)


@pytest.mark.parametrize("name", ["qwen2_vl_0", "qwen2_vl_2"])
def test_positions_are_those_that_are_recorded(name):
    """Those of get_rope_index, of texts with images."""
    path: Path = CASES / name
    inputs, wanted = arrays(path, "inputs"), arrays(path, "outputs")["position_ids"]
    grids = iter((inputs["image_grid_thw"][:, 1:] // 2).tolist())
    types, found = inputs["mm_token_type_ids"], []
    for row, (kinds, mask) in enumerate(zip(types, inputs.get("attention_mask", np.ones_like(types)), strict=True)):
        kinds = kinds[mask > 0]
        slots = np.where(kinds == 1, np.cumsum(kinds == 1) - 1, -1).tolist()
        starts = np.flatnonzero(np.diff([0, *kinds]) == 1)
        shown = [tuple(next(grids)) for _ in starts]
        turned = rope_positions(Tokens(slots, slots, [], []), shown)
        np.testing.assert_array_equal(turned.T, wanted[:, row][:, mask > 0])
        found += shown
    assert len(found) == len(inputs["image_grid_thw"]) > 1
    assert next(grids, None) is None


def conversation(*sides: tuple[int, int]) -> Conversation:
    rng = np.random.default_rng(0)
    images = tuple(rng.integers(0, 256, (*side, 3), dtype=np.uint8) for side in sides)
    turns = (Turn("user", f"a{IMAGE}" * len(images) + "what"), Turn("assistant", "yes"))
    return Conversation("0", turns, images)


def as_there(config: Any, record: Conversation, tokens: np.ndarray, slots: np.ndarray) -> dict[str, np.ndarray]:
    """The inputs of transformers for the images of a record, whose sides are multiples of 8, and a row's tokens."""
    patches, grids = [], []
    for image in record.images:
        h, w = (side // 4 for side in image.shape[:2])
        pixels = np.asarray(normalized(jax.numpy.asarray(image), config.vision.normalization))
        # [h / 2, 2, 4, w / 2, 2, 4, C] -> [h / 2, w / 2, 2, 2, C, 1, 4, 4], a still image being both frames.
        cut = pixels.reshape(h // 2, 2, 4, w // 2, 2, 4, 3).transpose(0, 3, 1, 4, 6, 2, 5)[..., None, :, :]
        patches.append(np.repeat(cut, 2, axis=-3).reshape(h * w, -1))
        grids.append((1, h, w))
    ids = np.where(slots >= 0, config.vision.image_token, tokens)
    return {
        "input_ids": ids[None],
        "pixel_values": np.concatenate(patches).astype(np.float32),
        "image_grid_thw": np.array(grids),
    }


@functools.cache
def compiled(case: Case) -> Callable[[Any, Any], jax.Array]:
    graphdef = answers.build(case.model)[0]

    def compute(weights: Any, batch: Any) -> jax.Array:
        by_token = batch["image_slots"], batch["images_seen"], batch["given"]
        images = Images(batch["images"], batch["image_segments"], *by_token, batch.get("image_positions"))
        model, place = bind(graphdef, weights), Place(batch["segments"], batch["positions"])
        return model.head(model(batch["tokens"], place, positions=batch.get("rope_positions"), images=images)[0])

    return jax.jit(compute)


def logits(case: Case, row: Any) -> np.ndarray:
    """[T, V] of one row."""
    return np.asarray(compiled(case)(case.weights, jax.tree.map(lambda a: a[None], row)))[0]


def test_a_row_gives_the_logits_of_its_text_and_pictures_there(case):
    record = conversation((8, 24), (16, 8))
    row = packing.joined([packing.part(record, Few(), DATA, case.model, Counter())], DATA, case.model)
    there = row["segments"] > 0
    given = as_there(case.model, record, row["tokens"][there], row["image_slots"][there])
    wanted = qwen2_vl.run(case.model, case.weights, given, 0, case.opened.generation)
    np.testing.assert_array_equal(row["rope_positions"][there].T, wanted["position_ids"][:, 0])
    found = logits(case, row)[there]
    np.testing.assert_allclose(found, wanted["logits"][0], rtol=0, atol=2e-5 * np.abs(wanted["logits"]).max())


def test_answers_are_those_of_the_whole_model(case, one_device):
    """Greedily through the cache, behind images that put the text's turning out of step with its length."""
    asked = [conversation((8, 24), (16, 8)), conversation((24, 8))]
    with jax.set_mesh(one_device):
        said = answers.replier(case.model, case.weights, Few(), DATA, 4, rows=2)(asked)
    for record, reply in zip(asked, said, strict=True):
        text = ""
        for _ in range(4):
            turns = (record.turns[0], Turn("assistant", text + "?"))
            part = packing.part(record._replace(turns=turns), Few(), DATA, case.model, Counter())
            row = packing.joined([part], DATA, case.model)
            at = int(np.flatnonzero(row["loss_weights"])[0]) + len(text)
            token = int(np.argmax(logits(case, row)[at, : Few.vocab_size]))
            if token == Few.end_of_document:
                break
            text += Few().decode([token])
        assert reply == text


def test_images_of_one_size_are_turned_by_their_grid(case):
    data = dataclasses.replace(DATA, image_fit="squash", images=2)
    vision = dataclasses.replace(case.model.vision, image_size=16)
    model = dataclasses.replace(case.model, vision=vision)
    record = conversation((16, 16), (16, 16))
    squashed = packing.joined([packing.part(record, Few(), data, model, Counter())], data, model)
    native = packing.joined([packing.part(record, Few(), DATA, model, Counter())], DATA, model)
    np.testing.assert_array_equal(squashed["rope_positions"], native["rope_positions"])
    np.testing.assert_allclose(logits(case, squashed), logits(case, native), rtol=0, atol=1e-5)

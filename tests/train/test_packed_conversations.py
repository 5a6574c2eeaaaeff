"""Conversations that share a row are computed as each would be alone: the same logits, losses and gradients.

Legend: R conversations, T tokens of a row.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import jax
import numpy as np
import optax
import pytest

from model.config import ModelConfig, VisionConfig
from model.place import Place
from model.vision.images import Images
from model.weights import bind
from tests.runs import random_state
from train.config import DataConfig, Experiment, ObjectiveConfig, OptimizerConfig
from train.data.batch import Batch
from train.data.chat import packing
from train.data.chat.record import IMAGE, Conversation, Turn
from train.data.text.tokenizer import ByteTokenizer
from train.program import make_program
from train.resolve import resolve

VIT = {"encoder": "vit", "image_size": 8, "patch_size": 4, "layers": 1, "embed_dim": 16, "heads": 2}
NATIVE = {"fusion": "merge", "vision": VIT | {"positions": "rope", "connector": "merger"}}
# model fields, with those of vision among them; image_fit
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "text": ({}, "squash"),
    "merge": ({"fusion": "merge"}, "squash"),
    "prefix": ({"fusion": "merge", "vision": VIT | {"mask": "prefix"}}, "squash"),
    "images": ({"fusion": "merge", "vision": VIT | {"mask": "images", "image_positions": 6}}, "squash"),
    "native": (NATIVE, "native"),
    "turned": (NATIVE | {"rope_sections": (2, 1, 1)}, "native"),
    "cross": ({"fusion": "cross", "vision": VIT | {"image_positions": 6}}, "squash"),
    "last": ({"fusion": "cross", "vision": VIT | {"sees": "last"}}, "squash"),
    "co": ({"fusion": "co", "vision": VIT | {"connections": 1, "connection_heads": 2}}, "squash"),
    "tangled": ({"fusion": "tangled", "vision": VIT | {"connections": 1, "connection_heads": 2}}, "squash"),
}
EVERY_TIME = ("text", "prefix", "turned", "tangled")


def experiment_of(case: str) -> Experiment:
    fields, fit = CASES[case]
    vision = VisionConfig(**fields.get("vision", VIT)) if case != "text" else VisionConfig()
    model = ModelConfig(**{"vocab_size": 257, "layers": 2, "embed_dim": 16, "heads": 2} | fields | {"vision": vision})
    experiment = resolve(
        Experiment(
            model=model,
            data=DataConfig(
                **{"tokenizer": "bytes", "bpe_vocab_size": 257, "context": 64, "batch_size": 8},
                **{"image_fit": fit, "images": 6, "patches": 96},
            ),
            objective=ObjectiveConfig(name="conversation"),
            # Without momentum and clipping, its state is the last gradient.
            optimizer=OptimizerConfig(name="sgd", schedule="constant", warmup_steps=0, beta1=0.0, clip_norm=0.0),
        )
    )
    experiment.model = experiment.model.placed("cpu", "float32")
    return experiment


def conversations(case: str) -> list[Conversation]:
    """Eight with none, one or two images and one or two questions; without images where the model sees none."""
    rng = np.random.default_rng(0)

    def one(number: int) -> Conversation:
        count = 0 if case == "text" else number % 3
        sizes = rng.integers(6, 20, (count, 2))
        images = tuple(rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes)
        turns = [Turn("user", IMAGE * count + "q" * (number + 1)), Turn("assistant", "abc"[number % 3] * 3)]
        turns += [Turn("user", "and?"), Turn("assistant", "x")] * (number % 2)
        return Conversation(f"{number}", tuple(turns), images)

    return [one(number) for number in range(8)]


def stacked(rows: list[Batch]) -> Batch:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def rows_of(case: str, groups: list[list[int]]) -> Batch:
    experiment, records = experiment_of(case), conversations(case)
    data, model = experiment.data, experiment.model
    parts = [packing.part(record, ByteTokenizer(), data, model, Counter()) for record in records]
    rows = [packing.joined([parts[number] for number in group], data, model) for group in groups]
    nothing = {name: np.zeros_like(array) for name, array in rows[0].items()}
    return stacked(rows + [nothing] * (data.batch_size - len(rows)))


# Rows of one conversation, and of several, filled up with rows of nothing: the same programs compute both.
ALONE = [[0], [1], [2], [3], [4], [6], [5], [7]]
SHARED = [[0, 1, 2], [3, 4], [6, 5], [7]]


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in EVERY_TIME else [pytest.mark.slow]) for case in CASES]
)
def test_a_conversation_in_company_is_computed_as_alone(case, one_device):
    """Every logit; then the loss and the gradient of all."""
    with jax.set_mesh(one_device):
        program = make_program(experiment_of(case), one_device)
        logits_of = jax.jit(lambda weights, batch: logits(program.graphdef, weights, batch))

        def computed(batch: Batch) -> tuple[np.ndarray, float, Any]:
            state = random_state(program)
            found = np.asarray(logits_of(state.weights, batch))
            after, metrics = program.step(state, batch, {})
            gradient = jax.tree.map(np.asarray, optax.tree.get(after.optimizer_state, "trace"))
            return found, metrics["nll"].item(), gradient

        shared, alone = rows_of(case, SHARED), rows_of(case, ALONE)
        assert shared["segments"].max() == 3
        (found, loss, gradient), (wanted, wanted_loss, wanted_gradient) = computed(shared), computed(alone)
    # Row by row the shared rows hold the tokens of the others in their order.
    ours, theirs = shared["segments"] > 0, alone["segments"] > 0
    np.testing.assert_array_equal(shared["tokens"][ours], alone["tokens"][theirs])
    np.testing.assert_allclose(found[ours], wanted[theirs], rtol=0, atol=2e-5 * np.abs(wanted).max())
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted_gradient))
    assert largest > 0
    for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(wanted_gradient), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5 * largest)


def logits(graphdef: Any, weights: Any, batch: Batch) -> jax.Array:
    """[R, T, V]"""
    model, images = bind(graphdef, weights), None
    if "images" in batch:
        by_token = batch["image_slots"], batch["images_seen"], batch["given"]
        images = Images(batch["images"], batch["image_segments"], *by_token, batch.get("image_positions"))
    place = Place(batch["segments"], batch["positions"])
    return model.head(model(batch["tokens"], place, positions=batch.get("rope_positions"), images=images)[0])


def test_the_comparison_notices_a_segment_that_is_lost(one_device):
    """One row of segments put to 1: another conversation is seen, and the logits are others."""
    batch, experiment = rows_of("merge", SHARED), experiment_of("merge")
    with jax.set_mesh(one_device):
        program = make_program(experiment, one_device)
        weights = random_state(program).weights
        lost = batch | {"segments": np.minimum(batch["segments"], 1)}
        right, wrong = (np.asarray(logits(program.graphdef, weights, b)) for b in (batch, lost))
    there = batch["segments"] > 1
    assert np.abs(right - wrong)[there].max() > 1e-2 * np.abs(right).max()


def test_a_model_that_is_turned_in_three_dimensions_asks_for_them():
    experiment = experiment_of("turned")
    assert rows_of("turned", SHARED)["rope_positions"].shape == (8, 64, 3)
    plain = dataclasses.replace(experiment.model, rope_sections=())
    part = packing.part(conversations("turned")[1], ByteTokenizer(), experiment.data, plain, Counter())
    assert "rope_positions" not in packing.joined([part], experiment.data, plain)

"""CLIP and SigLIP: two towers against one vector each, their ends, scales and biases.

Legend: B rows, T tokens, E projection_dim.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import kinds
from model.config import ModelConfig, VisionConfig
from model.fusion.contrastive import Contrastive
from model.place import Place
from model.vision.vision import Vision
from model.weights import bind, build, init
from tests.model import float64
from train.data.chat.rows import text_row
from train.data.text.tokenizer import ByteTokenizer

CASES: dict[str, dict[str, Any]] = {
    "clip": {"pool": "class", "class_token": True},
    "siglip": {"kind": "encoder", "pool": "map", "similarity": "sigmoid", "text_pool": "last"},
    "siglip-narrow": {"kind": "encoder", "pool": "mean", "similarity": "sigmoid", "text_pool": "last", "projection": 5},
}


@functools.cache
def made(case: str) -> tuple[ModelConfig, Any, Any]:
    fields = dict(CASES[case])
    kind = fields.pop("kind", "decoder")
    vision = {"image_size": 8, "patch_size": 4, "layers": 1, "embed_dim": 8, "heads": 2}
    vision |= {"projection_dim": fields.pop("projection", 8)} | fields
    text = {"vocab_size": 11, "layers": 1, "embed_dim": 12, "heads": 2, "positions": "learned", "max_positions": 9}
    text |= {"norm_eps": 1e-2, "activation": "quick_gelu", "kind": kind, "fusion": "contrastive"}
    config = ModelConfig(**text, vision=VisionConfig(encoder="vit", **vision)).resolved().placed("cpu", "float32")
    return config, *float64.drawn(config, kinds.maker(config))


def texts(case: str) -> tuple[np.ndarray, Place, np.ndarray]:
    """Tokens [3, 7], their place, where the texts end."""
    lengths = np.array([7, 3, 5])
    order = np.broadcast_to(np.arange(7, dtype=np.int32), (3, 7))
    tokens = np.random.default_rng(0).integers(0, 11, (3, 7)).astype(np.int32)
    return tokens, Place((order < lengths[:, None]).astype(np.int32), order), lengths - 1


@pytest.mark.parametrize("case", CASES)
def test_a_text_is_its_last_token_or_its_row_s(case):
    config, graphdef, weights = made(case)
    tokens, place, ends = texts(case)
    found = jax.jit(lambda w: bind(graphdef, w).texts(tokens, place))(weights)
    w = float64.exactly(weights)
    h = w["embedding"]["embedding"][tokens] + w["position_embedding"]["embedding"][place.positions]
    mask = np.ones((3, 7, 7), bool)  # SigLIP's padding is read with its text
    if config.kind == "decoder":
        mask = place.segments[:, :, None] == place.segments[:, None]
        mask = mask & (place.positions[:, :, None] >= place.positions[:, None])
    h = float64.norm(float64.block(h, float64.layers(w["stack"], 1)[0], mask, config), w["final_norm"], 1e-2)
    h = h[np.arange(3), ends if config.vision.text_pool == "end" else 6]
    wanted = float64.linear(h, w["text_projection"])
    np.testing.assert_allclose(found, wanted / np.linalg.norm(wanted, axis=-1, keepdims=True), rtol=0, atol=2e-6)
    assert ("bias" in w["text_projection"]) == (case != "clip")


def test_what_follows_a_text_s_end_is_not_read_and_the_end_may_be_given():
    _, graphdef, weights = made("clip")
    tokens, place, ends = texts("clip")
    run = jax.jit(lambda tokens, place, ends: bind(graphdef, weights).texts(tokens, place, ends))
    found = run(tokens, place, None)
    np.testing.assert_array_equal(run(np.where(place.segments > 0, tokens, 3), place, None), found)
    whole = place._replace(segments=np.ones_like(place.segments))
    np.testing.assert_allclose(run(tokens, whole, ends.astype(np.int32)), found, rtol=0, atol=1e-6)
    assert np.abs(run(tokens, whole, None) - found).max(-1)[1:].min() > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_short_texts_have_vectors_of_their_own(case):
    _, graphdef, weights = made(case)
    rows = [text_row(text, ByteTokenizer(), 9) for text in ("a", "b", "ab")]
    tokens, segments, positions = (
        np.stack([row[field] for row in rows]) for field in ("tokens", "segments", "positions")
    )
    place = Place(segments, positions)
    found = jax.jit(lambda w: bind(graphdef, w).texts(tokens % 11, place))(weights)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(found[one] - found[other]).max() > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_an_image_is_one_vector_of_length_one(case):
    config, graphdef, weights = made(case)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)
    found = jax.jit(lambda w: bind(graphdef, w).images(pixels))(weights)
    vision = build(config, Vision)[0]
    wanted = jax.jit(lambda w: bind(vision, w).pooled(pixels))(weights["vision"])
    assert ("image_projection" in weights) == (case != "siglip")
    if "image_projection" in weights:
        wanted = float64.linear(np.asarray(wanted, np.float64), float64.exactly(weights["image_projection"]))
    wanted = wanted / np.linalg.norm(wanted, axis=-1, keepdims=True)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", ["clip", "siglip"])
def test_logits_are_scaled_similarities(case):
    """CLIP's scale is at most 100, SigLIP's has no limit and a bias beside it."""
    _, graphdef, weights = made(case)
    model = bind(graphdef, weights)
    rng = np.random.default_rng(1)
    images, texts = rng.normal(size=(2, 8)), rng.normal(size=(3, 8))
    for scale in (0.5, 7.0):
        model.logit_scale[...] = jnp.full((1,), scale)
        factor, bias = np.exp(scale), 0.0 if case == "clip" else float(weights["logit_bias"][0])
        wanted = images @ texts.T * (min(factor, 100.0) if case == "clip" else factor) + bias
        np.testing.assert_allclose(model.logits(jnp.asarray(images), jnp.asarray(texts)), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("case", "scale", "bias"), [("clip", np.log(1 / 0.07), None), ("siglip", np.log(10), -10)])
def test_scale_and_bias_start_as_in_the_papers(case, scale, bias):
    config, _, _ = made(case)

    def first(key: jax.Array) -> Any:  # What is not returned is not compiled.
        weights = init(config, key, Contrastive)
        return {name: weights[name] for name in ("logit_scale", "logit_bias") if name in weights}

    weights = jax.jit(first)(jax.random.key(0))
    assert weights["logit_scale"] == pytest.approx(scale)
    assert ("logit_bias" in weights) == (bias is not None)
    if bias is not None:
        assert weights["logit_bias"] == pytest.approx(bias)

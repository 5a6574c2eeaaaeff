"""Late fusion against the same in float64: what the text's first token and the image become, side by side or averaged.

Legend: B rows, T tokens, D embed_dim, L labels.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from model import kinds
from model.bert import Bert
from model.config import ModelConfig, VisionConfig
from model.fusion.late import Late
from model.place import Place
from model.vision.vision import Vision
from model.weights import bind, build
from tests.model import float64

COMBINE = ("concatenation", "average")
every_combine = pytest.mark.parametrize("combine", COMBINE)


def configured(combine: str, **fields: Any) -> ModelConfig:
    """A tiny model whose image vectors have another width than its text."""
    vision = {"encoder": "vit", "image_size": 8, "patch_size": 4, "layers": 1, "embed_dim": 8, "heads": 2}
    vision |= {"pool": "mean", "connector": "none", "combine": combine}
    text = {"vocab_size": 11, "layers": 2, "embed_dim": 12, "heads": 2, "positions": "learned", "max_positions": 9}
    text |= {"kind": "encoder", "head": "pooled", "labels": 3, "norm_order": "post", "norm_eps": 1e-2}
    config = ModelConfig(**text | fields, fusion="late", vision=VisionConfig(**vision))
    return config.resolved().placed("cpu", "float32")


@functools.cache
def made(combine: str) -> tuple[ModelConfig, Any, Any]:
    config = configured(combine)
    return config, *float64.drawn(config, kinds.maker(config))


def rows() -> tuple[np.ndarray, Place, np.ndarray]:
    """Tokens [3, 7] of texts of 7, 3 and 5 tokens, their place, an image each."""
    rng, order = np.random.default_rng(0), np.broadcast_to(np.arange(7, dtype=np.int32), (3, 7))
    there = (order < np.array([7, 3, 5])[:, None]).astype(np.int32)
    tokens = rng.integers(0, 11, (3, 7)).astype(np.int32)
    return tokens, Place(there, order), rng.integers(0, 256, (3, 8, 8, 3)).astype(np.uint8)


@every_combine
def test_logits_are_those_of_plain_numpy(combine):
    config, graphdef, weights = made(combine)
    tokens, place, pixels = rows()

    @jax.jit
    def run(weights: Any) -> jax.Array:
        model = bind(graphdef, weights)
        return model.logits(model.text(tokens, place), model.image(pixels))

    w, vision = float64.exactly(weights), build(config, Vision)[0]
    h = w["embedding"]["embedding"][tokens] + w["position_embedding"]["embedding"][place.positions]
    h = float64.norm(h, w["embedding_norm"], config.norm_eps)
    mask = place.segments[:, :, None] == place.segments[:, None]
    for layer in float64.layers(w["stack"], config.layers):
        h = float64.block(h, layer, mask, config, post=True)
    seen = jax.jit(lambda w: bind(vision, w).pooled(pixels))(weights["vision"])
    text, image = h[:, 0], float64.linear(np.asarray(seen, np.float64), w["image_projection"])
    if combine == "concatenation":
        joined = np.concatenate([text, image], axis=1)
    else:
        share = scipy.special.expit(w["image_gate"])
        joined = share * image + (1 - share) * text
    wanted = float64.linear(np.tanh(float64.linear(joined, w["head"]["pooler"])), w["head"]["out"])
    np.testing.assert_allclose(run(weights), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_both_weigh_one_half_at_first():
    config = configured("average")
    gate = jax.jit(lambda key: kinds.init(config, key)["image_gate"])(jax.random.key(0))
    np.testing.assert_array_equal(gate, np.zeros(12))
    assert "image_gate" not in made("concatenation")[2]


@every_combine
def test_which_text_fits_best_depends_on_the_image(combine):
    """A sum of what both say by themselves has logit(a, x) - logit(a, y) = logit(b, x) - logit(b, y) for all texts."""
    _, graphdef, weights = made(combine)
    model, rng = bind(graphdef, weights), np.random.default_rng(1)
    texts, images = (jnp.asarray(rng.normal(size=(2, 12)), jnp.float32) for _ in range(2))
    first, second = (model.logits(texts, jnp.broadcast_to(image, (2, 12))) for image in images)
    differences = first - second  # [2, L], by text
    assert np.abs(differences[0] - differences[1]).max() > 0.05


def test_weights_of_a_bert_have_its_paths_and_shapes():
    """So that a run can start from a BERT: all are taken over where vectors are averaged."""
    config, _, weights = made("average")
    blind = ModelConfig(**{f: getattr(config, f) for f in ("vocab_size", "layers", "embed_dim", "heads", "kind")})
    for field in ("head", "labels", "positions", "max_positions", "norm_order"):
        setattr(blind, field, getattr(config, field))
    _, of_bert, _ = build(blind.resolved().placed("cpu", "float32"), Bert)
    for path, leaf in jax.tree_util.tree_leaves_with_path(of_bert):
        found = functools.reduce(lambda tree, part: tree[part.key], path, weights)
        assert found.shape == leaf.shape, path
    assert weights.keys() - of_bert.keys() == {"vision", "image_projection", "image_gate"}


def test_the_text_drops_in_training():
    graphdef, weights = float64.drawn(configured("average", residual_dropout=0.5), Late)
    model, (tokens, place, _) = bind(graphdef, weights), rows()
    keys = jax.random.split(jax.random.key(0), 3)
    assert np.abs(model.text(tokens, place, keys) - model.text(tokens, place)).max() > 1e-2

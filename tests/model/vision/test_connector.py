"""Connectors against loops and a plain float64 reference of Flamingo's perceiver.

Legend: R images, M vectors of an image, C the encoder's width, f neighbours along a side.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.config import ModelConfig, VisionConfig
from model.vision.connector import Connector, Perceiver
from model.weights import bind
from tests.model import float64
from tpu.errors import UserError

GRID, WIDTH, TEXT = (4, 6), 8, 12


def made(connector: str, fusion: str = "merge", **vision: Any) -> ModelConfig:
    fields = {"encoder": "vit", "image_size": 8, "patch_size": 2, "embed_dim": WIDTH, "heads": 2, "connector_eps": 1e-2}
    fields |= {"connector": connector, "latents": 3, "connector_heads": 2, "connector_head_dim": 6} | vision
    config = ModelConfig(vocab_size=9, layers=2, embed_dim=TEXT, heads=2, fusion=fusion, vision=VisionConfig(**fields))
    return config.resolved().placed("cpu", "float32")


def vectors(count: int = 2, seed: int = 0) -> np.ndarray:
    """x [R, M, C] of images of GRID vectors, row by row."""
    return np.random.default_rng(seed).normal(size=(count, GRID[0] * GRID[1], WIDTH)).astype(np.float32)


def ran(config: ModelConfig, x: np.ndarray, grid: tuple[int, int] | None = GRID) -> tuple[Any, np.ndarray]:
    """The weights in float64, and what the connector makes of x."""
    graphdef, weights = float64.drawn(config, Connector)
    there = np.ones(x.shape[:2], np.int32)
    return float64.exactly(weights), jax.jit(lambda w, x: bind(graphdef, w)(x, grid, there))(weights, x)


def neighbours(x: np.ndarray, f: int) -> np.ndarray:
    """[R, M / f^2, f^2, C]: for each square of f by f, row by row, its vectors, row by row."""
    (height, width), squares = GRID, []
    for top in range(0, height, f):
        for left in range(0, width, f):
            squares.append([x[:, i * width + j] for i in range(top, top + f) for j in range(left, left + f)])
    return np.array(squares).transpose(2, 0, 1, 3)


def reference(kind: str, x: np.ndarray, w: Any, f: int) -> np.ndarray:
    x, gelu = x.astype(np.float64), float64.ACTIVATIONS["gelu"]
    match kind:
        case "linear":
            return float64.linear(x, w["out"])
        case "mlp":
            return float64.linear(gelu(float64.linear(x, w["up"])), w["out"])
        case "pixel_shuffle":
            return float64.linear(neighbours(x, f).reshape(len(x), -1, f * f * WIDTH), w["out"])
        case "average_pool":
            return float64.linear(float64.norm(neighbours(x, f).mean(2), w["norm"], 1e-2, "rmsnorm"), w["out"])
    beside = neighbours(float64.norm(x, w["norm"], 1e-2), f).reshape(len(x), -1, f * f * WIDTH)
    return float64.linear(gelu(float64.linear(beside, w["up"])), w["out"])


@pytest.mark.parametrize("fields", [{}, {"connector_bias": False, "connector_dim": 5}])
@pytest.mark.parametrize("kind", ["linear", "mlp", "pixel_shuffle", "average_pool", "merger"])
def test_a_connector_is_its_loops(kind, fields):
    config, x = made(kind, **fields), vectors()
    weights, found = ran(config, x)
    np.testing.assert_allclose(found, reference(kind, x, weights, config.vision.shrink), rtol=0, atol=2e-5)
    assert ("bias" in weights["out"]) == config.vision.connector_bias
    if "up" in weights:
        assert weights["up"]["kernel"].shape[1] == (config.vision.connector_dim or TEXT)


@pytest.mark.parametrize("kind", ["pixel_shuffle", "average_pool", "merger"])
def test_neighbours_may_also_follow_each_other(kind):
    config, x = made(kind), vectors()
    _, wanted = ran(config, x)
    _, found = ran(config, neighbours(x, 2).reshape(x.shape), None)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)


def test_without_a_connector_vectors_stay_as_they_are():
    config, x = made("none", fusion="cross"), vectors()
    weights, found = ran(config, x)
    np.testing.assert_array_equal(found, x)
    assert not weights
    assert config.source_width == WIDTH


def test_vectors_of_another_width_than_the_text_are_not_merged_without_a_connector():
    with pytest.raises(UserError, match=r"^model.vision.connector='none': .* width 8, .* model.embed_dim=12"):
        made("none", fusion="merge")


def perceived(x: np.ndarray, w: Any, config: ModelConfig, segments: np.ndarray) -> np.ndarray:
    """Flamingo's resampler, appendix A.1.1: [R, latents, C]."""
    vision = config.vision
    h = np.broadcast_to(w["latents"], (len(x), *w["latents"].shape))
    mask = np.concatenate([segments > 0, np.ones((len(x), vision.latents), bool)], 1)
    mask = np.broadcast_to(mask[:, None], (len(x), vision.latents, mask.shape[1]))
    for i in range(vision.connector_layers):
        y, z = (float64.norm(a, w[f"{name}_norm_{i}"], 1e-2) for a, name in ((x, "source"), (h, "latents")))
        of, keys = w[f"attention_{i}"], np.concatenate([y, z], 1)
        q, k, v = (float64.linear(a, of[n]) for a, n in ((z, "query"), (keys, "key"), (keys, "value")))
        if vision.connector_qk_norm:
            q, k = float64.norm(q, of["query_norm"], 1e-2), float64.norm(k, of["key_norm"], 1e-2)
        h = h + float64.linear(float64.attention(q, k, v, mask), of["out"], 2)
        h = h + float64.mlp(float64.norm(h, w[f"mlp_norm_{i}"], 1e-2), w[f"mlp_{i}"], vision.connector_activation)
    return float64.norm(h, w["final_norm"], 1e-2)


@pytest.mark.parametrize("fields", [{}, {"connector_qk_norm": True, "connector_activation": "relu"}])
def test_a_perceiver_is_that_of_the_paper_and_does_not_look_at_nothing(fields):
    config, x = made("perceiver", fusion="cross", **fields), vectors()
    graphdef, weights = float64.drawn(config, Perceiver)
    run = jax.jit(lambda x, segments: bind(graphdef, weights)(x, segments))
    segments = np.ones(x.shape[:2], np.int32)
    segments[1, 5:9] = 0
    found = np.asarray(run(x, segments))
    wanted = perceived(x.astype(np.float64), float64.exactly(weights), config, segments)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5)
    np.testing.assert_array_equal(run(np.where(segments[..., None] > 0, x, 7.0), segments), found)
    order = np.random.default_rng(0).permutation(x.shape[1])
    np.testing.assert_allclose(run(x[:, order], segments[:, order]), found, rtol=0, atol=1e-5)
    biases = [path for path, _ in jax.tree_util.tree_leaves_with_path(weights) if path[-1].key == "bias"]
    assert all("norm" in jax.tree_util.keystr(path) for path in biases)


@pytest.mark.parametrize(("fusion", "width"), [("merge", TEXT), ("cross", WIDTH)])
def test_what_is_merged_has_the_width_of_the_text(fusion, width):
    config, x = made("perceiver", fusion), jnp.asarray(vectors())
    weights, found = ran(config, x)
    assert found.shape == (2, 3, width)
    assert config.source_width == width
    assert ("out" in weights) == (fusion == "merge")
    if fusion == "merge":
        own = perceived(np.asarray(x, np.float64), weights["perceiver"], config, np.ones(x.shape[:2]))
        np.testing.assert_allclose(found, float64.linear(own, weights["out"]), rtol=0, atol=2e-5)

"""Encoders see both ways and no other segment; a decoder's cache gives what its full forward gives."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import kinds, transformer
from model.attention.cache import empty_cache
from model.config import ModelConfig
from model.encoder_decoder import decoder_config
from model.place import Place
from model.positions.relative_positions import RelativeBias, buckets
from model.weights import bind
from tpu.errors import UserError

SHARED = {"vocab_size": 23, "layers": 2, "embed_dim": 16, "heads": 4, "init": "fan_in", "init_std": 1.0}
BERT = {"kind": "encoder", "positions": "learned", "max_positions": 12, "norm_order": "post", "token_types": 2}
T5 = {
    "kind": "encoder_decoder",
    "positions": "relative",
    "norm": "rmsnorm",
    "query_scalar": 1.0,
    "decoder_layers": 3,
    "relative_buckets": 8,
    "relative_distance": 9,
    "head_dim": 6,
    "attention_bias": False,
}
ORIGINAL = {"kind": "encoder_decoder", "positions": "sinusoidal", "norm_order": "post", "scale_embedding": True}


def made(loop: str = "unroll", **fields) -> tuple[ModelConfig, transformer.Transformer]:
    config = ModelConfig(**(SHARED | fields), layer_loop=loop).resolved().placed("cpu", "float32")
    weights = jax.jit(lambda key: kinds.init(config, key))(jax.random.key(3))
    weights = jax.tree.map(lambda w: w + 0.1 * jax.random.normal(jax.random.key(w.size), w.shape), weights)
    return config, bind(kinds.build(config)[0], weights)


def test_an_encoder_sees_later_tokens_and_no_other_segment():
    _, model = made(**BERT)
    tokens = jnp.array([[1, 2, 3, 4, 5, 6, 7, 8]])
    place = Place(jnp.array([[1, 1, 1, 1, 2, 2, 0, 0]]), jnp.array([[0, 1, 2, 3, 0, 1, 0, 0]]))
    before, _ = model(tokens, place)
    for changed, alters in ((3, [0, 1, 2, 3]), (0, [0, 1, 2, 3]), (5, [4, 5]), (7, [6, 7])):
        after, _ = model(tokens.at[0, changed].set(20), place)
        found = np.flatnonzero(np.abs(after - before).max(-1)[0] > 1e-6)
        assert found.tolist() == alters


def test_token_types_count_and_are_zero_where_they_are_not_given():
    _, model = made(**BERT)
    tokens = jnp.arange(6)[None]
    place = Place(jnp.ones_like(tokens), tokens)
    plain, _ = model(tokens, place)
    np.testing.assert_array_equal(plain, model(tokens, place, token_types=jnp.zeros_like(tokens))[0])
    assert np.abs(plain - model(tokens, place, token_types=jnp.ones_like(tokens))[0]).max() > 1e-2


def reference_bucket(distance: int, count: int, farthest: int, causal: bool) -> int:
    """Section 2.1 in whole numbers: powers instead of logarithms."""
    side = 0 if causal or distance <= 0 else count // 2
    count = count if causal else count // 2
    behind = max(-distance, 0) if causal else abs(distance)
    exact = count // 2
    if behind < exact:
        return side + behind
    borders = [exact * (farthest / exact) ** (i / (count - exact)) for i in range(1, count - exact)]
    return side + exact + sum(behind >= border * (1 - 1e-6) for border in borders)


@pytest.mark.parametrize(("count", "farthest"), [(32, 128), (8, 20), (16, 50), (32, 100)])
@pytest.mark.parametrize("causal", [False, True])
def test_buckets_are_those_of_the_paper(count, farthest, causal):
    found = buckets(count, farthest, causal)
    for distance in range(-farthest, farthest + 1):
        assert found[distance + farthest] == reference_bucket(distance, count, farthest, causal), distance
    assert set(found) <= set(range(count))
    assert math.isclose(found[0], count - 1 if causal else count // 2 - 1)


def test_a_bias_depends_on_the_distance_alone():
    config, _ = made(**T5)
    from flax import nnx

    bias = RelativeBias(config, False, nnx.Rngs(0))
    near = bias(jnp.array([[0, 1, 2]]), jnp.array([[0, 1, 2, 40]]))
    far = bias(jnp.array([[50, 51, 52]]), jnp.array([[50, 51, 52, 90]]))
    np.testing.assert_array_equal(near, far)
    np.testing.assert_array_equal(near[..., 0, 0], near[..., 1, 1])
    assert np.abs(near[..., 0, 1] - near[..., 1, 0]).max() > 1e-2  # before and after differ
    np.testing.assert_array_equal(near[..., 0, 3], bias(jnp.array([[0]]), jnp.array([[9]]))[..., 0, 0])


@pytest.mark.parametrize("fields", [T5, ORIGINAL], ids=["t5", "original"])
@pytest.mark.parametrize("loop", ["unroll", "scan"])
def test_the_cache_gives_what_the_full_forward_gives(fields, loop):
    config, model = made(loop, **fields)
    rng = np.random.default_rng(0)
    inputs, tokens = jnp.asarray(rng.integers(0, 23, (2, 7))), jnp.asarray(rng.integers(0, 23, (2, 10)))
    segments = jnp.array([[1] * 7, [1] * 4 + [0] * 3])
    steps = jnp.broadcast_to(jnp.arange(10), (2, 10))
    whole, _ = model(tokens, Place(jnp.ones_like(tokens), steps), inputs=inputs, input_segments=segments)
    source = model.encode(inputs, segments)
    cache = empty_cache(decoder_config(config), 2, 12)

    @jax.jit
    def advance(cache, source, t):
        place = Place(jnp.ones((2, 1), jnp.int32), jnp.full((2, 1), t))
        h, cache = model(jax.lax.dynamic_slice_in_dim(tokens, t, 1, 1), place, cache, source=source)
        return h[:, 0], cache

    for t in range(10):
        h, cache = advance(cache, source, t)
        np.testing.assert_allclose(h, whole[:, t], atol=2e-5)
        source = source._replace(hidden=None)  # From here on keys and values come from the cache.
    cache = jax.tree.map(jnp.zeros_like, cache)._replace(slots=empty_cache(decoder_config(config), 2, 12).slots)
    source = model.encode(inputs, segments)
    for first, last in ((0, 4), (4, 9), (9, 10)):  # in parts of several tokens
        place = Place(jnp.ones((2, last - first), jnp.int32), steps[:, first:last])
        part = source if first == 0 else source._replace(hidden=None)
        h, cache = model(tokens[:, first:last], place, cache, source=part)
        np.testing.assert_allclose(h, whole[:, first:last], atol=2e-5)


def test_padding_of_the_source_is_not_seen():
    _, model = made(**T5)
    inputs = jnp.array([[3, 4, 5, 9, 9]])
    segments, steps = jnp.array([[1, 1, 1, 0, 0]]), jnp.arange(4)[None]
    place = Place(jnp.ones_like(steps), steps)
    padded, _ = model(steps, place, inputs=inputs, input_segments=segments)
    short, _ = model(steps, place, inputs=inputs[:, :3], input_segments=segments[:, :3])
    np.testing.assert_allclose(padded, short, atol=1e-5)


def test_packed_targets_see_their_own_source_alone():
    _, model = made(**T5)
    inputs, segments = jnp.array([[3, 4, 5, 6, 7, 8]]), jnp.array([[1, 1, 1, 2, 2, 2]])
    tokens, place = jnp.array([[1, 2, 3, 1, 2]]), Place(jnp.array([[1, 1, 1, 2, 2]]), jnp.arange(5)[None])
    both, _ = model(tokens, place, inputs=inputs, input_segments=segments)
    second = Place(jnp.ones((1, 2), jnp.int32), jnp.arange(2)[None])
    alone, _ = model(tokens[:, 3:], second, inputs=inputs[:, 3:], input_segments=jnp.ones((1, 3), jnp.int32))
    np.testing.assert_allclose(both[:, 3:], alone, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"kind": "tree"}, "model.kind"),
        ({"labels": 3}, "model.labels"),
        ({"kind": "encoder", "head": "pooled"}, "model.labels"),
        ({"kind": "encoder", "pattern": ("local", "global"), "window": 2}, "model.pattern"),
        ({"kind": "encoder_decoder", "positions": "rope"}, "model.positions"),
        ({"positions": "relative"}, "model.positions"),
        (T5 | {"relative_buckets": 7}, "model.relative_buckets"),
        (T5 | {"relative_distance": 4}, "model.relative_distance"),
    ],
)
def test_impossible_shapes_are_refused_by_name(fields, field):
    with pytest.raises(UserError, match=rf"^{field}="):
        ModelConfig(**(SHARED | fields)).resolved()

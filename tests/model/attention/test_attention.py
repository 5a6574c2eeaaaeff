"""The implementations of attention against each other, and rotary positions on their own.

Legend: B rows, T tokens, H heads, G kv_heads, K head_dim.
"""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

from model.attention import chunked_attention
from model.attention.attend import Rules, attend
from model.attention.cudnn_attention import cudnn_attention
from model.dropout import row_keys
from model.place import Place
from model.positions.rope import plain_frequencies, rotate, rotation

CASES = [  # heads, kv_heads, tokens, window, softcap, documents per row
    (2, 2, 64, 0, 0.0, 1),
    (4, 2, 150, 0, 0.0, 3),
    (3, 1, 131, 40, 0.0, 2),
    (2, 1, 97, 70, 2.0, 1),
    (2, 2, 200, 1, 0.0, 4),
    (4, 2, 5, 3, 1.0, 2),
]


def inputs(heads: int, kv_heads: int, tokens: int, documents: int, dtype: str = "float32") -> tuple:
    """q [B, H, T, K], k and v [B, G, T, K], and a place where the second row ends in padding."""
    rng = np.random.default_rng(tokens)
    q, k, v = (rng.normal(size=(2, n, tokens, 8)).astype(np.float32) for n in (heads, kv_heads, kv_heads))
    q *= 8**-0.5
    starts = np.zeros((2, tokens), bool)
    starts[:, 0] = True
    for row in starts:
        row[rng.choice(tokens, documents - 1, replace=False)] = True
    steps = np.arange(tokens)
    segments, positions = np.cumsum(starts, 1), steps - np.maximum.accumulate(np.where(starts, steps, 0), 1)
    padding = (np.arange(2)[:, None] == 1) & (steps >= 0.8 * tokens)
    place = Place(*(np.where(padding, 0, a).astype(np.int32) for a in (segments, positions)))
    return *(jnp.asarray(a, dtype) for a in (q, k, v)), place, jnp.asarray(~padding, jnp.float32)


@functools.partial(jax.jit, static_argnames=("kind", "window", "softcap"))
def value_and_gradients(q, k, v, place, real, kind, window, softcap):
    """The output, zero at padding, and the gradients of a mixture of it for q, k and v."""

    def mixed(q, k, v):
        out = attend(q, k, v, place, place, Rules(kind, window, softcap, same=True))
        out = out.astype(jnp.float32) * real[:, None, :, None]
        return jnp.sum(out * jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)), out

    (_, out), gradients = jax.value_and_grad(mixed, (0, 1, 2), has_aux=True)(q, k, v)
    return out, *gradients


@pytest.mark.parametrize(("heads", "kv_heads", "tokens", "window", "softcap", "documents"), CASES)
def test_chunked_equals_plain(heads, kv_heads, tokens, window, softcap, documents):
    arrays = inputs(heads, kv_heads, tokens, documents)
    chunked = value_and_gradients(*arrays, kind="chunked", window=window, softcap=softcap)
    plain = value_and_gradients(*arrays, kind="plain", window=window, softcap=softcap)
    for x, y in zip(chunked, plain, strict=True):
        assert x.dtype == y.dtype == jnp.float32
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * max(1.0, np.abs(y).max()))
    assert window == 1 or np.abs(chunked[1]).max() > 0.01  # a single key leaves q nothing to choose


def test_chunked_equals_plain_in_bfloat16():
    arrays = inputs(4, 2, 150, 3)
    rough = inputs(4, 2, 150, 3, "bfloat16")
    exact = value_and_gradients(*arrays, kind="plain", window=0, softcap=0.0)
    for kind in ("chunked", "plain"):
        found = value_and_gradients(*rough, kind=kind, window=0, softcap=0.0)
        assert {x.dtype for x in found[1:]} == {jnp.dtype("bfloat16")}
        for x, y in zip(found, exact, strict=True):
            np.testing.assert_allclose(x.astype(np.float32), y, rtol=0, atol=0.03 * np.abs(y).max())


def test_a_long_row():
    """More than 1,024 tokens make blocks of another size."""
    q, k, v, place, real = inputs(1, 1, 1100, 2)
    forward = jax.jit(lambda kind: attend(q, k, v, place, place, Rules(kind, window=300, same=True)), static_argnums=0)
    chunked, plain = (forward(kind) for kind in ("chunked", "plain"))
    np.testing.assert_allclose((chunked - plain) * real[:, None, :, None], 0, atol=1e-5)


def test_blocks_in_turn(monkeypatch):
    """As of very long rows, whose blocks wait for one another."""
    arrays = inputs(2, 1, 190, 2)
    plain = value_and_gradients(*arrays, kind="plain", window=0, softcap=2.0)
    monkeypatch.setattr(chunked_attention, "LONG", 100)
    found = value_and_gradients(*arrays, kind="chunked", window=0, softcap=2.0)
    for x, y in zip(found, plain, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * max(1.0, np.abs(y).max()))


def test_dropout_reaches_the_weights_of_either_kind():
    """The mean over many keys is the result without; one key alone differs from it."""
    q, k, v, place, _ = inputs(2, 2, 12, 1)
    drop = functools.partial(attend, q, k, v, place, place, Rules("chunked", same=True), dropout_rate=0.3)
    whole = drop(key=None)
    many = jax.jit(jax.vmap(lambda key: drop(key=row_keys(key, 2))))(jax.random.split(jax.random.key(0), 4000))
    assert np.abs(many[0] - whole).max() > 0.1
    np.testing.assert_allclose(many.mean(0), whole, atol=0.15)
    keys = row_keys(jax.random.key(5), 2)
    np.testing.assert_array_equal(drop(key=keys), drop(key=keys))


def test_rotary_scores_depend_on_the_distance_alone():
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 1, 1, 1, 6)).astype(np.float32)

    def score(position: int, other: int) -> float:
        turned = [
            rotate(x, rotation(np.array([[p]], np.int32), plain_frequencies(100.0, 6)))
            for x, p in ((q, position), (k, other))
        ]
        return float(jnp.sum(turned[0] * turned[1]))

    for distance in (0, 1, 5):
        scores = [score(start + distance, start) for start in (0, 3, 40)]
        np.testing.assert_allclose(scores, scores[0], atol=1e-4)
    assert abs(score(0, 0) - score(5, 0)) > 1e-2


@pytest.mark.parametrize(("window", "softcap", "kv_heads"), [(0, 0.0, 2), (7, 0.0, 1), (0, 2.0, 2)])
def test_the_tpu_kernel_equals_the_plain_form(monkeypatch, window, softcap, kv_heads):
    """The Pallas kernel, interpreted, on rows of several documents: values and gradients."""
    interpreted = functools.partial(splash_attention_kernel.make_splash_mha, interpret=True)
    monkeypatch.setattr(splash_attention_kernel, "make_splash_mha", interpreted)
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(1, heads, 256, 16)).astype(np.float32) for heads in (2, kv_heads, kv_heads))
    segments = 1 + np.cumsum(rng.random((1, 256)) < 0.02, 1)
    first = np.maximum.accumulate(np.where(np.diff(segments, prepend=0) > 0, np.arange(256), 0), 1)
    place = Place(segments.astype(np.int32), (np.arange(256) - first).astype(np.int32))

    def value(q, k, v, kind):
        out = attend(q, k, v, place, place, Rules(kind, window, softcap, same=True))
        return jnp.sum(jnp.sin(out)), out

    found, wanted = (
        jax.jit(jax.value_and_grad(functools.partial(value, kind=kind), (0, 1, 2), has_aux=True))(q, k, v)
        for kind in ("splash", "plain")
    )
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-5 * max(1, np.abs(y).max()))


@pytest.mark.parametrize(("heads", "kv_heads", "window"), [(4, 4, 0), (4, 2, 0), (4, 1, 5)])
def test_cudnn_attention_lowers_for_gpus_without_one(monkeypatch, heads, kv_heads, window):
    """Both its forms, forward and backward, are calls of cuDNN's kernels, of which none repeats keys and values."""
    # All that jax wants of cuDNN here is a version to compare with.
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    shapes = [(2, n, 64, 64) for n in (heads, kv_heads, kv_heads)]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    segments = jax.ShapeDtypeStruct((2, 64), jnp.int32)

    def loss(q, k, v, segments):
        return cudnn_attention(q, k, v, segments, window).astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*arguments, segments)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "custom_call @__cudnn$" in line]
    names = sorted(re.search(r"__cudnn\$(\w+)", line)[1] for line in calls)
    forms = ("fmhaScaleBiasSoftmax", "fmhaScaleBiasSoftmaxBackward", "fmhaSoftmax", "fmhaSoftmaxBackward")
    assert names == sorted(forms)
    for line in calls:
        assert f"tensor<2x64x{heads}x64xbf16>, tensor<2x64x{kv_heads}x64xbf16>, tensor<2x64x{kv_heads}x64xbf16>" in line
        assert f"sliding_window_length\\22: {window}" in line
    # What packed rows add is the mask of every pair, not one per head.
    taken = ["tensor<2x1x64x64xbf16>" in line.rpartition(" -> ")[0] for line in calls]
    assert taken == ["Bias" in line for line in calls]

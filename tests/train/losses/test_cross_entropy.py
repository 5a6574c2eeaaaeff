"""The chunked cross-entropy against the plain one in float64, and the proof that it is chunked.

Legend: B rows, T tokens, D embed_dim, V vocab_size.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from train.config import LossConfig
from train.losses import cross_entropy as train_loss

AXES = {"kernel": ("table_embed", "vocab"), "bias": ("vocab",)}


def cross_entropy(head: Any, weights: Any, *rest: Any) -> tuple[jax.Array, jax.Array]:
    return train_loss.cross_entropy(head, weights, AXES, *rest)


def head(softcap: float):
    """A projection with bias and, where softcap > 0, capped logits."""

    def logits(weights: dict[str, Any], hidden: jax.Array) -> jax.Array:
        z = hidden @ weights["kernel"] + jnp.expand_dims(weights["bias"], (0, 1))
        return softcap * jnp.tanh(z / softcap) if softcap else z

    return logits


def plain(head, weights, hidden, targets, loss_weights, config: LossConfig) -> tuple[jax.Array, jax.Array]:
    """The definition: all logits at once, the smoothed target distribution written out."""
    log_p = jax.nn.log_softmax(head(weights, hidden))
    log_z = jax.nn.logsumexp(head(weights, hidden), -1)
    one_hot = jax.nn.one_hot(targets, log_p.shape[-1], dtype=log_p.dtype)
    wanted = (1 - config.label_smoothing) * one_hot + config.label_smoothing / log_p.shape[-1]
    loss = -jnp.sum(wanted * log_p, -1) + config.z_loss * log_z**2
    return jnp.sum(loss * loss_weights), -jnp.sum(jnp.sum(one_hot * log_p, -1) * loss_weights)


def problem(rows: int, tokens: int, vocab_size: int, seed: int = 0) -> tuple:
    """Weights, hidden, targets and ragged loss weights, float64."""
    rng = np.random.default_rng(seed)
    weights = {"kernel": rng.normal(size=(6, vocab_size)), "bias": rng.normal(size=vocab_size)}
    loss_weights = rng.random((rows, tokens)) * (rng.random((rows, tokens)) < 0.7)
    targets = rng.integers(0, vocab_size, (rows, tokens)).astype(np.int32)
    return weights, rng.normal(size=(rows, tokens, 6)), targets, loss_weights


@settings(max_examples=20, phases=[Phase.generate])  # every example compiles: none are spent on a smaller one
@given(
    rows=st.integers(1, 3),
    tokens=st.integers(1, 12),
    vocab_size=st.sampled_from([2, 7, 30]),
    chunk_tokens=st.integers(0, 40),
    smoothing=st.sampled_from([0.0, 0.2]),
    z_loss=st.sampled_from([0.0, 0.03]),
    softcap=st.sampled_from([0.0, 1.5]),
    seed=st.integers(0, 9),
)
def test_chunked_equals_plain(rows, tokens, vocab_size, chunk_tokens, smoothing, z_loss, softcap, seed):
    config = LossConfig(label_smoothing=smoothing, z_loss=z_loss, chunk_tokens=chunk_tokens)
    problem64 = problem(rows, tokens, vocab_size, seed)

    def scaled(weights, hidden, *rest, form):
        loss, nll = form(head(softcap), weights, hidden, *rest, config)
        return 0.37 * loss, nll  # a cotangent other than 1

    with jax.enable_x64(True):
        exact = jax.jit(jax.value_and_grad(lambda *a: scaled(*a, form=plain), (0, 1), has_aux=True))(*problem64)
    narrow = jax.tree.map(lambda a: jnp.asarray(a, np.int32 if a.dtype == np.int32 else np.float32), problem64)
    chunked = jax.jit(jax.value_and_grad(lambda *a: scaled(*a, form=cross_entropy), (0, 1), has_aux=True))
    for found, wanted in zip(jax.tree.leaves(chunked(*narrow)), jax.tree.leaves(exact), strict=True):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6 * max(1, np.abs(wanted).max()))
    value = jax.jit(lambda *a: cross_entropy(head(softcap), *a, config))(*narrow)  # without a gradient, another path
    np.testing.assert_allclose(value[0] * 0.37, exact[0][0], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(value[1], exact[0][1], rtol=1e-6, atol=1e-6)


def test_the_likelihood_carries_no_gradient():
    weights, hidden, targets, loss_weights = jax.tree.map(jnp.asarray, problem(2, 4, 7))
    gradient = jax.grad(lambda h: cross_entropy(head(0), weights, h, targets, loss_weights, LossConfig())[1])(hidden)
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_label_smoothing_by_hand(smoothing):
    """Uniform logits cost log V whatever the smoothing; one logit above the rest has a closed form."""
    targets, one = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1))
    config = LossConfig(label_smoothing=smoothing)
    for edge in (0.0, 3.0):
        weights = {"kernel": jnp.zeros((6, 5)), "bias": jnp.array([edge, 0, 0, 0, 0])}
        loss, nll = cross_entropy(head(0), weights, jnp.zeros((1, 1, 6)), targets, one, config)
        log_z = np.log(np.exp(edge) + 4)
        np.testing.assert_allclose(nll, log_z - edge, rtol=1e-6)
        np.testing.assert_allclose(loss, log_z - edge + smoothing * edge * 4 / 5, rtol=1e-6)


def largest(rows: int, tokens: int, vocab_size: int, chunk_tokens: int) -> int:
    """Elements of the largest array in the compiled loss with gradients."""
    config = LossConfig(chunk_tokens=chunk_tokens)

    def loss(weights, hidden, targets, loss_weights):
        return cross_entropy(head(0), weights, hidden, targets, loss_weights, config)[0]

    arguments = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, np.int32 if a.dtype == np.int32 else np.float32),
        problem(rows, tokens, vocab_size),
    )
    text = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*arguments).compile().as_text()
    return max(int(np.prod([int(n) for n in dims.split(",")])) for dims in re.findall(r"\w+\[([\d,]+)\]", text))


def test_all_logits_never_exist_at_once():
    rows, tokens, vocab_size = 2, 64, 501
    assert largest(rows, tokens, vocab_size, rows * tokens) == rows * tokens * vocab_size  # in a single chunk they do
    assert largest(rows, tokens, vocab_size, 16) == rows * 8 * vocab_size


def test_by_default_no_more_than_half_a_gibibyte_of_logits():
    """Traced only: GPT-2's vocabulary at 4 x 1,024 tokens would be 785 MiB at once."""
    shapes = {"kernel": (6, 50257), "bias": (50257,)}
    weights = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    hidden = jax.ShapeDtypeStruct((4, 1024, 6), jnp.float32)
    targets, ones = (jax.ShapeDtypeStruct((4, 1024), dtype) for dtype in (jnp.int32, jnp.float32))
    loss = jax.value_and_grad(lambda *a: cross_entropy(head(0), *a, LossConfig())[0], (0, 1))
    text = jax.jit(loss).lower(weights, hidden, targets, ones).as_text()
    sizes = [int(np.prod([int(n) for n in dims.split("x")])) for dims in re.findall(r"tensor<([\dx]+)xf32>", text)]
    assert 50257 * 1024 < max(sizes) <= 2**27

"""Attention of some queries to many keys, a block of keys at a time, for prompts that are read in parts.

Scores of one block alone are in memory, and the softmax is kept as a running maximum and sum (Rabe and Staats,
arXiv:2112.05682, section 2). Blocks of which no query sees anything are left out: what is later, out of the window, or
not in the pattern of a block-sparse layer.

Legend: B batch, T queries, S keys, N keys of a block, H heads, G kv_heads, R = H / G, K head_dim.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from model.place import Place
from model.positions import alibi as linear_bias

BLOCK = 1024  # keys


def cached_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    queries: Place,
    keys: Place,
    see: Callable[[Place], jax.Array],
    softcap: float = 0.0,
    alibi: bool = False,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Arguments and result as `model.attention.attend`; a query in segment 0, padding, gets zero.

    Args:
      see: from the places of some of the keys, [B, N], to what the queries may see of them, [B, T, N] bool.
    """
    b, h, t, width = q.shape
    g, s = k.shape[1:3]
    size = min(BLOCK, s)
    q = q.reshape(b, g, h // g, t, width)

    def block(number: jax.Array, carry: tuple) -> tuple:
        # The last block ends with the keys, and leaves out those that the one before has had.
        start = jnp.minimum(number * size, s - size)
        here = Place(*(None if a is None else _part(a, start, size, 1) for a in keys))
        mask = see(here) & (start + jnp.arange(size) >= number * size) & (queries.segments > 0)[:, :, None]

        def add(carry: tuple) -> tuple:
            peak, total, out = carry
            scores = _einsum("bgrtk,bgsk->bgrts", q, _part(k, start, size, 2))
            scores = softcap * jnp.tanh(scores / softcap) if softcap else scores
            if alibi:
                bias = linear_bias.bias(h, queries.positions, here.positions)
                scores = scores + bias.reshape(scores.shape)
            scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
            new = jnp.maximum(peak, scores.max(-1, keepdims=True))
            weights, kept = jnp.exp(scores - new), jnp.exp(peak - new)
            values = _einsum("bgrts,bgsk->bgrtk", weights.astype(v.dtype), _part(v, start, size, 2))
            return new, total * kept + weights.sum(-1, keepdims=True), out * kept + values

        return jax.lax.cond(mask.any(), add, lambda carry: carry, carry)

    shape = (b, g, h // g, t, 1)
    peak, total = jnp.full(shape, jnp.finfo(jnp.float32).min), jnp.zeros(shape, jnp.float32)
    if sinks is not None:  # As if each query had seen one key without a value.
        peak = jnp.broadcast_to(sinks.astype(jnp.float32).reshape(g, h // g, 1, 1), shape)
        total = jnp.ones(shape, jnp.float32)
    carry = peak, total, jnp.zeros((b, g, h // g, t, width), jnp.float32)
    _, total, out = jax.lax.fori_loop(0, -(-s // size), block, carry)
    return (out / jnp.where(total > 0, total, 1.0)).reshape(b, h, t, width).astype(q.dtype)


def _part(a: jax.Array, start: jax.Array, size: int, axis: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(a, start, size, axis)


def _einsum(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)

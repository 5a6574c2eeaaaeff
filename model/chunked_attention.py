"""Causal attention in blocks of queries, each of which meets only the keys that it can see.

Half of a causal score matrix is masked; cutting the queries into blocks skips most of that half and keeps only one
block's scores in memory. The backward pass computes the scores of a block again from the saved log-sum-exp, as in
FlashAttention (arXiv:2205.14135, algorithm 4).

Legend: B batch, G kv_heads, R query heads per kv head, T tokens, C queries of a block, S keys of a block, K head_dim.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


def blocks(tokens: int, window: int) -> list[tuple[int, int, int]]:
    """(first key, first query, end) of every block of queries, at most 16 of them."""
    size = max(64, -(-tokens // 16))
    starts = range(0, tokens, size)
    return [(max(0, s - window + 1) if window else 0, s, min(s + size, tokens)) for s in starts]


def chunked_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array,
    positions: jax.Array,
    window: int = 0,
    softcap: float = 0.0,
) -> jax.Array:
    """Attention of packed rows to themselves; arguments and result as `model.attention.attend`.

    Args:
      q: [B, H, T, K]. k, v: [B, G, T, K]. segments, positions: [B, T] int32; a segment is one run of a row, in which
        positions rise by one.
    """
    b, h, t, width = q.shape
    g = k.shape[1]
    out = _attention(q.reshape(b, g, h // g, t, width), k, v, segments, positions, window, softcap)
    return out.reshape(b, h, t, width)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attention(q, k, v, segments, positions, window, softcap):
    return _forward(q, k, v, segments, positions, window, softcap)[0]


def _forward(q, k, v, segments, positions, window, softcap):
    outs, sums = [], []
    for first, start, end in blocks(q.shape[3], window):
        scores, _ = _scores(q, k, segments, positions, window, softcap, first, start, end)
        peak = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - peak)
        total = weights.sum(-1, keepdims=True)
        out = _einsum("bgrcs,bgsk->bgrck", weights.astype(v.dtype), v[:, :, first:end]) / total
        outs.append(out.astype(q.dtype))
        sums.append(peak + jnp.log(total))
    out, log_sum = jnp.concatenate(outs, 3), jnp.concatenate(sums, 3)  # [B, G, R, T, K], [B, G, R, T, 1]
    return out, (q, k, v, segments, positions, out, log_sum)


def _backward(window, softcap, saved, g):
    q, k, v, segments, positions, out, log_sum = saved
    delta = jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), -1, keepdims=True)
    dq, dk, dv = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for first, start, end in blocks(q.shape[3], window):
        scores, slope = _scores(q, k, segments, positions, window, softcap, first, start, end)
        g_block, q_block, keys = g[..., start:end, :], q[..., start:end, :], k[:, :, first:end]
        weights = jnp.exp(scores - log_sum[..., start:end, :])
        d_weights = _einsum("bgrck,bgsk->bgrcs", g_block, v[:, :, first:end])
        d_scores = weights * (d_weights - delta[..., start:end, :]) * slope
        d_scores = d_scores.astype(q.dtype)
        dv = dv.at[:, :, first:end].add(_einsum("bgrcs,bgrck->bgsk", weights.astype(g.dtype), g_block))
        dk = dk.at[:, :, first:end].add(_einsum("bgrcs,bgrck->bgsk", d_scores, q_block))
        dq.append(_einsum("bgrcs,bgsk->bgrck", d_scores, keys).astype(q.dtype))
    return jnp.concatenate(dq, 3), dk.astype(k.dtype), dv.astype(v.dtype), None, None


def _scores(q, k, segments, positions, window, softcap, first, start, end):
    """Masked scores [B, G, R, C, S] float32 of one block, and their slope with respect to q k^T."""
    scores = _einsum("bgrck,bgsk->bgrcs", q[..., start:end, :], k[:, :, first:end])
    slope = 1.0
    if softcap:
        capped = jnp.tanh(scores / softcap)
        scores, slope = softcap * capped, 1 - capped * capped
    distance = positions[:, start:end, None] - positions[:, None, first:end]
    mask = (segments[:, start:end, None] == segments[:, None, first:end]) & (distance >= 0)
    if window:
        mask &= distance < window
    return jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min), slope


def _einsum(equation, a, b):
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


_attention.defvjp(lambda q, k, v, s, p, window, softcap: _forward(q, k, v, s, p, window, softcap), _backward)

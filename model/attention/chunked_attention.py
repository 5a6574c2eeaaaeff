"""Causal attention in blocks of queries, each of which meets only the keys that it can see.

Half of a causal score matrix is masked; cutting the queries into blocks skips most of that half and keeps only one
block's scores in memory. The backward pass computes the scores of a block again from the saved log-sum-exp, as in
FlashAttention (arXiv:2205.14135, algorithm 4).

Keys may reach back before the queries (the memory of Transformer-XL): the queries are the last T of the keys' S tokens.

Legend: B batch, G kv_heads, R query heads per kv head, T queries, S keys, C queries of a block, K head_dim.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from model.positions import alibi as linear_bias

LONG = 16_384  # queries from which on blocks follow one another, for the compiler would keep the scores of several


def blocks(tokens: int, window: int, before: int = 0) -> list[tuple[int, int, int, int]]:
    """(first key, end of keys, first query, end of queries) of every block of queries, at most 16 of them.

    before: keys that stand before the first query.
    """
    size = max(64, -(-tokens // 16))
    ends = [(start, min(start + size, tokens)) for start in range(0, tokens, size)]
    return [(max(0, before + s - window + 1) if window else 0, before + e, s, e) for s, e in ends]


def chunked_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array,
    positions: jax.Array,
    window: int = 0,
    softcap: float = 0.0,
    alibi: bool = False,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Attention of packed rows to themselves; arguments and result as `model.attention.attend`.

    Args:
      q: [B, H, T, K]. k, v: [B, G, S, K]. segments, positions: [B, S] int32; a segment is one run of a row, in which
        positions rise by one.
      sinks: [H], or None.
    """
    b, h, t, width = q.shape
    g = k.shape[1]
    sinks = None if sinks is None else sinks.astype(jnp.float32).reshape(g, h // g, 1, 1)
    out = _attention(q.reshape(b, g, h // g, t, width), k, v, sinks, segments, positions, window, softcap, alibi)
    return out.reshape(b, h, t, width)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _attention(q, k, v, sinks, segments, positions, window, softcap, alibi):
    return _forward(q, k, v, sinks, segments, positions, window, softcap, alibi)[0]


def _forward(q, k, v, sinks, segments, positions, window, softcap, alibi):
    outs, sums = [], []
    in_turn = q.shape[3] > LONG
    for first, last, start, end in blocks(q.shape[3], window, k.shape[2] - q.shape[3]):
        scores, _ = _scores(q, k, segments, positions, window, softcap, alibi, first, last, start, end)
        peak = scores.max(-1, keepdims=True)
        if sinks is not None:
            peak = jnp.maximum(peak, sinks)
        weights = jnp.exp(scores - peak)
        total = weights.sum(-1, keepdims=True)
        if sinks is not None:
            total = total + jnp.exp(sinks - peak)
        out = _einsum("bgrcs,bgsk->bgrck", weights.astype(v.dtype), v[:, :, first:last]) / total
        outs.append(out.astype(q.dtype))
        sums.append(peak + jnp.log(total))
        if in_turn:
            q, outs[-1] = jax.lax.optimization_barrier((q, outs[-1]))
    out, log_sum = jnp.concatenate(outs, 3), jnp.concatenate(sums, 3)  # [B, G, R, T, K], [B, G, R, T, 1]
    return out, (q, k, v, sinks, segments, positions, out, log_sum)


def _backward(window, softcap, alibi, saved, g):
    q, k, v, sinks, segments, positions, out, log_sum = saved
    delta = jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), -1, keepdims=True)
    dq, dk, dv = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    in_turn = q.shape[3] > LONG
    # Made to wait for g: cut for the forward pass and kept, the blocks of q, k and v take several times the memory of
    # the whole, and weights that need not wait are made there and kept beside the scores.
    late_q, late_k, late_v, log_sum, g = jax.lax.optimization_barrier((q, k, v, log_sum, g))
    for first, last, start, end in blocks(q.shape[3], window, k.shape[2] - q.shape[3]):
        scores, slope = _scores(q, k, segments, positions, window, softcap, alibi, first, last, start, end)
        g_block, q_block, keys = g[..., start:end, :], late_q[..., start:end, :], late_k[:, :, first:last]
        weights = jnp.exp(scores - log_sum[..., start:end, :])
        d_weights = _einsum("bgrck,bgsk->bgrcs", g_block, late_v[:, :, first:last])
        d_scores = weights * (d_weights - delta[..., start:end, :]) * slope
        d_scores = d_scores.astype(q.dtype)
        dv = dv.at[:, :, first:last].add(_einsum("bgrcs,bgrck->bgsk", weights.astype(g.dtype), g_block))
        dk = dk.at[:, :, first:last].add(_einsum("bgrcs,bgrck->bgsk", d_scores, q_block))
        dq.append(_einsum("bgrcs,bgsk->bgrck", d_scores, keys).astype(q.dtype))
        if in_turn:
            q, dq[-1], dk, dv = jax.lax.optimization_barrier((q, dq[-1], dk, dv))
    # A sink has no value: what its weight takes away from the result is in `delta`.
    d_sinks = None if sinks is None else -(jnp.exp(sinks - log_sum) * delta).sum((0, 3), keepdims=True)[0]
    return jnp.concatenate(dq, 3), dk.astype(k.dtype), dv.astype(v.dtype), d_sinks, None, None


def _scores(q, k, segments, positions, window, softcap, alibi, first, last, start, end):
    """Masked scores [B, G, R, C, S] float32 of one block, and their slope with respect to q k^T."""
    b, g, r, t, _ = q.shape
    q_block = q[..., start:end, :]
    start, end = (k.shape[2] - t + i for i in (start, end))  # where the queries stand among the keys
    scores = _einsum("bgrck,bgsk->bgrcs", q_block, k[:, :, first:last])
    slope = 1.0
    if softcap:
        capped = jnp.tanh(scores / softcap)
        scores, slope = softcap * capped, 1 - capped * capped
    if alibi:
        bias = linear_bias.bias(g * r, positions[:, start:end], positions[:, first:last])  # [B, H, C, S]
        scores = scores + bias.reshape(b, g, r, *bias.shape[2:])
    distance = positions[:, start:end, None] - positions[:, None, first:last]
    mask = (segments[:, start:end, None] == segments[:, None, first:last]) & (distance >= 0)
    if window:
        mask &= distance < window
    return jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min), slope


def _einsum(equation, a, b):
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


_attention.defvjp(_forward, _backward)

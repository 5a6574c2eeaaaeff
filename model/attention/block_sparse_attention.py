"""Block-sparse causal attention: the newest blocks, the first ones and a few random ones (BigBird, arXiv:2007.14062).

Positions within a document are cut into blocks. A query sees, up to itself, the `newest` blocks that end with its own,
the `first` blocks of its document, and `random` older blocks, which follow from the pattern's seed and the number of
the query's block alone. So a document sees the same in a packed row, in a row of its own and in the cache of
generation. BigBird itself looks both ways; this is its causal form.

Time and memory grow linearly with the row. Every block of a row's queries gets a fixed number of blocks of keys: those
of the window as they lie in the row, and of the document that its first query is in, the first and the chosen ones.
(Documents that begin later in the block lie within its window.) Documents need not begin where blocks of the row do:
then a block of queries touches two blocks of its document, and gets what either has chosen.

Legend: B batch, H heads, G kv_heads, R = H / G, T tokens, S keys, K head_dim, C tokens of a block, M blocks of queries
that are computed at one time, P blocks of keys that each of them gets.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from model.positions import alibi as linear_bias

PARTS = 16  # a row is computed in at most so many parts; a fixed number, or gradients would take quadratic time


class SparsePattern(NamedTuple):
    """What a block-sparse layer sees."""

    block: int  # tokens of a block
    newest: int  # blocks of the window, the query's own among them
    first: int  # blocks at the beginning of the document
    random: int  # older blocks drawn for every block of queries
    seed: int


def chosen_blocks(pattern: SparsePattern, blocks: int) -> np.ndarray:
    """[blocks, random] int32: what every block of queries has drawn among those between first and newest; -1: none."""
    table = np.full((blocks, pattern.random), -1, np.int32)
    for block in range(pattern.first + pattern.newest, blocks):
        candidates = block - pattern.newest + 1 - pattern.first
        drawn = np.random.default_rng((pattern.seed, block)).choice(
            candidates, min(candidates, pattern.random), replace=False
        )
        table[block, : len(drawn)] = pattern.first + drawn
    return table


def sparse_mask(pattern: SparsePattern, queries: jax.Array, keys: jax.Array, length: int = 0) -> jax.Array:
    """[B, T, S] bool: whether the pattern lets queries at positions [B, T] see keys at positions [B, S] of a document.

    Says nothing of the future: that mask is another. No position reaches `length`; 0: S.
    """
    table = chosen_blocks(pattern, -(-(length or keys.shape[1]) // pattern.block))
    of_query, of_key = queries[:, :, None] // pattern.block, keys[:, None, :] // pattern.block
    chosen = jnp.asarray(table)[queries // pattern.block]  # [B, T, random]
    drawn = (chosen[:, :, :, None] == of_key[:, :, None, :]).any(2)
    return (of_key > of_query - pattern.newest) | (of_key < pattern.first) | drawn


def block_sparse_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array,
    positions: jax.Array,
    pattern: SparsePattern,
    softcap: float = 0.0,
    alibi: bool = False,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Attention of packed rows to themselves; arguments and result as `model.attention.attend`.

    Args:
      q: [B, H, T, K]. k, v: [B, G, T, K]. segments, positions: [B, T] int32; a segment is one run of a row, in which
        positions rise from 0 by one.
    """
    b, h, t, width = q.shape
    g, c = k.shape[1], pattern.block
    n = -(-t // c)
    parts = next(parts for parts in range(min(PARTS, n), 0, -1) if n % parts == 0)
    ends = (0, n * c - t)
    before, after = pattern.newest * c, pattern.first * c  # so that no block reaches beyond the row
    q = jnp.pad(q.reshape(b, g, h // g, t, width), ((0, 0), (0, 0), (0, 0), ends, (0, 0)))
    k, v = (jnp.pad(a, ((0, 0), (0, 0), (before, after + ends[1]), (0, 0))) for a in (k, v))
    own = [jnp.pad(a, ((0, 0), ends)) for a in (segments, positions)]
    theirs = [jnp.pad(a, ((0, 0), (before, after + ends[1])), constant_values=-1) for a in (segments, positions)]

    starts, valid = _starts(pattern, own[1].reshape(b, n, c)[:, :, 0])
    q = q.reshape(b, g, h // g, parts, n // parts, c, width)
    by_part = [a.reshape(b, parts, n // parts, -1) for a in (*own, starts + before, valid)]

    @jax.checkpoint
    def part(q: jax.Array, segments: jax.Array, positions: jax.Array, starts: jax.Array, valid: jax.Array) -> jax.Array:
        """One part's queries [B, G, R, M, C, K] -> the same, attended."""
        keys, values = (_gather(a, starts, c, 1) for a in (k, v))  # [B, M, P, G, C, K]
        key_segments, key_positions = (_gather(a, starts, c, 0) for a in theirs)  # [B, M, P, C]
        scores = jnp.einsum("bgrmck,bmpgsk->bgrmcps", q, keys, preferred_element_type=jnp.float32)
        if softcap:
            scores = softcap * jnp.tanh(scores / softcap)
        distance = positions[:, :, :, None, None] - key_positions[:, :, None, :, :]  # [B, M, C, P, C]
        if alibi:
            slopes = jnp.asarray(linear_bias.slopes(h)).reshape(g, h // g, 1, 1, 1, 1)
            scores = scores - slopes * distance[:, None, None]
        same = segments[:, :, :, None, None] == key_segments[:, :, None, :, :]
        mask = same & (distance >= 0) & _rule(pattern, positions, key_positions) & valid[:, :, None, :, None]
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
        peak = scores.max((-2, -1), keepdims=True)
        sink = None if sinks is None else sinks.astype(jnp.float32).reshape(g, h // g, 1, 1, 1, 1)
        if sink is not None:
            peak = jnp.maximum(peak, sink)
        weights = jnp.exp(scores - jax.lax.stop_gradient(peak))
        total = weights.sum((-2, -1))
        if sink is not None:
            total = total + jnp.exp(sink - jax.lax.stop_gradient(peak))[..., 0, 0]
        out = jnp.einsum("bgrmcps,bmpgsk->bgrmck", weights.astype(v.dtype), values, preferred_element_type=jnp.float32)
        return (out / total[..., None]).astype(q.dtype)

    outs = jax.lax.map(lambda x: part(*x), (jnp.moveaxis(q, 3, 0), *(jnp.moveaxis(a, 1, 0) for a in by_part)))
    return jnp.moveaxis(outs, 0, 3).reshape(b, h, n * c, width)[:, :, :t]


def _starts(pattern: SparsePattern, first: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where in the row the blocks of keys begin that each block of queries gets, [B, n, P], and which exist.

    first: [B, n], the position within its document of the first query of every block.
    """
    c, (b, n) = pattern.block, first.shape
    rows = jnp.arange(n) * c
    window = (jnp.arange(n)[:, None] - pattern.newest + jnp.arange(pattern.newest + 1)) * c  # [n, newest + 1]
    window = jnp.broadcast_to(window, (b, *window.shape))
    document = (rows - first)[..., None]  # [B, n, 1]
    beginning = document + jnp.arange(pattern.first) * c
    table = jnp.asarray(chosen_blocks(pattern, n + 1))
    drawn = jnp.concatenate([table[first // c], table[first // c + 1]], -1)  # [B, n, 2 * random]
    starts = jnp.concatenate([window, beginning, document + drawn * c], -1)
    exists = jnp.concatenate([jnp.ones_like(window), jnp.ones_like(beginning), drawn], -1) >= 0
    return jnp.where(exists, starts, 0), exists


def _rule(pattern: SparsePattern, positions: jax.Array, key_positions: jax.Array) -> jax.Array:
    """[B, M, C, P, C] bool: for which reason a key belongs to a query. No key belongs for two, or it would count twice.

    positions: [B, M, C]. key_positions: [B, M, P, C].
    """
    blocks, key_blocks = positions // pattern.block, key_positions // pattern.block
    of_query, of_key = blocks[:, :, :, None, None], key_blocks[:, :, None, :, :]
    in_window = of_key > of_query - pattern.newest
    kinds = np.repeat([0, 1, 2, 3], [pattern.newest + 1, pattern.first, pattern.random, pattern.random])[:, None]
    drawn_by = blocks[:, :, :1, None, None] + (kinds == 3)  # the document's block whose choice it is
    return jnp.where(
        kinds == 0,
        in_window,
        jnp.where(kinds == 1, (of_key < pattern.first) & ~in_window, of_query == drawn_by),
    )


def _gather(array: jax.Array, starts: jax.Array, size: int, axis: int) -> jax.Array:
    """Runs of `size` elements along `axis` of the rows of `array`, which begin at starts [B, M, P]: [B, M, P, ...]."""

    def run(row: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(row, start, size, axis)

    over_blocks = jax.vmap(jax.vmap(run, (None, 0)), (None, 0))
    return jax.vmap(over_blocks)(array, starts)

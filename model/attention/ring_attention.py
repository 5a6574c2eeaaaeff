"""Context parallelism: exact attention of packed rows whose tokens lie along a ring of devices.

Keys and values travel around the ring while each device's queries stay and keep a running softmax (Ring Attention,
arXiv:2310.01889, section 3). So that causal masking leaves every device the same work, the tokens are dealt in zig-zag
order (Llama 3, arXiv:2407.21783, section 3.3.2): a row is cut into 2 N chunks, and device i holds chunk i, its early
one, and chunk 2 N - 1 - i, its late one. Of the four pairs of chunks that two different devices can form, two are
visible: the late queries see the early keys, and

    keys from a device before:  the early queries see the early keys;
    keys from a device after:   the late queries see the late keys.

Both are chosen by an index, not by a branch, and computed in tiles, of which only one exists at a time. The backward
pass computes the scores again from the saved log-sum-exp, as FlashAttention (arXiv:2205.14135, algorithm 4) does, while
the gradients of keys and values travel with them.

Legend: N devices of the ring, B batch, H heads, G kv_heads, R = H / G, T tokens (inside the ring those of one device),
L tokens of a tile, C tokens of a chunk, K head_dim.
"""

from __future__ import annotations

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from model.attention.chunked_attention import chunked_attention
from tpu.errors import UserError
from tpu.rules import RULES, constrain, devices_along

LARGEST_TILE = 512
HIDDEN = float(np.finfo(np.float32).min)
(AXIS,) = RULES["sequence"]
QUERIES = PartitionSpec(None, None, None, AXIS)  # [B, G, R, T, K] and [B, G, R, T]
KEYS = PartitionSpec(None, None, AXIS)  # [B, G, T, K]
PLACE = PartitionSpec(None, AXIS)  # [B, T]


def zigzag(tokens: int, parts: int) -> np.ndarray:
    """The order [tokens] int that deals rows to a ring of `parts` devices: `x[:, zigzag(x.shape[1], parts)]`.

    Its `argsort` undoes it. Raises UserError where the tokens cannot be cut into 2 * parts chunks.
    """
    chunk = _chunk(tokens, parts)
    early, late = np.split(np.arange(tokens).reshape(2 * parts, chunk), 2)
    return np.stack([early, late[::-1]], 1).ravel()


def _chunk(tokens: int, parts: int) -> int:
    if tokens % (2 * parts):
        raise UserError(f"{tokens} tokens along a ring of {parts} devices: needs a multiple of {2 * parts}")
    return tokens // (2 * parts)


def ring_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array,
    positions: jax.Array,
    window: int = 0,
    softcap: float = 0.0,
) -> jax.Array:
    """Attention of packed rows to themselves, with the tokens cut along the mesh axis of "sequence".

    Call it inside `jax.jit` under `jax.set_mesh`; it may lie inside a `shard_map` over other axes. Batch and heads keep
    the layout that they have.

    Args:
      q: [B, H, T, K]. k, v: [B, G, T, K], with G dividing H. Any float dtype; softmax and sums are in float32.
      segments, positions: [B, T] int32; in the order of the text, a segment is one run of a row, in which positions
        rise by one.
      window, softcap: as `model.attention.attend`.

    All five have their tokens in the order of `zigzag`: in any other, visible keys are left out. Tiles are squares of
    the largest divisor of T / 2N up to 512; a small one is slow.

    Returns:
      [B, H, T, K] in q's dtype, in the same order. On a mesh without a ring (N = 1) it is `chunked_attention`, whose
      order is the same.

    Raises UserError where 2 N does not divide T.
    """
    b, h, t, width = q.shape
    g, parts = k.shape[1], devices_along("sequence")
    if parts == 1:
        return chunked_attention(q, k, v, segments, positions, window, softcap)
    _chunk(t, parts)
    if h % (heads := devices_along("activation_heads")) == 0:
        # Key/value heads that the devices along the heads would share become one for each: its gradient is then summed
        # over these devices once, not once for each tile.
        copies = math.lcm(g, heads) // g
        axes = ("batch", "activation_heads", "sequence", "head_dim")
        k, v = (constrain(jnp.repeat(x, copies, 1), *axes) for x in (k, v))
        g *= copies
    out = _attention(q.reshape(b, g, h // g, t, width), k, v, segments, positions, window, softcap)
    return out.reshape(b, h, t, width)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attention(q, k, v, segments, positions, window, softcap):
    return _forward(q, k, v, segments, positions, window, softcap)[0]


def _forward(q, k, v, segments, positions, window, softcap):
    local = functools.partial(_local_forward, window=window, softcap=softcap)
    specs = (QUERIES, KEYS, KEYS, PLACE, PLACE)
    out, log_sum = _on_the_ring(local, specs, (QUERIES, QUERIES))(q, k, v, segments, positions)
    out, log_sum = checkpoint_name(out, "attention"), checkpoint_name(log_sum, "attention")
    return out, (q, k, v, segments, positions, out, log_sum)


def _backward(window, softcap, saved, d_out):
    q, k, v, segments, positions, out, log_sum = saved
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), -1)  # [B, G, R, T]
    local = functools.partial(_local_backward, window=window, softcap=softcap)
    specs = (QUERIES, KEYS, KEYS, PLACE, PLACE, QUERIES, QUERIES, QUERIES)
    gradients = _on_the_ring(local, specs, (QUERIES, KEYS, KEYS))
    return *gradients(q, k, v, segments, positions, log_sum, delta, d_out), None, None


_attention.defvjp(_forward, _backward)


def _on_the_ring(local, in_specs, out_specs):
    # The mesh is the one in use, whose axes an enclosing shard_map may have made manual.
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, axis_names={AXIS}, check_vma=False)


def _local_forward(q, k, v, segments, positions, *, window, softcap):
    """One device's queries against all keys: out [B, G, R, T, K] and the log-sum-exp of its scores [B, G, R, T]."""
    size = _tile_size(q.shape[3])

    def meet(block, state, query, key):
        _, _, v_tile, scores, _ = _scores(q, segments, positions, block, query, key, size, window, softcap)
        out, peak, total = (_cut(x, 3, query, size) for x in state)
        new_peak = jnp.maximum(peak, scores.max(-1))
        weights, shrink = jnp.exp(scores - new_peak[..., None]), jnp.exp(peak - new_peak)
        out = out * shrink[..., None] + _einsum("bgrls,bgsk->bgrlk", weights.astype(v.dtype), v_tile)
        found = out, new_peak, total * shrink + weights.sum(-1)
        return tuple(_put(x, y, 3, query) for x, y in zip(state, found, strict=True))

    def visit(tiles, block, state):
        return _fold(functools.partial(meet, block), state, tiles), ()

    # What a query gathers before a key that it can see (itself, at home) vanishes then, because shrink is 0.
    state = jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:-1], HIDDEN), jnp.zeros(q.shape[:-1], jnp.float32)
    (out, peak, total), _ = _travel(visit, (k, v, segments, positions), state, (), window)
    return (out / total[..., None]).astype(q.dtype), peak + jnp.log(total)


def _local_backward(q, k, v, segments, positions, log_sum, delta, d_out, *, window, softcap):
    """One device's gradients for q, k and v; delta [B, G, R, T] is the sum of out * d_out over K."""
    size = _tile_size(q.shape[3])

    def meet(block, state, query, key):
        q_tile, k_tile, v_tile, scores, slope = _scores(
            q, segments, positions, block, query, key, size, window, softcap
        )
        d_out_tile, log_sum_tile, delta_tile = (_cut(x, 3, query, size) for x in (d_out, log_sum, delta))
        weights = jnp.exp(scores - log_sum_tile[..., None])
        d_weights = _einsum("bgrlk,bgsk->bgrls", d_out_tile, v_tile)
        d_scores = (weights * (d_weights - delta_tile[..., None]) * slope).astype(q.dtype)
        dq, dk, dv = state
        return (
            _add(dq, _einsum("bgrls,bgsk->bgrlk", d_scores, k_tile), 3, query),
            _add(dk, _einsum("bgrls,bgrlk->bgsk", d_scores, q_tile), 2, key),
            _add(dv, _einsum("bgrls,bgrlk->bgsk", weights.astype(d_out.dtype), d_out_tile), 2, key),
        )

    def visit(tiles, block, dq):
        dq, dk, dv = _fold(functools.partial(meet, block), (dq, zeros, zeros), tiles)
        return dq, (dk, dv)

    zeros = jnp.zeros(k.shape, jnp.float32)
    block, dq = (k, v, segments, positions), jnp.zeros(q.shape, jnp.float32)
    dq, (dk, dv) = _travel(visit, block, dq, (zeros, zeros), window)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


def _travel(visit, block, state, sums, window):
    """Takes `block`, and the `sums` of what is found for it, around the ring until every device has met every block.

    `visit(tiles, block, state) -> state, addends` meets one block. Blocks outside every query's window are jumped over.
    Two transfers start before the visit during which they run: of the block that comes next, and of the sums for the
    present block, which lack only this visit's addends.

    Returns the state and, back on the device they belong to, the sums.
    """
    parts, index = jax.lax.axis_size(AXIS), jax.lax.axis_index(AXIS)
    chunk = block[0].shape[2] // 2
    shifts = _shifts(parts, chunk, window)
    hops = [b - a for a, b in itertools.pairwise(shifts)]

    def step(carry, shift, came, goes):
        block, state, sums = carry
        next_block, sums = _pass_on(block, goes), _pass_on(sums, came)
        state, addends = visit(_tiles(index, shift, parts, chunk, window, home=came == 0), block, state)
        return (next_block, state, jax.tree.map(jnp.add, sums, addends)), None

    carry = block, state, sums
    steps = zip(shifts, [0, *hops], [*hops, 0], strict=True)
    for (came, goes), run in itertools.groupby(steps, lambda step: step[1:]):
        run = np.array([shift for shift, _, _ in run], np.int32)
        carry, _ = jax.lax.scan(functools.partial(step, came=came, goes=goes), carry, run)
    _, state, sums = carry
    return state, _pass_on(sums, (parts - shifts[-1]) % parts)


def _shifts(parts: int, chunk: int, window: int) -> list[int]:
    """How far, along the ring, the blocks that some query can see are from home, ascending from 0."""
    reach = (window - 2) // chunk + 1 if window else parts  # in chunks
    return [s for s in range(parts) if s <= reach or parts - s <= reach]


def _pass_on(tree, hop):
    """What the device `hop` before this one holds."""
    if hop == 0:
        return tree
    parts = jax.lax.axis_size(AXIS)
    ring = [(i, (i + hop) % parts) for i in range(parts)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, AXIS, ring), tree)


def _tile_size(tokens: int) -> int:
    """The largest divisor of a chunk (half of a device's tokens) that is at most LARGEST_TILE."""
    chunk = tokens // 2
    return next(size for size in range(min(chunk, LARGEST_TILE), 0, -1) if chunk % size == 0)


def _tiles(index, shift, parts, chunk, window, home):
    """Where device `index` meets the block at `shift`: [tiles] first query, first key, and, with a window, if near."""
    size = _tile_size(2 * chunk)
    every = np.indices((chunk // size,) * 2, np.int32).reshape(2, -1) * size  # [2, tiles of a pair of chunks]
    late_early = every + np.array([[chunk], [0]], np.int32)
    if home:
        causal = every[:, every[0] >= every[1]]
        query, key = np.concatenate([causal, late_early, causal + chunk], 1)
    else:
        after = (shift > index).astype(np.int32)
        query, key = jnp.concatenate([late_early, every + after * chunk], 1)
    if not window:
        return query, key, None
    distance = _row(index, query, parts, chunk) - _row((index - shift) % parts, key, parts, chunk)
    return query, key, distance - (size - 1) < window


def _row(device, token, parts, chunk):
    """Where in the order of the text a device's token stands."""
    return token + chunk * jnp.where(token < chunk, device, 2 * (parts - 1) - device)


def _fold(meet, state, tiles):
    """The state after `meet(state, query, key)` for every tile that is near."""

    def step(state, tile):
        query, key, near = tile
        if near is None:
            return meet(state, query, key), None
        return jax.lax.cond(near, meet, lambda state, *_: state, state, query, key), None

    return jax.lax.scan(step, state, tiles)[0]


def _scores(q, segments, positions, block, query, key, size, window, softcap):
    """One tile: q [B, G, R, L, K], k and v [B, G, L, K], masked scores [B, G, R, L, L] and their slope in q k^T."""
    queries = [_cut(x, 1, query, size) for x in (segments, positions)]
    keys = [_cut(x, 1, key, size) for x in block[2:]]
    q, k, v = _cut(q, 3, query, size), *(_cut(x, 2, key, size) for x in block[:2])
    scores, slope = _einsum("bgrlk,bgsk->bgrls", q, k), 1.0
    if softcap:
        capped = jnp.tanh(scores / softcap)
        scores, slope = softcap * capped, 1 - capped * capped
    distance = queries[1][:, :, None] - keys[1][:, None, :]
    mask = (queries[0][:, :, None] == keys[0][:, None, :]) & (distance >= 0)
    if window:
        mask &= distance < window
    return q, k, v, jnp.where(mask[:, None, None], scores, HIDDEN), slope


def _einsum(equation, a, b):
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _cut(x, axis, start, size):
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis)


def _put(x, tile, axis, start):
    return jax.lax.dynamic_update_slice_in_dim(x, tile, start, axis)


def _add(x, tile, axis, start):
    return _put(x, _cut(x, axis, start, tile.shape[axis]) + tile, axis, start)

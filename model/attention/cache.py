"""The key-value cache of generation: explicit state, passed in and handed back.

Legend: B rows, S slots (the longest sequence a row may reach), G kv_heads, K head_dim.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from model.attention.linear_attention import state_shape
from model.config import ModelConfig
from model.place import Place


class Cache(NamedTuple):
    """What a row has seen. The token at position p of a row lies in slot p.

    "local" layers hold no more tokens than their window, as a ring, and linear layers a state of fixed size.
    """

    slots: Place  # [B, S]: segment 1 where a slot is written, 0 elsewhere; position = slot number
    # {"layer_i": (keys, values)} per group of layers, [B, G, S, K] each, of "local" ones min(window, S) slots, or of
    # linear layers the state [B, G, K, V]:
    # stacked, or a list when unrolled; with model.fusion.streams as a list of its "parts", and "streams" of their own
    layers: Any


def parts(config: ModelConfig) -> list[tuple[int, int]]:
    """The runs of groups of layers that connections to other streams separate (`streams`): first, end of each."""
    if config.fusion not in ("co", "tangled"):
        return []
    groups, count = config.layers // len(config.pattern), config.vision.connections
    return [(0, groups - count), *((i, i + 1) for i in range(groups - count, groups))]


def empty_cache(config: ModelConfig, rows: int, slots: int) -> Cache:
    """A cache with nothing in it: keys and values in the compute dtype, states of linear layers in float32."""
    groups = config.layers // len(config.pattern)

    def layer(kind: str, lead: tuple[int, ...]) -> Any:
        if kind in ("linear", "gated_linear"):
            return jnp.zeros(lead + state_shape(config, kind, rows), jnp.float32)
        length = min(config.window, slots) if kind == "local" else slots
        shape = (*lead, rows, config.kv_heads, length, config.head_dim)
        return jnp.zeros(shape, config.compute_dtype), jnp.zeros(shape, config.compute_dtype)

    def group(lead: tuple[int, ...]) -> dict[str, Any]:
        return {f"layer_{i}": layer(kind, lead) for i, kind in enumerate(config.pattern)}

    def part(size: int) -> Any:
        return [group(()) for _ in range(size)] if config.layer_loop == "unroll" else group((size,))

    ends = parts(config)
    layers: Any = part(groups)
    if ends:
        vision, streams = config.vision, [None] * (len(ends) - 1)
        if config.fusion == "tangled":  # Its connections attend to the text, and have keys and values of their own.
            own = (rows, vision.connection_heads, slots, vision.connection_dim // vision.connection_heads)
            streams = [((jnp.zeros(own, config.compute_dtype),) * 2, None) for _ in streams]
        layers = {"parts": [part(last - first) for first, last in ends], "streams": streams}
    positions = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), (rows, slots))
    return Cache(Place(jnp.zeros((rows, slots), jnp.int32), positions), layers)


def row_axes(layers: Any) -> Any:
    """Which dimension of each array of a cache's `layers` is that of the rows; alike in structure."""
    if isinstance(layers, dict) and "parts" in layers:
        streams = jax.tree.map(lambda _: 0, layers["streams"])
        return {"parts": [row_axes(part) for part in layers["parts"]], "streams": streams}
    return jax.tree.map(lambda _: 0 if isinstance(layers, list) else 1, layers)


def write_slots(slots: Place, place: Place) -> Place:
    """Marks the slots at `place.positions` [B, T] with `place.segments` (1: a token, 0: padding)."""
    rows = jnp.arange(slots.segments.shape[0])[:, None]
    blocks = None
    if place.blocks is not None:
        blocks = jnp.zeros_like(slots.segments).at[rows, place.positions].set(place.blocks)
    return Place(slots.segments.at[rows, place.positions].set(place.segments), slots.positions, blocks)


Held = tuple[jax.Array, jax.Array]  # keys and values of one layer, [B, G, S, K] each


def extend(
    cached: Held | None, k: jax.Array, v: jax.Array, place: Place, slots: Place | None, window: int = 0
) -> tuple[jax.Array, jax.Array, Place, Held | None]:
    """What tokens with the keys and values k, v [B, G, T, K] of one layer attend to, and the cache with them in it.

    Args:
      cached: of the layer; None without a cache.
      place: of the tokens, which follow one another; those of segment 0, at the end, are padding.
      slots: of the cache, with these tokens marked; None where nothing is before them, so that they see each other
        alone, or where `place` is no part of a row.
      window: of a "local" layer, whose cache is a ring; 0: it holds every token.

    Returns keys, values and their places, and the new cache.
    """
    if cached is None:
        return k, v, place if slots is None else slots, None
    if window:
        return _extend_ring(cached, k, v, place, slots is None)
    new = write(cached, k, v, place.positions)
    return (k, v, place, new) if slots is None else (*new, slots, new)


def _extend_ring(
    cached: Held, k: jax.Array, v: jax.Array, place: Place, alone: bool
) -> tuple[jax.Array, jax.Array, Place, Held]:
    """As `extend`, for a ring of N slots, of which number p mod N holds the token at position p, the newest of such."""
    size, first = cached[0].shape[2], place.positions[:, :1]  # [B, 1]
    real = place.segments > 0
    if k.shape[2] == 1 and not alone:
        new = write(cached, k, v, jnp.where(real, place.positions % size, size))  # Beyond the end nothing is written.
        return *new, held(size, first + 1), new
    after = held(size, first + real.sum(1, keepdims=True))
    index = after.positions - first  # [B, N], which of these tokens lies in each slot; below 0 an earlier one
    written = (index >= 0)[:, None, :, None]
    index = jnp.maximum(index, 0)[:, None, :, None]
    new = tuple(
        jnp.where(written, jnp.take_along_axis(a, index, axis=2).astype(old.dtype), old)
        for old, a in zip(cached, (k, v), strict=True)
    )
    if alone:
        return k, v, place, new
    k, v = (jnp.concatenate([old, a.astype(old.dtype)], axis=2) for old, a in zip(cached, (k, v), strict=True))
    before = held(size, first)
    if place.blocks is not None:  # What is in the cache belongs to no block of these tokens.
        before = before._replace(blocks=jnp.zeros_like(before.segments))
    return k, v, jax.tree.map(lambda *both: jnp.concatenate(both, axis=1), before, place), new


def held(size: int, end: jax.Array) -> Place:
    """The places [B, N] of what a ring of N = `size` slots holds when tokens before the position `end` [B, 1] are read.

    A slot that holds none yet has a position below zero, and segment 0.
    """
    positions = end - 1 - (end - 1 - jnp.arange(size, dtype=jnp.int32)) % size
    return Place((positions >= 0).astype(jnp.int32), positions)


def write(cached: Held, k: jax.Array, v: jax.Array, positions: jax.Array) -> Held:
    """Puts keys and values k, v [B, G, T, K] of one layer into the slots `positions` [B, T] of cached [B, G, S, K].

    Several positions of a row follow one another, and all have a slot; a single one may have none, and is left out.
    """
    b, g, t, width = k.shape
    # Heads as rows: what is written to is then found by the leading dimensions, and the cache stays where it is. With
    # the heads between row and slot, XLA moves the whole cache into another order and back for every token.
    rows, at = jnp.arange(b * g)[:, None], jnp.repeat(positions, g, axis=0)  # [B * G, T]

    def put(slots: jax.Array, new: jax.Array) -> jax.Array:
        if t > 1:
            at_once = jax.vmap(lambda row, part, start: jax.lax.dynamic_update_slice_in_dim(row, part, start, axis=1))
            return at_once(slots, new.astype(slots.dtype), positions[:, 0])
        flat = slots.reshape(b * g, -1, width).at[rows, at].set(new.reshape(b * g, t, width).astype(slots.dtype))
        return flat.reshape(slots.shape)

    return put(cached[0], k), put(cached[1], v)

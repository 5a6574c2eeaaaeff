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
    """What a row has seen. The token at position p of a row lies in slot p."""

    slots: Place  # [B, S]: segment 1 where a slot is written, 0 elsewhere; position = slot number
    # {"layer_i": (keys, values)} per group of layers, [B, G, S, K] each, or of linear layers the state [B, G, K, V]:
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
    shape = (rows, config.kv_heads, slots, config.head_dim)
    groups = config.layers // len(config.pattern)

    def layer(kind: str, lead: tuple[int, ...]) -> Any:
        if kind in ("linear", "gated_linear"):
            return jnp.zeros(lead + state_shape(config, kind, rows), jnp.float32)
        return jnp.zeros(lead + shape, config.compute_dtype), jnp.zeros(lead + shape, config.compute_dtype)

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


def write_slots(slots: Place, place: Place) -> Place:
    """Marks the slots at `place.positions` [B, T] with `place.segments` (1: a token, 0: padding)."""
    rows = jnp.arange(slots.segments.shape[0])[:, None]
    blocks = None
    if place.blocks is not None:
        blocks = jnp.zeros_like(slots.segments).at[rows, place.positions].set(place.blocks)
    return Place(slots.segments.at[rows, place.positions].set(place.segments), slots.positions, blocks)


def write(
    cached: tuple[jax.Array, jax.Array], k: jax.Array, v: jax.Array, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Puts keys and values k, v [B, G, T, K] of one layer into the slots `positions` [B, T] of cached [B, G, S, K]."""
    b, g, t, width = k.shape
    # Heads as rows: what is written to is then found by the leading dimensions, and the cache stays where it is. With
    # the heads between row and slot, XLA moves the whole cache into another order and back for every token.
    rows = jnp.arange(b * g)[:, None]
    positions = jnp.repeat(positions, g, axis=0)  # [B * G, T]

    def put(slots: jax.Array, new: jax.Array) -> jax.Array:
        flat = slots.reshape(b * g, -1, width).at[rows, positions].set(new.reshape(b * g, t, width).astype(slots.dtype))
        return flat.reshape(slots.shape)

    return put(cached[0], k), put(cached[1], v)

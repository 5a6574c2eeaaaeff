"""The memory of training and evaluation: what layers keep of earlier rows, as explicit state of the step.

Rows of consecutive batches continue the same documents (`data.contiguous`), and every layer hands over to the next row
what its kind needs: the hidden states that came into it, of which it makes keys and values anew (Transformer-XL,
arXiv:1901.02860, section 3.2), normalised keys and values to search in (`knn_attention`), or the state of linear
attention. No gradient flows into it. Positions count on from row to row, so that the turns of rotary keys and ALiBi's
distances are right whatever lies between. What belongs to another document, or to a row that is not the one before,
is never seen.

Legend: B rows, L tokens of memory, M of them that Transformer-XL layers see, N that kNN layers search, T tokens of a
row, D embed_dim, G kv_heads, K head_dim.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from model.attention.linear_attention import state_shape
from model.config import ModelConfig
from model.place import Place


class Hidden(NamedTuple):
    """What came into a layer: the memory of Transformer-XL."""

    states: jax.Array  # [B, M, D]

    def followed_by(self, h: jax.Array) -> Hidden:
        """The memory after a row whose hidden states are h [B, T, D]."""
        return Hidden(newest(self.states, h, 1))


class Pairs(NamedTuple):
    """Keys of length 1, not turned by rotary positions, and values: the memory of a kNN layer."""

    keys: jax.Array  # [B, G, N, K]
    values: jax.Array  # [B, G, N, K]

    def followed_by(self, k: jax.Array, v: jax.Array) -> Pairs:
        """The memory after a row with keys and values k, v [B, G, T, K]."""
        return Pairs(newest(self.keys, k, 2), newest(self.values, v, 2))


class Memory(NamedTuple):
    """What rows remember. Rows come first everywhere, so that batch and memory are cut alike."""

    place: Place  # [B, L]: segment 1 for tokens of the document in which the last row ended, 0 for others
    layers: Any  # {"layer_i": Hidden, Pairs, state of linear attention or None}, every array [B, groups, ...]


def newest(old: jax.Array, new: jax.Array, axis: int) -> jax.Array:
    """The last elements along an axis of both together, as many as `old` has; constants of a differentiation."""
    both = jnp.concatenate([old, jax.lax.stop_gradient(new).astype(old.dtype)], axis)
    return jax.lax.slice_in_dim(both, new.shape[axis], both.shape[axis], axis=axis)


def empty_memory(config: ModelConfig, rows: int) -> Memory:
    """A memory with nothing in it."""
    groups = config.layers // len(config.pattern)

    def layer(kind: str) -> Any:
        if kind == "knn":
            shape = (rows, groups, config.kv_heads, config.knn_memory, config.head_dim)
            return Pairs(*(jnp.zeros(shape, config.compute_dtype) for _ in range(2)))
        if kind in ("linear", "gated_linear"):
            state = state_shape(config, kind, rows)
            return jnp.zeros((rows, groups, *state[1:]), jnp.float32)
        if not config.memory:
            return None
        return Hidden(jnp.zeros((rows, groups, config.memory, config.embed_dim), config.compute_dtype))

    length = max(config.memory, config.knn_memory)
    nowhere = Place(jnp.zeros((rows, length), jnp.int32), jnp.full((rows, length), -1, jnp.int32))
    return Memory(nowhere, {f"layer_{i}": layer(kind) for i, kind in enumerate(config.pattern)})


def recall(memory: Memory, place: Place, unroll: bool) -> tuple[Place, Any]:
    """What rows at `place` [B, T] find: the places [B, L + T] of memory and row, and the layers as `Stack` takes them.

    A row that does not go on where the one before it ended finds nothing.
    """
    old = memory.place
    goes_on = (old.segments[:, -1] == 1) & (old.positions[:, -1] + 1 == place.positions[:, 0])  # [B]
    seen = goes_on[:, None] & (old.segments == 1)
    segments = jnp.where(seen, place.segments[:, :1], -1)
    slots = Place(*(jnp.concatenate(both, 1) for both in zip((segments, old.positions), place[:2], strict=True)))

    def enter(a: jax.Array) -> jax.Array:
        return jnp.where(goes_on.reshape(-1, *[1] * (a.ndim - 1)), a, 0).swapaxes(0, 1)  # [groups, B, ...]

    layers = jax.tree.map(enter, memory.layers)
    if not unroll:
        return slots, layers
    groups = jax.tree.leaves(layers)[0].shape[0]
    return slots, [jax.tree.map(lambda a: a[i], layers) for i in range(groups)]


def remember(slots: Place, layers: Any, tokens: int) -> Memory:
    """The memory after rows of so many `tokens`: `slots` from `recall`, `layers` as `Stack` gives them back."""
    last = slots.segments[:, -1:]
    segments = ((slots.segments == last) & (last > 0)).astype(jnp.int32)
    if isinstance(layers, list):
        layers = jax.tree.map(lambda *parts: jnp.stack(parts), *layers)
    layers = jax.tree.map(lambda a: jax.lax.stop_gradient(a).swapaxes(0, 1), layers)
    return Memory(Place(segments[:, tokens:], slots.positions[:, tokens:]), layers)

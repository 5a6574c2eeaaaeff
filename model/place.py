"""Where tokens stand: their document and position, and which of them another may see."""

from __future__ import annotations

from typing import NamedTuple

import jax


class Place(NamedTuple):
    """Where tokens stand: segments [B, T] and positions inside them [B, T], both int32.

    `blocks` [B, T] int32, where there are any, number tokens that see each other both ways; 0 is in no block.
    """

    segments: jax.Array
    positions: jax.Array
    blocks: jax.Array | None = None


def visible(queries: Place, keys: Place, window: int, causal: bool = True) -> jax.Array:
    """[B, T, S] bool: whether each query may attend to each key; window 0 means no limit.

    Without `causal` a query sees all keys of its segment, and `window` is not looked at.
    """
    if not causal:
        return queries.segments[:, :, None] == keys.segments[:, None, :]
    distance = queries.positions[:, :, None] - keys.positions[:, None, :]
    together = queries.segments[:, :, None] == keys.segments[:, None, :]
    seen = distance >= 0
    if queries.blocks is not None:
        blocks = queries.blocks[:, :, None]
        seen |= (blocks == keys.blocks[:, None, :]) & (blocks > 0)
    return together & seen & (distance < window) if window else together & seen

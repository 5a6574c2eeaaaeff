"""T5's relative positions: a learned number per head and distance, added to the scores (arXiv:1910.10683, section 2.1).

Near distances have a number each, farther ones share by logarithmically growing buckets, and one bucket holds all
from `relative_distance` on. In an encoder earlier and later keys have different buckets; a decoder sees earlier only.

Legend: B batch, T queries, S keys, H heads.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from model.config import ModelConfig
from model.linear import initializer, look_up, parameter


def buckets(count: int, farthest: int, causal: bool) -> np.ndarray:
    """The bucket of every key position minus query position from -farthest to farthest: [2 * farthest + 1] int32."""
    distance = np.arange(-farthest, farthest + 1)
    side = 0 if causal else (distance > 0) * (count // 2)
    count = count if causal else count // 2
    behind = np.maximum(-distance, 0) if causal else np.abs(distance)
    exact = count // 2
    # In float32, as the original: rounding decides on which side of a border a distance falls.
    beyond = np.log(np.maximum(behind, 1).astype(np.float32) / np.float32(exact))
    far = exact + (beyond / np.float32(math.log(farthest / exact)) * np.float32(count - exact)).astype(np.int32)
    return (side + np.where(behind < exact, behind, np.minimum(far, count - 1))).astype(np.int32)


class RelativeBias(nnx.Module):
    """The table [buckets, H], one for all layers of an encoder or decoder."""

    def __init__(self, config: ModelConfig, causal: bool, rngs: nnx.Rngs):
        draw, shape = initializer(config), (config.relative_buckets, config.heads)
        self.embedding = parameter(
            rngs, shape, ("positions", "heads"), config.weight_dtype, lambda key, s: draw(key, s, *s)
        )
        self.buckets, self.farthest, self.causal = config.relative_buckets, config.relative_distance, causal

    def __call__(self, queries: jax.Array, keys: jax.Array) -> jax.Array:
        """Positions [B, T] and [B, S] int32 -> bias [B, H, T, S] float32."""
        by_distance = look_up(self.embedding.get_value(), buckets(self.buckets, self.farthest, self.causal))
        distance = jnp.clip(keys[:, None, :] - queries[:, :, None], -self.farthest, self.farthest)
        return by_distance.astype(jnp.float32)[distance + self.farthest].transpose(0, 3, 1, 2)

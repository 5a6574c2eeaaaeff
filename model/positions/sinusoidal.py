"""Positions added to the embedding: the sinusoidal table of the Transformer (arXiv:1706.03762, section 3.5)."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def sinusoidal(positions: jax.Array, embed_dim: int) -> jax.Array:
    """positions [B, T] int32 -> [B, T, embed_dim] float32: sin(p / 10000^(2i/D)) at 2i, the cosine at 2i + 1."""
    frequencies = 10_000.0 ** (-jnp.arange(0, embed_dim, 2, dtype=jnp.float32) / embed_dim)
    angles = positions[..., None].astype(jnp.float32) * frequencies[None, None]  # [B, T, D / 2]
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(*positions.shape, embed_dim)

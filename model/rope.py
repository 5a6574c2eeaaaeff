"""Rotary position embedding (RoFormer, arXiv:2104.09864, section 3.2), in the half-split layout of GPT-NeoX and Llama.

Legend: B batch, T tokens, H heads, K head_dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rotation(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of position * theta^(-2i/K) for positions [B, T]: two [B, T, 1, K / 2] float32 arrays."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos_sin: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns each pair (x[i], x[i + K/2]) of x [B, T, H, K] by its position's angle (equation 34); keeps the dtype."""
    cos, sin = cos_sin
    cos, sin = jnp.concatenate([cos, cos], -1), jnp.concatenate([-sin, sin], -1)
    return (x * cos + jnp.roll(x, x.shape[-1] // 2, -1) * sin).astype(x.dtype)

"""The stream of vectors that blocks read from and add to."""

from __future__ import annotations

import jax

from tpu.rules import constrain


def residual(h: jax.Array) -> jax.Array:
    """Lays out the residual stream [B, T, D]: its tokens lie along the tensor axis too, and so do norms and dropout."""
    return constrain(h, "batch", "residual_sequence", "activation_embed")

"""Attention with linear biases (ALiBi, arXiv:2108.12409): a score falls in proportion to the distance of its key.

Legend: B batch, T queries, S keys, H heads.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np


def slopes(heads: int) -> np.ndarray:
    """[H] float32: how much each head loses per token of distance (section 3).

    For H a power of two the geometric sequence from 2^(-8/H) with that ratio. For other H, as the authors' code does
    it, that of the power of two below, then every other one of the power above.
    """
    whole = 2 ** math.floor(math.log2(heads))
    first = [2 ** (-8 * (i + 1) / whole) for i in range(whole)]
    between = [2 ** (-8 * (2 * i + 1) / (2 * whole)) for i in range(heads - whole)]
    return np.array(first + between, np.float32)


def bias(heads: int, queries: jax.Array, keys: jax.Array) -> jax.Array:
    """[B, H, T, S] float32 to add to the scores of queries at positions [B, T] and keys at positions [B, S]."""
    distance = jnp.abs(queries[:, None, :, None] - keys[:, None, None, :]).astype(jnp.float32)
    return -slopes(heads)[:, None, None] * distance

"""Attention on NVIDIA GPUs by cuDNN's flash kernels, through `jax.nn.dot_product_attention`.

Legend: B batch, H heads, G kv_heads, T tokens, K head_dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def cudnn_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, window: int = 0, causal: bool = True
) -> jax.Array:
    """Attention of packed rows to themselves; arguments and result as `model.attention.attend`, operands of 16 bits.

    Rows that hold a single document take the kernel's own causal mask, which skips what is masked; packed ones give
    it the mask of every pair of tokens, [B, 1, T, T].

    Args:
      q: [B, H, T, K]. k, v: [B, G, T, K]. segments: [B, T] int32, runs in which positions rise by one.
    """
    q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))
    limits = {"is_causal": causal, "scale": 1.0, "local_window_size": (window - 1, 0) if window else None}
    limits["implementation"] = "cudnn"

    def packed() -> jax.Array:
        same = segments[:, None, :, None] == segments[:, None, None, :]
        return jax.nn.dot_product_attention(q, k, v, mask=same, **limits)

    def whole() -> jax.Array:
        return jax.nn.dot_product_attention(q, k, v, **limits)

    return jax.lax.cond(jnp.all(segments == segments[:, :1]), whole, packed).swapaxes(1, 2)

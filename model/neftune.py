"""Noise on the embeddings of a model that is fine-tuned, against over-fitting (NEFTune, arXiv:2310.05914, algorithm 1).

Legend: B rows, T tokens, D embed_dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def embedding_noise(h: jax.Array, alpha: float, segments: jax.Array, keys: jax.Array | None) -> jax.Array:
    """h [B, T, D] plus noise that is uniform within alpha / sqrt(L D), where L is the row's length without padding.

    Args:
      segments: [B, T] int32; 0 is padding.
      keys: [B] typed random keys, one a row, so that its noise does not depend on its batch; without them h is
        returned.
    """
    if keys is None or alpha == 0.0:
        return h
    lengths = jnp.maximum((segments > 0).sum(axis=1), 1)  # [B]
    draw = lambda key: jax.random.uniform(key, h.shape[1:], minval=-1.0, maxval=1.0)  # noqa: E731
    scale = alpha / jnp.sqrt(lengths * jnp.float32(h.shape[-1]))  # [B]
    return h + (scale[:, None, None] * jax.vmap(draw)(keys)).astype(h.dtype)

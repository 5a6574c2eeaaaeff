"""Losses over all pairs of a batch's images and texts: CLIP's and SigLIP's.

On a mesh the batch is the global one: the products of all images with all texts are one matrix, whose rows are divided
among the devices, so every device meets the negatives of all.

Legend: B rows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def contrastive_sums(logits: jax.Array, weights: jax.Array, similarity: str) -> tuple[jax.Array, jax.Array]:
    """Sums over the rows of the loss (nats) and of how often the right one is the best, mean of both directions.

    Args:
      logits: [B, B] float32, images by texts; row i belongs to column i.
      weights: [B] float32, 1, or 0 for a row that is padding: it is nobody's negative either.
      similarity: "softmax": the mean of the cross-entropies over texts and over images (arXiv:2103.00020, figure 3).
        "sigmoid": -sum over j of log sigmoid(z_ij logit_ij), z = 1 on the diagonal and -1 elsewhere (arXiv:2303.15343,
        section 3.2).
    """
    there, itself = weights > 0, jnp.eye(len(logits), dtype=bool)
    # Padding sees itself: a row that sees nothing would sum to minus infinity, which times no weight is not a number.
    masked = jnp.where((there[:, None] & there[None]) | itself, logits, jnp.finfo(jnp.float32).min)
    own = jnp.diagonal(logits)
    best = (jnp.argmax(masked, 0) == jnp.arange(len(logits))) * 0.5 + (
        jnp.argmax(masked, 1) == jnp.arange(len(logits))
    ) * 0.5
    if similarity == "softmax":
        loss = (jax.nn.logsumexp(masked, 0) + jax.nn.logsumexp(masked, 1)) / 2 - own
    else:
        signs = jnp.where(itself, 1.0, -1.0)
        loss = jnp.where(there[None], jax.nn.softplus(-signs * logits), 0.0).sum(1)
    return jnp.sum(loss * weights), jnp.sum(best * weights)

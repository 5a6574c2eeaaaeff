"""Dropout (JMLR 15:1929) with one explicit key per row, so that what a row loses does not depend on its batch.

Splitting a batch into micro-batches, sending them through a pipeline or sharding them changes no mask.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def dropout(x: jax.Array, rate: float, keys: jax.Array | None) -> jax.Array:
    """Zeroes elements of x [B, ...] with probability `rate` and scales the rest by 1 / (1 - rate).

    Args:
      keys: [B] typed random keys; without them x is returned.
    """
    if keys is None or rate == 0.0:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


def row_keys(key: jax.Array, rows: int) -> jax.Array:
    """[rows] keys of a batch's rows."""
    return fold_in(jnp.broadcast_to(key, (rows,)), jnp.arange(rows))


def fold_in(keys: jax.Array | None, data: jax.Array | int) -> jax.Array | None:
    """New keys [B] from keys [B] and a number, one or for each; None stays None."""
    if keys is None:
        return None
    return jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(jnp.asarray(data), keys.shape))

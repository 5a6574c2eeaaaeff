"""The one door to attention: what may see what, the plain reference, and the choice of an implementation.

A token may attend to a key of the same segment whose position is not later than its own and, in a local layer, less
than `window` positions earlier. The same rule serves packed training rows and the cache of generation, where a key is
in segment 0 until it is written.

Legend: B batch, T queries, S keys, H heads, G kv_heads, R = H / G, K head_dim.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from model.chunked_attention import chunked_attention
from model.dropout import dropout


class Place(NamedTuple):
    """Where tokens stand: segments [B, T] and positions inside them [B, T], both int32."""

    segments: jax.Array
    positions: jax.Array


def visible(queries: Place, keys: Place, window: int) -> jax.Array:
    """[B, T, S] bool: whether each query may attend to each key; window 0 means no limit."""
    distance = queries.positions[:, :, None] - keys.positions[:, None, :]
    allowed = (queries.segments[:, :, None] == keys.segments[:, None, :]) & (distance >= 0)
    return allowed & (distance < window) if window else allowed


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    queries: Place,
    keys: Place,
    *,
    kind: str,
    window: int = 0,
    softcap: float = 0.0,
    dropout_rate: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """Scaled dot-product attention (arXiv:1706.03762, equation 1) with grouped keys and values.

    Args:
      q: [B, H, T, K]. k, v: [B, G, S, K], with G dividing H. Any float dtype; the softmax is in float32.
      queries, keys: places of the T queries and the S keys.
      kind: "plain" or "chunked". Chunked needs queries and keys to be the same rows and has no dropout; where that
        does not hold the plain form is taken.
      window: keys a query sees, itself included; 0 for all.
      softcap: 0, or the cap c of c * tanh(score / c).
      dropout_rate, key: dropout of the attention weights; no key, no dropout.

    Returns:
      [B, H, T, K] in q's dtype. A query that may see nothing gets the mean of all values.
    """
    with_dropout = key is not None and dropout_rate > 0.0
    if kind == "chunked" and queries is keys and not with_dropout:
        return chunked_attention(q, k, v, queries.segments, queries.positions, window, softcap)
    return plain_attention(q, k, v, visible(queries, keys, window), softcap, dropout_rate, key)


def plain_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    softcap: float = 0.0,
    dropout_rate: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """The reference: every score at once, [B, H, T, S] float32. Arguments as `attend`, mask [B, T, S] bool."""
    b, h, t, width = q.shape
    g = k.shape[1]
    q = q.reshape(b, g, h // g, t, width)
    if t == 1:  # Generation: with the keys on the left XLA:CPU reads the cache as it lies.
        scores = jnp.einsum("bgsk,bgrtk->bgsrt", k, q, preferred_element_type=jnp.float32).transpose(0, 1, 3, 4, 2)
    else:
        scores = jnp.einsum("bgrtk,bgsk->bgrts", q, k, preferred_element_type=jnp.float32)
    scores = scores * width**-0.5
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = dropout(jax.nn.softmax(scores, axis=-1), dropout_rate, key)
    out = jnp.einsum("bgrts,bgsk->bgrtk", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return out.reshape(b, h, t, width).astype(q.dtype)

"""The one door to attention: what may see what, the plain reference, and the choice of an implementation.

A token may attend to a key of the same segment whose position is not later than its own and, in a local layer, less
than `window` positions earlier. The same rule serves packed training rows and the cache of generation, where a key is
in segment 0 until it is written.

Legend: B batch, T queries, S keys, H heads, G kv_heads, R = H / G, K head_dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from model.chunked_attention import chunked_attention
from model.cudnn_attention import cudnn_attention
from model.dropout import dropout
from model.ring_attention import ring_attention
from model.splash_attention import LANES, splash_attention
from tpu import rules


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
    context_parallel: str = "ring",
) -> jax.Array:
    """Scaled dot-product attention (arXiv:1706.03762, equation 1) with grouped keys and values.

    Args:
      q: [B, H, T, K], already scaled by 1 / sqrt(K), which costs less where it is made. k, v: [B, G, S, K], with G
        dividing H. Any float dtype; the softmax is in float32.
      queries, keys: places of the T queries and the S keys.
      kind: "plain", "chunked", "splash" (TPU) or "cudnn" (GPU). All but plain need queries and keys to be the same
        rows and have no dropout; where that does not hold the plain form is taken.
      window: keys a query sees, itself included; 0 for all.
      softcap: 0, or the cap c of c * tanh(score / c).
      dropout_rate, key: dropout of the attention weights by [B] keys; no key, no dropout.
      context_parallel: where the mesh cuts rows along the sequence: "ring" rotates keys and values past the queries,
        whose rows must lie in zig-zag order (`model.ring_attention`); "ulysses" (arXiv:2309.14509) exchanges, so that
        every device gets whole rows of some of the heads.

    Returns:
      [B, H, T, K] in q's dtype. A query that may see nothing gets the mean of all values.
    """
    with_dropout = key is not None and dropout_rate > 0.0
    if kind == "plain" or queries is not keys or with_dropout:
        return plain_attention(q, k, v, visible(queries, keys, window), softcap, dropout_rate, key)
    heads = "activation_heads"
    if rules.devices_along("sequence") > 1:
        if context_parallel == "ring":
            return ring_attention(q, k, v, queries.segments, queries.positions, window, softcap)
        heads = "ulysses_heads"
        q, k, v = (rules.constrain(a, "batch", heads, "activation_embed", "head_dim") for a in (q, k, v))
    if kind == "splash" and q.shape[2] % LANES == 0:
        kernel = functools.partial(splash_attention, window=window, softcap=softcap)
        out = _on_each_device(kernel, heads, q, k, v, queries.segments)
    elif kind == "cudnn" and q.dtype != jnp.float32 and not softcap:
        out = _on_each_device(functools.partial(cudnn_attention, window=window), heads, q, k, v, queries.segments)
    else:
        out = chunked_attention(q, k, v, queries.segments, queries.positions, window, softcap)
    return rules.constrain(out, "batch", "activation_heads", "sequence", "head_dim")


def _on_each_device(
    kernel: Callable[..., jax.Array], heads: str, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array
) -> jax.Array:
    """Runs a kernel on each device's rows and heads, because the compiler cannot divide a kernel's call itself.

    `heads` is the logical axis that the heads of q [B, H, T, K] lie along.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return kernel(q, k, v, segments)
    spec, shared = (
        rules.partition_spec(("batch", heads, "activation_embed", "head_dim"), mesh, a.shape) for a in (q, k)
    )
    if spec != shared:  # Fewer key/value heads than devices for them: each query head gets a copy of its own.
        k, v = (jnp.repeat(a, q.shape[1] // k.shape[1], axis=1) for a in (k, v))
    rows = rules.partition_spec(("batch", "activation_embed"), mesh, segments.shape)
    each = jax.shard_map(
        kernel,
        mesh=mesh,
        in_specs=(spec, spec, spec, rows),
        out_specs=spec,
        axis_names=rules.free_axes(mesh),
        check_vma=False,
    )
    return each(q, k, v, segments)


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
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = dropout(jax.nn.softmax(scores, axis=-1), dropout_rate, key)
    out = jnp.einsum("bgrts,bgsk->bgrtk", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return out.reshape(b, h, t, width).astype(q.dtype)

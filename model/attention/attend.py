"""The one door to attention: what may see what, the plain reference, and the choice of an implementation.

A token may attend to a key of the same segment whose position is not later than its own and, in a local layer, less
than `window` positions earlier; block-sparse layers see less (`block_sparse_attention`). The same rule serves
packed training rows and the cache of generation, where a key is in segment 0 until it is written. Encoders and
cross-attention hide nothing but other segments; tokens of one block see each other too (prefixes, images).

Legend: B batch, T queries, S keys, H heads, G kv_heads, R = H / G, K head_dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from model.attention.block_sparse_attention import SparsePattern, block_sparse_attention, sparse_mask
from model.attention.cached_attention import cached_attention
from model.attention.chunked_attention import chunked_attention
from model.attention.cudnn_attention import cudnn_attention
from model.attention.ring_attention import ring_attention
from model.attention.splash_attention import LANES, splash_attention
from model.dropout import dropout
from model.place import Place, visible
from model.positions import alibi as linear_bias
from tpu import rules as layouts


class Rules(NamedTuple):
    """How queries meet keys.

    Attributes:
      kind: "plain", "chunked", "splash" (TPU) or "cudnn" (GPU). All but plain need `same` and have no dropout; without
        `same`, several queries meet the keys a block at a time (`cached_attention`); what else they do not know takes
        the plain form.
      window: keys a query sees, itself included; 0 for all.
      softcap: 0, or the cap c of c * tanh(score / c).
      causal: whether later keys are hidden; without it "chunked" takes the plain form.
      bias: [1 or B, H, T, S] float32, added to the scores before they are masked; it takes the plain form.
      alibi: whether scores fall with the distance (`model.positions.alibi`).
      sinks: [H], the logit of a key without a value that every query sees (gpt-oss, arXiv:2508.10925), or None.
      sparse: what a block-sparse layer sees, or None; it excludes a window.
      same: whether the T queries stand where the last T of the S keys do; S - T keys of memory may be before them.
    """

    kind: str
    window: int = 0
    softcap: float = 0.0
    causal: bool = True
    bias: jax.Array | None = None
    alibi: bool = False
    sinks: jax.Array | None = None
    sparse: SparsePattern | None = None
    same: bool = False


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    queries: Place,
    keys: Place,
    rules: Rules,
    dropout_rate: float = 0.0,
    key: jax.Array | None = None,
    context_parallel: str = "ring",
) -> jax.Array:
    """Scaled dot-product attention (arXiv:1706.03762, equation 1) with grouped keys and values.

    Args:
      q: [B, H, T, K], already scaled by 1 / sqrt(K), which costs less where it is made. k, v: [B, G, S, K], with G
        dividing H. Any float dtype; the softmax is in float32.
      queries, keys: places of the T queries and the S keys.
      dropout_rate, key: dropout of the attention weights by [B] keys; no key, no dropout.
      context_parallel: where the mesh cuts rows along the sequence: "ring" rotates keys and values past the queries,
        whose rows must lie in zig-zag order (`ring_attention`); "ulysses" (arXiv:2309.14509) exchanges, so that
        every device gets whole rows of some of the heads.

    Returns:
      [B, H, T, K] in q's dtype. A query that may see nothing gets a mean of values, or zero.
    """
    kind, window, softcap, causal, bias, alibi, sinks, sparse, same = rules
    with_dropout = key is not None and dropout_rate > 0.0
    whole = bias is not None or (kind == "chunked" and not causal) or queries.blocks is not None
    if kind == "plain" or with_dropout or whole or (not same and q.shape[2] == 1):
        if alibi:
            bias = linear_bias.bias(q.shape[1], queries.positions, keys.positions)
        return plain_attention(q, k, v, seen(queries, keys, rules), softcap, dropout_rate, key, bias, sinks)
    if not same:
        see = functools.partial(seen, queries, rules=rules, length=keys.positions.shape[1])
        return cached_attention(q, k, v, queries, keys, see, softcap, alibi, sinks)
    if sparse is not None:
        return block_sparse_attention(q, k, v, *keys[:2], sparse, softcap, alibi, sinks)
    heads = "activation_heads"
    if layouts.devices_along("sequence") > 1:
        if context_parallel == "ring":
            return ring_attention(q, k, v, queries.segments, queries.positions, window, softcap)
        heads = "ulysses_heads"
        q, k, v = (layouts.constrain(a, "batch", heads, "activation_embed", "head_dim") for a in (q, k, v))
    flash = not alibi and q.shape[2] == k.shape[2]
    if kind == "splash" and flash and q.shape[2] % LANES == 0:
        kernel = functools.partial(splash_attention, window=window, softcap=softcap, causal=causal)
        out = _on_each_device(kernel, heads, q, k, v, queries.segments, sinks)
    elif kind == "cudnn" and flash and q.dtype != jnp.float32 and not softcap and sinks is None:
        kernel = functools.partial(cudnn_attention, window=window, causal=causal)
        out = _on_each_device(kernel, heads, q, k, v, queries.segments)
    elif not causal:
        out = plain_attention(q, k, v, seen(queries, keys, rules), softcap, sinks=sinks)
    else:
        out = chunked_attention(q, k, v, *keys[:2], window, softcap, alibi, sinks)
    return layouts.constrain(out, "batch", "activation_heads", "sequence", "head_dim")


def seen(queries: Place, keys: Place, rules: Rules, length: int = 0) -> jax.Array:
    """[B, T, S] bool: what each query may see of the keys, which may be a part of `length` in all."""
    mask = visible(queries, keys, rules.window, rules.causal)
    if rules.sparse is None:
        return mask
    return mask & sparse_mask(rules.sparse, queries.positions, keys.positions, length)


def _on_each_device(
    kernel: Callable[..., jax.Array],
    heads: str,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array,
    *sinks: jax.Array | None,
) -> jax.Array:
    """Runs a kernel on each device's rows and heads, because the compiler cannot divide a kernel's call itself.

    `heads` is the logical axis that the heads of q [B, H, T, K] lie along, and those of sinks [H] where they are given.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return kernel(q, k, v, segments, *sinks)
    spec, shared = (
        layouts.partition_spec(("batch", heads, "activation_embed", "head_dim"), mesh, a.shape) for a in (q, k)
    )
    if spec != shared:  # Fewer key/value heads than devices for them: each query head gets a copy of its own.
        k, v = (jnp.repeat(a, q.shape[1] // k.shape[1], axis=1) for a in (k, v))
    rows = layouts.partition_spec(("batch", "activation_embed"), mesh, segments.shape)
    each = jax.shard_map(
        kernel,
        mesh=mesh,
        in_specs=(spec, spec, spec, rows, *(jax.sharding.PartitionSpec(spec[1]) for _ in sinks)),
        out_specs=spec,
        axis_names=layouts.free_axes(mesh),
        check_vma=False,
    )
    return each(q, k, v, segments, *sinks)


def plain_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    softcap: float = 0.0,
    dropout_rate: float = 0.0,
    key: jax.Array | None = None,
    bias: jax.Array | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """The reference: every score at once, [B, H, T, S] float32.

    Arguments as `attend`; mask [B, T, S] bool, bias [B, H, T, S] float32, added to the scores, or None.
    """
    b, h, t, width = q.shape
    g = k.shape[1]
    q = q.reshape(b, g, h // g, t, width)
    if t == 1:  # Generation: with the keys on the left XLA:CPU reads the cache as it lies.
        scores = jnp.einsum("bgsk,bgrtk->bgsrt", k, q, preferred_element_type=jnp.float32).transpose(0, 1, 3, 4, 2)
    else:
        scores = jnp.einsum("bgrtk,bgsk->bgrts", q, k, preferred_element_type=jnp.float32)
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.reshape(-1, g, h // g, *bias.shape[2:])
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = dropout(softmax(scores, sinks), dropout_rate, key)
    out = jnp.einsum("bgrts,bgsk->bgrtk", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return out.reshape(b, h, t, width).astype(q.dtype)


def softmax(scores: jax.Array, sinks: jax.Array | None) -> jax.Array:
    """The softmax of scores [B, G, R, T, S] float32 over S and, where there are sinks [H], the sink of each head."""
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    sink = sinks.astype(jnp.float32).reshape(*scores.shape[1:3], 1, 1)
    sink = jnp.broadcast_to(sink, (*scores.shape[:-1], 1))
    return jax.nn.softmax(jnp.concatenate([scores, sink], -1), axis=-1)[..., :-1]

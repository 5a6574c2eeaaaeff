"""Attention to the row and to the nearest of many earlier keys (Memorizing Transformers, arXiv:2203.08913, section 3).

Queries and keys have length 1 and a learned scale per head, so that keys of different ages can be compared (section
3.2). Every query takes the `model.knn_neighbours` remembered keys of its document that are most like it, and one
softmax covers them and the keys of the row; the paper mixes the results of two by a learned gate, and the scale of the
scores does that work here. Remembered keys have no position: they were stored before rotary positions turn them.

The search compares with every remembered key, which on accelerators costs less than an index would.

Without a memory, as in generation, whose cache holds every key, the layer is ordinary attention.

Legend: B batch, T tokens, D embed_dim, H heads, G kv_heads, R = H / G, N remembered keys, K head_dim.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from model.attention import cache as kv_cache
from model.attention.attend import Rules, attend
from model.attention.layer_inputs import LayerInputs
from model.attention.memory import Pairs
from model.config import ModelConfig
from model.linear import Linear, parameter, together
from model.place import Place, visible
from model.positions import alibi as linear_bias
from model.positions.rope import rotate
from tpu.rules import constrain

SCALE = 10.0  # of scores, before anything is learned


class KNNAttention(nnx.Module):
    """A layer's attention of the kind "knn", called as `model.block.SelfAttention` is."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        embed, head_dim = (config.embed_dim, "embed"), (config.head_dim, "head_dim")
        heads, kv_heads = (config.heads, "heads"), (config.kv_heads, "kv_heads")
        self.query = Linear(config, (embed,), (heads, head_dim), config.attention_bias, rngs)
        self.key = Linear(config, (embed,), (kv_heads, head_dim), config.attention_bias, rngs)
        self.value = Linear(config, (embed,), (kv_heads, head_dim), config.attention_bias, rngs)
        out_bias = config.attention_bias and config.attention_out_bias
        self.out = Linear(config, (heads, head_dim), (embed,), out_bias, rngs, residual=True)
        self.rope_interleaved = config.rope_interleaved
        self.log_scale = parameter(
            rngs, (config.heads,), ("norm",), config.weight_dtype, lambda key, shape: jnp.full(shape, math.log(SCALE))
        )
        self.neighbours = min(config.knn_neighbours, config.knn_memory)
        self.kind = config.attention
        self.alibi = config.positions == "alibi"

    def __call__(self, x: jax.Array, inputs: LayerInputs, cached: Any, key: jax.Array | None) -> tuple[jax.Array, Any]:
        """x [B, T, D] -> ([B, T, D], `cached` with this row's keys and values); a cache, `Pairs` or None."""
        place, slots, rotation = inputs.place, inputs.slots, inputs.rotation
        q, k, v = together(x, self.query, self.key, self.value)  # [B, T, H, K], [B, T, G, K] twice
        q, k = _unit(q), _unit(k)
        q = q * jnp.exp(self.log_scale.get_value().astype(jnp.float32))[:, None].astype(q.dtype)
        plain = q, k
        if rotation is not None:
            turn = jax.tree.map(lambda a: a[:, -x.shape[1] :], rotation["global"])
            q, k = (rotate(a, turn, self.rope_interleaved) for a in (q, k))
        q, k, v, plain_q, plain_k = (
            constrain(a.swapaxes(1, 2), "batch", "activation_heads", "sequence", "head_dim") for a in (q, k, v, *plain)
        )
        if isinstance(cached, Pairs):
            out = self._joint(q, k, v, plain_q, place, slots, cached)
            cached = cached.followed_by(plain_k, v)
        else:
            k, v, keys, cached = kv_cache.extend(cached, k, v, place, slots)
            out = attend(q, k, v, place, keys, Rules(self.kind, alibi=self.alibi, same=slots is None))
        return checkpoint_name(self.out(out.swapaxes(1, 2)), "out"), cached

    def _joint(
        self, q: jax.Array, k: jax.Array, v: jax.Array, plain_q: jax.Array, place: Place, slots: Place, memory: Pairs
    ) -> jax.Array:
        """One softmax over the row's keys k [B, G, T, K] and the nearest of the memory: [B, H, T, K] in q's dtype."""
        b, h, t, width = q.shape
        g, n = memory.keys.shape[1:3]
        q, plain_q = (a.reshape(b, g, h // g, t, width) for a in (q, plain_q))
        near = jnp.einsum("bgrtk,bgsk->bgrts", q, k, preferred_element_type=jnp.float32)
        far = jnp.einsum("bgrtk,bgsk->bgrts", plain_q, memory.keys, preferred_element_type=jnp.float32)
        if self.alibi:
            near = near + linear_bias.bias(h, place.positions, place.positions).reshape(near.shape)
        lowest = jnp.finfo(jnp.float32).min
        old = slots.segments[:, -n - t : -t]  # [B, N]
        same = place.segments[:, :, None] == old[:, None, :]
        near = jnp.where(visible(place, place, 0)[:, None, None], near, lowest)
        far = jnp.where(same[:, None, None], far, lowest)
        nearest = jax.lax.top_k(jax.lax.stop_gradient(far), self.neighbours)[0][..., -1:]  # the last that is taken
        far = jnp.where((far >= nearest) & same[:, None, None], far, lowest)
        weights = jax.nn.softmax(jnp.concatenate([near, far], -1), axis=-1).astype(v.dtype)
        values = jnp.concatenate([v, memory.values.astype(v.dtype)], 2)  # [B, G, T + N, K]
        out = jnp.einsum("bgrts,bgsk->bgrtk", weights, values, preferred_element_type=jnp.float32)
        return out.reshape(b, h, t, width).astype(q.dtype)


def _unit(x: jax.Array) -> jax.Array:
    """x [..., K] at length 1, in its dtype."""
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.square(y).sum(-1, keepdims=True) + 1e-6)).astype(x.dtype)

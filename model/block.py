"""One layer of the transformer: self-attention and a feed-forward block around a residual stream.

Legend: B batch, T tokens, D embed_dim, H heads, G kv_heads, K head_dim.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from model import cache as kv_cache
from model.attention import Place, attend
from model.config import ModelConfig
from model.dropout import dropout, fold_in
from model.linear import Linear, together
from model.mlp import MLP
from model.norms import Norm
from model.rope import rotate
from tpu.rules import constrain


class SelfAttention(nnx.Module):
    """Multi-head, grouped-query or multi-query attention of a layer of the given kind ("global" or "local")."""

    def __init__(self, config: ModelConfig, kind: str, rngs: nnx.Rngs):
        embed, head_dim = (config.embed_dim, "embed"), (config.head_dim, "head_dim")
        heads, kv_heads = (config.heads, "heads"), (config.kv_heads, "kv_heads")
        self.query = Linear(config, (embed,), (heads, head_dim), config.attention_bias, rngs)
        self.key = Linear(config, (embed,), (kv_heads, head_dim), config.attention_bias, rngs)
        self.value = Linear(config, (embed,), (kv_heads, head_dim), config.attention_bias, rngs)
        self.out = Linear(config, (heads, head_dim), (embed,), config.attention_bias, rngs, residual=True)
        self.query_norm = Norm(config, config.head_dim, "norm", rngs, "rmsnorm") if config.qk_norm else None
        self.key_norm = Norm(config, config.head_dim, "norm", rngs, "rmsnorm") if config.qk_norm else None
        self.window = config.window if kind == "local" else 0
        self.kind, self.context_parallel = config.attention, config.context_parallel
        self.softcap = config.attention_softcap
        self.dropout_rate = config.attention_dropout

    def __call__(
        self, x: jax.Array, place: Place, slots: Place | None, rotation: Any, cached: Any, key: jax.Array | None
    ) -> tuple[jax.Array, Any]:
        """x [B, T, D] -> ([B, T, D], the cache with this call's keys and values written).

        Args:
          place: of the T tokens. slots: of the cache's keys, None without a cache.
          rotation: `model.rope.rotation` of the positions, or None.
          cached: (keys, values) [B, G, S, K], or None.
          key: [B] keys for dropout, or None.
        """
        q, k, v = together(x, self.query, self.key, self.value)  # [B, T, H, K], [B, T, G, K] twice
        if self.query_norm is not None:
            q, k, v = named(q, k, v)  # The gradient of a norm needs what it was given.
            q, k = self.query_norm(q), self.key_norm(k)
        scale = q.shape[-1] ** -0.5
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        q = q * scale
        q, k, v = (constrain(a.swapaxes(1, 2), "batch", "activation_heads", "sequence", "head_dim") for a in (q, k, v))
        if self.query_norm is None:
            q, k, v = named(q, k, v)
        keys = place
        if cached is not None:
            cached = k, v = kv_cache.write(cached, k, v, place.positions)
            keys = slots
        out = attend(
            q,
            k,
            v,
            place,
            keys,
            kind=self.kind,
            window=self.window,
            softcap=self.softcap,
            dropout_rate=self.dropout_rate,
            key=key,
            context_parallel=self.context_parallel,
        )
        return checkpoint_name(self.out(out.swapaxes(1, 2)), "out"), cached


def named(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
    """The same, under the names by which a rematerialisation policy saves them (`model.stack.REMAT`)."""
    return tuple(checkpoint_name(a, name) for a, name in ((q, "query"), (k, "key"), (v, "value")))


class Block(nnx.Module):
    """Attention, then feed-forward; normalised before each (GPT-2) or after each sum (the original Transformer)."""

    def __init__(self, config: ModelConfig, kind: str, rngs: nnx.Rngs):
        self.attention_norm = Norm(config, config.embed_dim, "norm", rngs)
        self.attention = SelfAttention(config, kind, rngs)
        self.mlp_norm = Norm(config, config.embed_dim, "norm", rngs)
        self.mlp = MLP(config, rngs)
        self.norm_first = config.norm_order == "pre"
        self.dropout_rate = config.residual_dropout

    def __call__(
        self, h: jax.Array, place: Place, slots: Place | None, rotation: Any, cached: Any, key: jax.Array | None
    ) -> tuple[jax.Array, Any]:
        """h [B, T, D] -> ([B, T, D], cache); arguments as `SelfAttention`."""
        keys = [fold_in(key, i) for i in range(3)]
        with jax.named_scope("attention"):
            x = self.attention_norm(h) if self.norm_first else h
            out, cached = self.attention(x, place, slots, rotation, cached, keys[0])
            h = h + dropout(residual(out), self.dropout_rate, keys[1])
            h = h if self.norm_first else self.attention_norm(h)
        with jax.named_scope("mlp"):
            out = self.mlp(self.mlp_norm(h) if self.norm_first else h)
            h = h + dropout(residual(out), self.dropout_rate, keys[2])
            h = h if self.norm_first else self.mlp_norm(h)
        return residual(h), cached


def residual(h: jax.Array) -> jax.Array:
    """Lays out the residual stream [B, T, D]: its tokens lie along the tensor axis too, and so do norms and dropout."""
    return constrain(h, "batch", "residual_sequence", "activation_embed")

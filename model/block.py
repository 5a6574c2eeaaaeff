"""One layer of the transformer: self-attention and a feed-forward block around a residual stream.

Legend: B batch, T tokens, D embed_dim, H heads, G kv_heads, K head_dim.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from model import cache as kv_cache
from model.attention import Place, attend, visible
from model.block_sparse_attention import SparsePattern
from model.bottleneck import Bottleneck
from model.config import ModelConfig
from model.cross_attention import CrossAttention
from model.dropout import dropout, fold_in
from model.knn_attention import KNNAttention
from model.layer_inputs import LayerInputs
from model.linear import Linear, parameter, together, zeros
from model.linear_attention import LinearAttention
from model.memory import Hidden
from model.mlp import MLP
from model.moe import MoE, Routing
from model.norms import Norm
from model.prefix import Prefix
from model.rope import rotate
from tpu.rules import constrain


class SelfAttention(nnx.Module):
    """Multi-head, grouped-query or multi-query attention of a layer of the kind "global", "local" or "sparse"."""

    def __init__(self, config: ModelConfig, kind: str, rngs: nnx.Rngs):
        embed, head_dim = (config.embed_dim, "embed"), (config.head_dim, "head_dim")
        heads, kv_heads = (config.heads, "heads"), (config.kv_heads, "kv_heads")
        self.scale = (config.query_scalar or config.head_dim) ** -0.5
        start = config.head_dim**-0.5 / self.scale  # Scores start as large as they do with the usual scale.
        bias = config.attention_bias and config.attention_qkv_bias
        self.query = Linear(config, (embed,), (heads, head_dim), bias, rngs, start=start)
        self.key = Linear(config, (embed,), (kv_heads, head_dim), bias, rngs)
        self.value = Linear(config, (embed,), (kv_heads, head_dim), bias, rngs)
        out_bias = config.attention_bias and config.attention_out_bias
        self.out = Linear(config, (heads, head_dim), (embed,), out_bias, rngs, residual=True)
        self.norm_whole = config.qk_norm_over == "projection"
        sizes = (config.head_dim * (n if self.norm_whole else 1) for n in (config.heads, config.kv_heads))
        norms = [Norm(config, size, "norm", rngs, "rmsnorm") if config.qk_norm else None for size in sizes]
        self.query_norm, self.key_norm = norms
        self.prefix = Prefix(config, rngs) if config.prefix_tokens else None
        # Zero, a sink weighs as much as a key whose score is 0.
        self.sinks = (
            parameter(rngs, (config.heads,), ("norm",), config.weight_dtype, zeros) if config.attention_sinks else None
        )
        self.alibi = config.positions == "alibi"
        self.layer_kind, self.rope_interleaved = kind, config.rope_interleaved
        self.window = config.window if kind == "local" else 0
        self.sparse = None
        if kind == "sparse":
            fields = (config.sparse_block, config.sparse_newest, config.sparse_first, config.sparse_random)
            self.sparse = SparsePattern(*fields, config.sparse_seed)
        self.kind, self.context_parallel = config.attention, config.context_parallel
        self.softcap = config.attention_softcap
        self.dropout_rate = config.attention_dropout
        self.causal = config.kind != "encoder"

    def __call__(
        self, x: jax.Array, inputs: LayerInputs, cached: Any = None, key: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        """x [B, T, D] -> ([B, T, D], the cache with this call's keys and values written).

        Args:
          cached: (keys, values) [B, G, S, K]; or, normalised, the memory of the layer, whose places and the tokens'
            are `inputs.slots` then; or None.
          key: [B] keys for dropout, or None.
        """
        place, slots, rotation = inputs.place, inputs.slots, inputs.rotation
        q, k, v = together(x, self.query, self.key, self.value)  # [B, T, H, K], [B, T, G, K] twice
        own = isinstance(cached, Hidden)
        if own:
            earlier = together(cached.states, self.key, self.value)
            k, v = (jnp.concatenate(both, 1) for both in zip(earlier, (k, v), strict=True))
        if self.query_norm is not None:
            q, k, v = named(q, k, v)  # The gradient of a norm needs what it was given.
            q, k = self._normalized(self.query_norm, q), self._normalized(self.key_norm, k)
        if rotation is not None:
            turn = rotation.get(self.layer_kind, rotation["global"])
            of_q, of_k = (jax.tree.map(lambda a: a[:, -n:], turn) for n in (q.shape[1], k.shape[1]))
            q = rotate(q, of_q, self.rope_interleaved)
            k = k if "keys" in rotation else rotate(k, of_k, self.rope_interleaved)
        q = q * self.scale
        q, k, v = (constrain(a.swapaxes(1, 2), "batch", "activation_heads", "sequence", "head_dim") for a in (q, k, v))
        if self.query_norm is None:
            q, k, v = named(q, k, v)
        keys = place if slots is None else slots
        if own:
            keys = Place(*(a[:, -k.shape[2] :] for a in slots[:2]))
        elif cached is not None:
            cached = k, v = kv_cache.write(cached, k, v, place.positions)
        if rotation is not None and "keys" in rotation:
            k = rotate(k.swapaxes(1, 2), rotation["keys"], self.rope_interleaved).swapaxes(1, 2)
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
            causal=self.causal,
            bias=inputs.bias,
            alibi=self.alibi,
            sinks=None if self.sinks is None else self.sinks.get_value(),
            sparse=self.sparse,
            own=own,
        )
        if self.prefix is not None:
            out = self.prefix(out, q, k, visible(place, keys, self.window))
        return checkpoint_name(self.out(out.swapaxes(1, 2)), "out"), cached

    def _normalized(self, norm: Norm, x: jax.Array) -> jax.Array:
        """x [B, T, H, K] normalised over K, or over H and K together."""
        return norm(x.reshape(*x.shape[:2], -1)).reshape(x.shape) if self.norm_whole else norm(x)


def named(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
    """The same, under the names by which a rematerialisation policy saves them (`model.stack.REMAT`)."""
    return tuple(checkpoint_name(a, name) for a, name in ((q, "query"), (k, "key"), (v, "value")))


class Block(nnx.Module):
    """Attention, then feed-forward, each a branch beside the residual stream.

    Normalised before each branch ("pre", GPT-2), after each sum ("post", the original Transformer), before and after
    each branch ("sandwich", Gemma 2, arXiv:2408.00118) or after it alone ("reordered", OLMo 2, arXiv:2501.00656).
    """

    def __init__(self, config: ModelConfig, kind: str, rngs: nnx.Rngs, mixture: bool = False):
        first, last = config.norm_order != "reordered", config.norm_order in ("sandwich", "reordered")
        self.attention_norm = Norm(config, config.embed_dim, "norm", rngs) if first else None
        if kind in ("linear", "gated_linear"):
            self.attention = LinearAttention(config, kind, rngs)
        else:
            self.attention = KNNAttention(config, rngs) if kind == "knn" else SelfAttention(config, kind, rngs)
        self.attention_out_norm = Norm(config, config.embed_dim, "norm", rngs) if last else None
        cross = config.kind == "encoder_decoder"
        self.cross_norm = Norm(config, config.embed_dim, "norm", rngs) if cross else None
        self.cross = CrossAttention(config, rngs) if cross else None
        self.mlp_norm = Norm(config, config.embed_dim, "norm", rngs) if first else None
        self.mlp = None if mixture else MLP(config, rngs)
        self.moe = MoE(config, rngs) if mixture else None
        self.mlp_out_norm = Norm(config, config.embed_dim, "norm", rngs) if last else None
        self.attention_adapter = Bottleneck(config, rngs) if config.bottleneck_dim else None
        self.mlp_adapter = Bottleneck(config, rngs) if config.bottleneck_dim else None
        self.norm_first, self.norm_sum = config.norm_order in ("pre", "sandwich"), config.norm_order == "post"
        self.dropout_rate = config.residual_dropout

    def __call__(
        self, h: jax.Array, inputs: LayerInputs, cached: Any = None, key: jax.Array | None = None
    ) -> tuple[jax.Array, Any, Routing | None]:
        """h [B, T, D] -> ([B, T, D], cache, what the router of a mixture did); arguments as `SelfAttention`.

        With cross-attention the cache is (keys, values), and from the first call on the source's keys and values too.
        """
        keys = [fold_in(key, i) for i in range(3)]
        cached, held = (cached, None) if self.cross is None or cached is None else (cached[:2], cached[2:])
        with jax.named_scope("attention"):
            x = self.attention_norm(h) if self.norm_first else h
            remembered = cached
            if isinstance(cached, Hidden):
                cached = Hidden(self.attention_norm(cached.states)) if self.norm_first else cached
            out, cached = self.attention(x, inputs, cached, keys[0])
            if isinstance(cached, Hidden):
                cached = remembered.followed_by(h)
            out = out if self.attention_adapter is None else self.attention_adapter(out)
            out = residual(out) if self.attention_out_norm is None else self.attention_out_norm(residual(out))
            h = h + dropout(out, self.dropout_rate, keys[1])
            h = self.attention_norm(h) if self.norm_sum else h
        if self.cross is not None:
            with jax.named_scope("cross_attention"):
                x = self.cross_norm(h) if self.norm_first else h
                out, held = self.cross(x, inputs.place, inputs.source, held, fold_in(key, 3))
                h = h + dropout(residual(out), self.dropout_rate, fold_in(key, 4))
                h = self.cross_norm(h) if self.norm_sum else h
                cached = cached if cached is None else (*cached, *held)
        with jax.named_scope("mlp"):
            x, routing = self.mlp_norm(h) if self.norm_first else h, None
            if self.moe is not None:  # Generation drops no token, for the others of its row are not there.
                out, routing = self.moe(x, inputs.place.segments > 0, dropless=cached is not None)
            else:
                out = self.mlp(x)
            out = out if self.mlp_adapter is None else self.mlp_adapter(out)
            out = residual(out) if self.mlp_out_norm is None else self.mlp_out_norm(residual(out))
            h = h + dropout(out, self.dropout_rate, keys[2])
            h = self.mlp_norm(h) if self.norm_sum else h
        return residual(h), cached, routing


def residual(h: jax.Array) -> jax.Array:
    """Lays out the residual stream [B, T, D]: its tokens lie along the tensor axis too, and so do norms and dropout."""
    return constrain(h, "batch", "residual_sequence", "activation_embed")

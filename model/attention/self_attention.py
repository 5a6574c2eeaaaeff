"""Attention of a text to itself, with its projections, positions and cache."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from model.adapters.prefix import Prefix
from model.attention import cache as kv_cache
from model.attention.attend import Rules, attend, seen
from model.attention.block_sparse_attention import SparsePattern
from model.attention.layer_inputs import LayerInputs
from model.attention.memory import Hidden
from model.config import ModelConfig
from model.linear import Linear, parameter, together, zeros
from model.norms import Norm
from model.place import Place
from model.positions import alibi
from model.positions.rope import rotate
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
        self.layer_kind, self.rope_interleaved = kind, config.rope_interleaved
        sparse = None
        if kind == "sparse":
            fields = (config.sparse_block, config.sparse_newest, config.sparse_first, config.sparse_random)
            sparse = SparsePattern(*fields, config.sparse_seed)
        self.rules = Rules(
            config.attention,
            window=config.window if kind == "local" else 0,
            softcap=config.attention_softcap,
            causal=config.kind != "encoder",
            alibi=config.positions == "alibi",
            sparse=sparse,
        )
        self.context_parallel = config.context_parallel
        self.dropout_rate = config.attention_dropout

    def __call__(
        self, x: jax.Array, inputs: LayerInputs, cached: Any = None, key: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        """x [B, T, D] -> ([B, T, D], the cache with this call's keys and values written).

        Args:
          cached: (keys, values) of `model.attention.cache`; or, normalised, the memory of the layer, whose places and
            the tokens' are `inputs.slots` then; or None.
          key: [B] keys for dropout, or None.
        """
        place, slots, rotation = inputs.place, inputs.slots, inputs.rotation
        if cached is None and slots is not None and slots.segments.shape[1] > x.shape[1]:
            slots = None  # Of a memory that other layers have.
        q, k, v = together(x, self.query, self.key, self.value)  # [B, T, H, K], [B, T, G, K] twice
        remembers = isinstance(cached, Hidden)
        if remembers:
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
        if remembers:
            keys = Place(*(a[:, -k.shape[2] :] for a in slots[:2]))
        else:
            k, v, keys, cached = kv_cache.extend(cached, k, v, place, slots, self.rules.window)
        if rotation is not None and "keys" in rotation:
            turn = rotation["keys"]  # of every slot
            turn = turn if keys is slots else jax.tree.map(lambda a: _at(a, keys.positions), turn)
            k = rotate(k.swapaxes(1, 2), turn, self.rope_interleaved).swapaxes(1, 2)
        sinks = None if self.sinks is None else self.sinks.get_value()
        rules = self.rules._replace(bias=inputs.bias, sinks=sinks, same=remembers or slots is None)
        out = attend(q, k, v, place, keys, rules, self.dropout_rate, key, self.context_parallel)
        if self.prefix is not None:
            bias = alibi.bias(q.shape[1], place.positions, keys.positions) if rules.alibi else inputs.bias
            out = self.prefix(out, q, k, seen(place, keys, rules), bias, sinks)
        return checkpoint_name(self.out(out.swapaxes(1, 2)), "out"), cached

    def _normalized(self, norm: Norm, x: jax.Array) -> jax.Array:
        """x [B, T, H, K] normalised over K, or over H and K together."""
        return norm(x.reshape(*x.shape[:2], -1)).reshape(x.shape) if self.norm_whole else norm(x)


def _at(a: jax.Array, positions: jax.Array) -> jax.Array:
    """a [B, S, 1, K] at the positions [B, N], those that no key has at 0: [B, N, 1, K]."""
    return jnp.take_along_axis(a, jnp.maximum(positions, 0)[:, :, None, None], axis=1)


def named(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
    """The same, under the names by which a rematerialisation policy saves them (`model.stack.REMAT`)."""
    return tuple(checkpoint_name(a, name) for a, name in ((q, "query"), (k, "key"), (v, "value")))

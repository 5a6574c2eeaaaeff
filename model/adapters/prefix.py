"""Prefix tuning (Li and Liang, arXiv:2101.00190, section 4.2): learned keys and values that every token attends to.

They join the softmax of the other keys, their part of it multiplied by a learned gate of each head: (sum exp(s) v +
g sum exp(s') v') / (sum exp(s) + g sum exp(s')). With g = 1 this is the paper's; it starts at 0 (as the gates of
LLaMA-Adapter do, arXiv:2303.16199, section 3.3), so that a new prefix changes nothing. Keys and values are trained
themselves, not through the paper's network, and have no position.

Legend: B batch, H heads, G kv_heads, R = H / G, T queries, S keys, K head_dim, P prefix_tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from model.config import ModelConfig
from model.linear import parameter, zeros

LONG = 2048  # keys of a cache from which on not all queries meet them at a time
QUERIES = 64  # but so many


class Prefix(nnx.Module):
    """The prefix of one layer."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        shape = (config.prefix_tokens, config.kv_heads, config.head_dim)
        axes = ("prefix", "kv_heads", "head_dim")

        def draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            return config.init_std * jax.random.normal(key, shape)

        self.keys = parameter(rngs, shape, axes, config.weight_dtype, draw)
        self.values = parameter(rngs, shape, axes, config.weight_dtype, draw)
        self.gate = parameter(rngs, (config.heads,), ("heads",), config.weight_dtype, zeros)
        self.softcap = config.attention_softcap

    def __call__(
        self,
        out: jax.Array,
        q: jax.Array,
        k: jax.Array,
        mask: jax.Array,
        bias: jax.Array | None = None,
        sinks: jax.Array | None = None,
    ) -> jax.Array:
        """The attention of queries to keys and prefix, from `out`, that to the keys.

        Args:
          out, q: [B, H, T, K], q scaled by 1 / sqrt(K). k: [B, G, S, K].
          mask, bias, sinks: of the attention to the keys, as `model.attention.attend.plain_attention` takes them. The
            prefix has no position, and so no bias.
        """
        b, h, t, width = q.shape
        q = q.reshape(b, k.shape[1], -1, t, width)  # [B, G, R, T, K]
        gate = self.gate.get_value().astype(jnp.float32)
        # Never below zero, and with a gradient that leads back from there.
        gate = gate + jax.lax.stop_gradient(jax.nn.relu(gate) - gate)
        prefix, mine = self._prefix(q)
        part_of_long = 1 < t < k.shape[2] > LONG
        weigh = self._weight_in_turn if part_of_long else jax.checkpoint(self._weight)
        others = weigh(q, k, mask, bias)
        if sinks is not None:
            others = jnp.logaddexp(others, sinks.astype(jnp.float32).reshape(*q.shape[1:3], 1))
        # To the prefix for one to the keys, below what float32 can hold.
        odds = gate.reshape(*q.shape[1:3], 1) * jnp.exp(jnp.minimum(prefix - others, 80.0))  # [B, G, R, T]
        share = odds / (1 + odds)
        share, mine = share.reshape(b, h, t, 1), mine.reshape(b, h, t, width)
        return (out.astype(jnp.float32) + share * (mine - out.astype(jnp.float32))).astype(out.dtype)

    def _prefix(self, q: jax.Array) -> tuple[jax.Array, jax.Array]:
        """log sum exp of the prefix's scores [B, G, R, T], and the attention to it alone [B, G, R, T, K]."""
        keys, values = self.keys.get_value().astype(q.dtype), self.values.get_value().astype(q.dtype)
        scores = self._capped(jnp.einsum("bgrtk,pgk->bgrtp", q, keys, preferred_element_type=jnp.float32))
        weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
        mine = jnp.einsum("bgrtp,pgk->bgrtk", weights, values, preferred_element_type=jnp.float32)
        return jax.nn.logsumexp(scores, axis=-1), mine

    @jax.checkpoint
    def _weight(self, q: jax.Array, k: jax.Array, mask: jax.Array, bias: jax.Array | None) -> jax.Array:
        """log sum exp of the scores of the keys that each query sees, [B, G, R, T]."""
        scores = self._capped(jnp.einsum("bgrtk,bgsk->bgrts", q, k, preferred_element_type=jnp.float32))
        if bias is not None:
            scores = scores + bias.reshape(-1, *q.shape[1:3], *bias.shape[2:])
        return jax.nn.logsumexp(jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min), axis=-1)

    def _weight_in_turn(self, q: jax.Array, k: jax.Array, mask: jax.Array, bias: jax.Array | None) -> jax.Array:
        """The same, some queries after others, so that a part of a long prompt does not hold its scores of all keys."""

        def one(x: tuple[jax.Array, jax.Array, jax.Array | None]) -> jax.Array:
            q, mask, bias = x  # [B, G, R, K], [B, S], [B or 1, H, S]
            return self._weight(q[:, :, :, None], k, mask[:, None], None if bias is None else bias[:, :, None])[..., 0]

        by_query = jnp.moveaxis(q, 3, 0), jnp.moveaxis(mask, 1, 0), None if bias is None else jnp.moveaxis(bias, 2, 0)
        return jnp.moveaxis(jax.lax.map(one, by_query, batch_size=QUERIES), 0, 3)

    def _capped(self, scores: jax.Array) -> jax.Array:
        return self.softcap * jnp.tanh(scores / self.softcap) if self.softcap else scores

"""Cross-attention: queries from the decoder, keys and values from what the encoder made of the source.

arXiv:1706.03762, section 3.2.3. Keys and values depend on the source alone, so generation computes them once.

Legend: B batch, T tokens, S source tokens, D embed_dim, G kv_heads, K head_dim.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
from flax import nnx

from model.attention import Place, attend
from model.config import ModelConfig
from model.linear import Linear, together
from tpu.rules import constrain


class Source(NamedTuple):
    """An encoded source, `hidden` [B, S, D] at `place`; without `hidden`, keys and values are in the cache."""

    hidden: jax.Array | None
    place: Place


class CrossAttention(nnx.Module):
    """Attention of every token to all source tokens of the same segment."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        embed, head_dim = (config.embed_dim, "embed"), (config.head_dim, "head_dim")
        heads, kv_heads = (config.heads, "heads"), (config.kv_heads, "kv_heads")
        self.scale = (config.query_scalar or config.head_dim) ** -0.5
        start = config.head_dim**-0.5 / self.scale
        self.query = Linear(config, (embed,), (heads, head_dim), config.attention_bias, rngs, start=start)
        self.key = Linear(config, (embed,), (kv_heads, head_dim), config.attention_bias, rngs)
        self.value = Linear(config, (embed,), (kv_heads, head_dim), config.attention_bias, rngs)
        self.out = Linear(config, (heads, head_dim), (embed,), config.attention_bias, rngs, residual=True)
        self.dropout_rate = config.attention_dropout

    def __call__(
        self, x: jax.Array, place: Place, source: Source, held: tuple[jax.Array, ...] | None, key: jax.Array | None
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """x [B, T, D] at `place` -> ([B, T, D], the source's (keys, values), [B, G, S, K] each).

        Args:
          held: (keys, values) of an earlier call; read where `source` has no hidden states.
          key: [B] keys for dropout, or None.
        """
        q = self._by_head(together(x, self.query)[0] * self.scale)
        if source.hidden is not None:
            held = tuple(self._by_head(a) for a in together(source.hidden, self.key, self.value))
        k, v = held
        options = {"dropout_rate": self.dropout_rate, "key": key, "causal": False}
        out = attend(q, k, v, place, source.place, kind="plain", **options)
        return self.out(out.swapaxes(1, 2)), held

    @staticmethod
    def _by_head(a: jax.Array) -> jax.Array:
        """[B, T, H, K] -> [B, H, T, K], laid out by heads."""
        return constrain(a.swapaxes(1, 2), "batch", "activation_heads", "sequence", "head_dim")

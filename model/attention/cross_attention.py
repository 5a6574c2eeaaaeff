"""Cross-attention: queries from the decoder, keys and values from what an encoder made of the source.

arXiv:1706.03762, section 3.2.3. Keys and values depend on the source alone, so generation computes them once. The
source is a text, all of which is seen, or images, of which a token may see those before it, or the last one only.

Legend: B batch, T tokens, S source tokens, D embed_dim, G kv_heads, K head_dim.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from model.attention.attend import Rules, attend
from model.config import ModelConfig
from model.linear import Linear, together
from model.norms import Norm
from model.place import Place, visible
from tpu.rules import constrain


class Source(NamedTuple):
    """An encoded source, `hidden` [B, S, D'] at `place`; without `hidden`, keys and values are in the cache.

    `queries` is where the tokens stand for it: those of a segment see what is not after them there. None: they see all
    of their segment, or, with a `mask` [B, T, S] bool, that of it.
    """

    hidden: jax.Array | None
    place: Place
    queries: Place | None = None
    mask: jax.Array | None = None


class CrossAttention(nnx.Module):
    """Attention of every token to the tokens of a source.

    Args:
      config: heads, biases and dtypes.
      embed_dim, source_dim: widths of the tokens and of the source, where they are not config.embed_dim.
      window: with `Source.queries`, how far back a token sees there, 1 being its own position; 0: no limit.
      qk_norm: how queries and keys are normalised over head_dim; "": not.
    """

    def __init__(
        self,
        config: ModelConfig,
        rngs: nnx.Rngs,
        embed_dim: int = 0,
        source_dim: int = 0,
        window: int = 0,
        qk_norm: str = "",
    ):
        embed, head_dim = ((embed_dim or config.embed_dim, "embed"),), (config.head_dim, "head_dim")
        source = ((source_dim or config.embed_dim, "embed"),)
        heads, kv_heads = (config.heads, "heads"), (config.kv_heads, "kv_heads")
        self.scale = (config.query_scalar or config.head_dim) ** -0.5
        start = config.head_dim**-0.5 / self.scale
        self.query = Linear(config, embed, (heads, head_dim), config.attention_bias, rngs, start=start)
        self.key = Linear(config, source, (kv_heads, head_dim), config.attention_bias, rngs)
        self.value = Linear(config, source, (kv_heads, head_dim), config.attention_bias, rngs)
        self.out = Linear(config, (heads, head_dim), embed, config.attention_bias, rngs, residual=True)
        norms = [Norm(config, config.head_dim, "norm", rngs, qk_norm) if qk_norm else None for _ in range(2)]
        self.query_norm, self.key_norm = norms
        self.window, self.dropout_rate = window, config.attention_dropout

    def __call__(
        self, x: jax.Array, place: Place, source: Source, held: tuple[jax.Array, ...] | None, key: jax.Array | None
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """x [B, T, D] at `place` -> ([B, T, D], the source's (keys, values), [B, G, S, K] each).

        A token that may see nothing gets exactly zero where `source.queries` or `source.mask` is given.

        Args:
          held: (keys, values) of an earlier call; read where `source` has no hidden states.
          key: [B] keys for dropout, or None.
        """
        q = together(x, self.query)[0]
        q = self._by_head((q if self.query_norm is None else self.query_norm(q)) * self.scale)
        if source.hidden is not None:
            k, v = together(source.hidden, self.key, self.value)
            held = tuple(self._by_head(a) for a in (k if self.key_norm is None else self.key_norm(k), v))
        k, v = held
        causal, mask = source.queries is not None, source.mask
        rules = Rules("plain", self.window, causal=causal)
        queries = source.queries if causal else place
        if mask is not None:
            hidden = jnp.where(mask, 0.0, jnp.finfo(jnp.float32).min)[:, None]
            rules = rules._replace(bias=jnp.broadcast_to(hidden, (len(q), q.shape[1], *mask.shape[1:])))
        elif causal:
            mask = visible(queries, source.place, self.window)
        out = attend(q, k, v, queries, source.place, rules, self.dropout_rate, key)
        out = self.out(out.swapaxes(1, 2))
        return out if mask is None else jnp.where(mask.any(-1)[..., None], out, 0), held

    @staticmethod
    def _by_head(a: jax.Array) -> jax.Array:
        """[B, T, H, K] -> [B, H, T, K], laid out by heads."""
        return constrain(a.swapaxes(1, 2), "batch", "activation_heads", "sequence", "head_dim")

"""What Flamingo puts before some of a language model's layers: cross-attention to images and a feed-forward block, each
behind a gate that starts closed, so that the language model starts as it was (arXiv:2204.14198, section 3.1.2).

    h = h + tanh(a) attention(norm h, images);   h = h + tanh(b) mlp(norm h);   a = b = 0 at the start

A token sees the images before it, or only the last of them; one that has seen none takes nothing from the attention.

Legend: B batch, T tokens, D embed_dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from model.attention.cross_attention import CrossAttention, Source
from model.config import ModelConfig
from model.linear import parameter, zeros
from model.mlp import MLP
from model.norms import Norm
from model.place import Place
from model.residual import residual


class GatedCrossAttention(nnx.Module):
    """The two gated branches before one layer."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        vision = config.vision
        self.attention_norm = Norm(config, config.embed_dim, "norm", rngs)
        self.attention = CrossAttention(
            config,
            rngs,
            source_dim=config.source_width,
            window=1 if vision.sees == "last" else 0,
            qk_norm="rmsnorm" if vision.qk_norm else "",
        )
        self.mlp_norm = Norm(config, config.embed_dim, "norm", rngs)
        self.mlp = MLP(config, rngs)
        width = config.embed_dim if vision.gate_per_channel else 1
        gates = [parameter(rngs, (width,), ("norm",), config.weight_dtype, zeros) for _ in range(2)]
        self.attention_gate, self.mlp_gate = gates

    def __call__(
        self,
        h: jax.Array,
        place: Place,
        source: Source | None,
        held: tuple[jax.Array, ...] | None,
        key: jax.Array | None,
    ) -> tuple[jax.Array, tuple[jax.Array, ...] | None]:
        """h [B, T, D] at `place` -> ([B, T, D], the images' (keys, values)); arguments as `CrossAttention`.

        Without a source there is no image, and the feed-forward block alone is added.
        """
        if source is not None:
            with jax.named_scope("gated_cross_attention"):
                out, held = self.attention(self.attention_norm(h), place, source, held, key)
                h = h + residual(out) * self._open(self.attention_gate, h)
        with jax.named_scope("gated_mlp"):
            out = residual(self.mlp(self.mlp_norm(h)))
            return h + out * self._open(self.mlp_gate, h), held

    @staticmethod
    def _open(gate: nnx.Param, h: jax.Array) -> jax.Array:
        opened = jnp.tanh(gate.get_value().astype(jnp.float32)).astype(h.dtype)
        return jax.lax.broadcast_to_rank(opened, h.ndim)

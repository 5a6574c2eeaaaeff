"""Co-attention (ViLBERT, arXiv:1908.02265, section 3.1): text and images in streams that look at each other.

A connection gives both streams an attention with the other's keys and values and a feed-forward block. The text may
look at the images before it. The images look at the text that is given before the first answer, never at what is to be
answered nor at what knows it, so that the text can still be generated one token after the other; what they keep of it
is computed once.

Legend: B batch, T tokens, S image vectors, D embed_dim, C width of the image vectors.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from model.attention.cross_attention import CrossAttention, Source
from model.config import ModelConfig
from model.mlp import MLP
from model.norms import Norm
from model.place import Place
from model.residual import residual


def connection_config(config: ModelConfig) -> ModelConfig:
    """The shape of a connection's attention."""
    heads = config.vision.connection_heads
    head_dim = config.vision.connection_dim // heads
    return dataclasses.replace(config, heads=heads, kv_heads=heads, head_dim=head_dim, query_scalar=0.0)


class Side(nnx.Module):
    """One stream's half: an attention, given its result, and a feed-forward block, normalised as config.norm_order."""

    def __init__(self, config: ModelConfig, width: int, mlp_dim: int, rngs: nnx.Rngs):
        self.attention_norm = Norm(config, width, "norm", rngs)
        self.mlp_norm = Norm(config, width, "norm", rngs)
        self.mlp = MLP(dataclasses.replace(config, embed_dim=width, mlp_dim=mlp_dim), rngs)
        self.post = config.norm_order == "post"

    def enter(self, h: jax.Array) -> jax.Array:
        """What of the stream h [B, T, D] the attention reads."""
        return h if self.post else self.attention_norm(h)

    def leave(self, h: jax.Array, out: jax.Array) -> jax.Array:
        """The stream h [B, T, D] with the attention's result `out` and the feed-forward block."""
        h = h + residual(out)
        h = self.attention_norm(h) if self.post else h
        h = h + residual(self.mlp(h if self.post else self.mlp_norm(h)))
        return self.mlp_norm(h) if self.post else h


class CoConnection(nnx.Module):
    """Both halves of one connection."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        own, width = connection_config(config), config.source_width
        qk_norm = "rmsnorm" if config.vision.qk_norm else ""
        self.text = Side(config, config.embed_dim, config.mlp_dim, rngs)
        self.text_attention = CrossAttention(own, rngs, source_dim=width, qk_norm=qk_norm)
        self.images = Side(config, width, config.vision.mlp_dim, rngs)
        self.image_attention = CrossAttention(own, rngs, embed_dim=width, source_dim=config.embed_dim, qk_norm=qk_norm)

    def __call__(
        self,
        h: jax.Array,
        place: Place,
        given: jax.Array | None,
        source: Source | None,
        held: tuple[jax.Array, ...] | None,
    ) -> tuple[jax.Array, jax.Array | None, tuple[jax.Array, ...] | None]:
        """h [B, T, D] at `place` -> (h, the images' vectors [B, S, C] or None, their keys and values for the text).

        Args:
          given: [B, T], 1 where the images may look; not read where `source` has no vectors.
          source: the images' vectors and places, and where the text stands among them; without vectors, what an
            earlier call gave as `held` is read. None: there are no images, and the text finds nothing.
        """
        if source is None:
            return self.text.leave(h, jnp.zeros_like(h)), None, held
        vectors, seen = source.hidden, source
        if vectors is not None:
            seen = source._replace(hidden=self.images.enter(vectors))
        x = self.text.enter(h)
        out, held = self.text_attention(x, place, seen, held, None)
        if vectors is not None:
            text = Place(place.segments * given, place.positions * 0)
            queries = Place(source.place.segments, source.place.positions * 0)
            of_text, _ = self.image_attention(seen.hidden, queries, Source(x, text, queries), None, None)
            vectors = self.images.leave(vectors, of_text)
        return self.text.leave(h, out), vectors, held

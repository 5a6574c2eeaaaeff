"""The encoder-decoder: the original Transformer (arXiv:1706.03762) and T5 (arXiv:1910.10683), as the fields say.

T5: relative positions, rmsnorm before each part, no biases, query_scalar 1, activation relu (geglu in version 1.1).
The original: sinusoidal positions, layernorm after each sum, scale_embedding. Both halves share the token
embedding.

Legend: B batch, T tokens of the decoder, S of the encoder, D embed_dim.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from model.attention.cache import Cache, write_slots
from model.attention.cross_attention import Source
from model.attention.layer_inputs import LayerInputs
from model.config import ModelConfig
from model.dropout import dropout, fold_in
from model.embedding import Embedding, Head
from model.neftune import embedding_noise
from model.norms import Norm
from model.place import Place
from model.positions.relative_positions import RelativeBias
from model.positions.sinusoidal import sinusoidal
from model.residual import residual
from model.stack import Stack


def decoder_config(config: ModelConfig) -> ModelConfig:
    """The shape of the decoder's half."""
    return dataclasses.replace(config, layers=config.decoder_layers)


class EncoderDecoder(nnx.Module):
    """A shared embedding, the encoder, the decoder with cross-attention, and the head."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.dropout_rate, self.positions, self.embed_dim = config.embedding_dropout, config.positions, config.embed_dim
        self.embedding_scale = config.embed_dim**0.5 if config.scale_embedding else 1.0
        self.output_scale, self.noise = config.output_scale, config.embedding_noise
        relative, first = config.positions == "relative", config.norm_order != "post"
        self.embedding = Embedding(config, config.vocab_size, "vocab", rngs)
        self.encoder = Stack(dataclasses.replace(config, kind="encoder"), rngs)
        self.encoder_bias = RelativeBias(config, False, rngs) if relative else None
        self.encoder_norm = Norm(config, config.embed_dim, "norm", rngs) if first else None
        self.decoder = Stack(decoder_config(config), rngs)
        self.decoder_bias = RelativeBias(config, True, rngs) if relative else None
        self.decoder_norm = Norm(config, config.embed_dim, "norm", rngs) if first else None
        self.head = Head(config, self.embedding, rngs)

    def encode(self, inputs: jax.Array, segments: jax.Array, key: jax.Array | None = None) -> Source:
        """What tokens `inputs` [B, S] in `segments` [B, S] (0: padding) are encoded to; `key` as for `__call__`."""
        # By the place in the row, not by `Place.positions`: inside a segment the difference is the same.
        steps = jnp.arange(inputs.shape[1], dtype=jnp.int32)[None]
        place = Place(segments, jnp.broadcast_to(steps, inputs.shape))
        h = self._embed(inputs, place, fold_in(key, 0))
        bias = None if self.encoder_bias is None else self.encoder_bias(steps, steps)
        with jax.named_scope("encoder"):
            h, _, _ = self.encoder(h, LayerInputs(place, bias=bias), key=fold_in(key, 1))
        return Source(h if self.encoder_norm is None else self.encoder_norm(h), place)

    def __call__(
        self,
        tokens: jax.Array,
        place: Place,
        cache: Cache | None = None,
        key: jax.Array | None = None,
        inputs: jax.Array | None = None,
        input_segments: jax.Array | None = None,
        source: Source | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Decoder tokens [B, T] int32 at `place` -> (hidden states [B, T, D] for the head, the cache with them).

        Args:
          cache: where earlier tokens of the rows are; None for training.
          key: [B] keys for dropout; None for none.
          inputs, input_segments: tokens [B, S] and their segments; or else `source`, what `encode` made of them
            (its hidden states are needed by the first call with a cache only).
        """
        if source is None:
            source = self.encode(inputs, input_segments, fold_in(key, 0))
        h = self._embed(tokens, place, fold_in(key, 1))
        slots = None if cache is None else write_slots(cache.slots, place)
        bias = None
        if self.decoder_bias is not None and cache is None:
            steps = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
            bias = self.decoder_bias(steps, steps)
        elif self.decoder_bias is not None:
            bias = self.decoder_bias(place.positions, slots.positions)
        layers: Any = None if cache is None else cache.layers
        with jax.named_scope("decoder"):
            given = LayerInputs(place, slots, bias=bias, source=source)
            h, layers, _ = self.decoder(h, given, layers, fold_in(key, 2))
        h = h if self.decoder_norm is None else self.decoder_norm(h)
        h = h if self.output_scale == 1.0 else h * self.output_scale
        return h, None if cache is None else Cache(slots, layers)

    def _embed(self, tokens: jax.Array, place: Place, key: jax.Array | None) -> jax.Array:
        with jax.named_scope("embedding"):
            h = embedding_noise(self.embedding(tokens), self.noise, place.segments, fold_in(key, 1))
            h = h if self.embedding_scale == 1.0 else h * self.embedding_scale
            if self.positions == "sinusoidal":
                h = h + sinusoidal(place.positions, self.embed_dim).astype(h.dtype)
            return dropout(residual(h), self.dropout_rate, key)

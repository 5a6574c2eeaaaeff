"""Images and texts as vectors of one space: CLIP (arXiv:2103.00020, section 2) and SigLIP (arXiv:2303.15343).

CLIP's text is causal and read at its end token, both sides have a projection, and similarities are scaled by a learned
number of at most 100. SigLIP's text sees both ways and is read at the row's last position, so that its padding is part
of it, end tokens to the end of the row; similarities get a bias too.

Legend: B rows, T tokens, D embed_dim, E projection_dim.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from model.attention.layer_inputs import LayerInputs
from model.config import ModelConfig
from model.embedding import Embedding
from model.linear import Linear, exact_matmul, parameter
from model.norms import Norm
from model.place import Place
from model.positions.rope import Rope, rotations
from model.positions.sinusoidal import sinusoidal
from model.residual import residual
from model.stack import Stack
from model.vision.vision import Vision

LARGEST_SCALE = 100.0


class Contrastive(nnx.Module):
    """Both towers, their projections, and what makes logits of similarities."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        vision, learned = config.vision, config.positions == "learned"
        self.positions, self.embed_dim = config.positions, config.embed_dim
        self.rope = Rope.of(config) if config.positions == "rope" else None
        self.text_pool, self.sigmoid = vision.text_pool, vision.similarity == "sigmoid"
        self.embedding = Embedding(config, config.vocab_size, "vocab", rngs)
        self.position_embedding = Embedding(config, config.max_positions, "positions", rngs) if learned else None
        self.stack = Stack(config, rngs)
        self.final_norm = Norm(config, config.embed_dim, "norm", rngs)
        self.vision = Vision(config, rngs)
        width, out = config.vision.encoder_width, ((vision.projection_dim, "mlp"),)
        projects = not self.sigmoid or width != vision.projection_dim
        self.text_projection = Linear(config, ((config.embed_dim, "embed"),), out, self.sigmoid, rngs)
        self.image_projection = Linear(config, ((width, "embed"),), out, False, rngs) if projects else None
        scale, bias = math.log(10.0 if self.sigmoid else 1 / 0.07), -10.0
        self.logit_scale = parameter(rngs, (1,), ("norm",), "float32", lambda key, shape: jnp.full(shape, scale))
        biases = parameter(rngs, (1,), ("norm",), "float32", lambda key, shape: jnp.full(shape, bias))
        self.logit_bias = biases if self.sigmoid else None

    def texts(self, tokens: jax.Array, place: Place, ends: jax.Array | None = None) -> jax.Array:
        """Tokens [B, T] int32 at `place` -> their texts' vectors [B, E] float32, of length 1.

        ends: [B] int32, where each text ends; None: at the last token of a segment above 0. Where texts are read at the
        row's last position, neither ends nor segments count: what pads a row is read with it.
        """
        ends = jnp.sum(place.segments > 0, axis=1) - 1 if ends is None else ends
        if self.text_pool == "last":
            order = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
            place = Place(jnp.ones_like(order), order)
        return unit(self.project_texts(self.read(tokens, place), ends))

    def read(self, tokens: jax.Array, place: Place, keys: Place | None = None) -> jax.Array:
        """Tokens [B, T] int32 at `place` -> hidden states [B, T, D]; `keys` as `model.transformer.Transformer`."""
        with jax.named_scope("text"):
            h = self.embedding(tokens)
            if self.position_embedding is not None:
                h = h + self.position_embedding(place.positions)
            elif self.positions == "sinusoidal":
                h = h + sinusoidal(place.positions, self.embed_dim).astype(h.dtype)
            turn = None if self.rope is None else rotations(self.rope, place)
            return self.final_norm(self.stack(residual(h), LayerInputs(place, keys, turn))[0])

    def project_texts(self, h: jax.Array, ends: jax.Array) -> jax.Array:
        """Hidden states h [B, T, D] of texts that end at `ends` [B] -> one vector each, [B, E] float32."""
        if self.text_pool == "last":
            return self.text_projection(h[:, -1], "float32")
        h = jnp.take_along_axis(h, jnp.maximum(ends, 0)[:, None, None], axis=1)[:, 0]
        return self.text_projection(h, "float32")

    def images(self, x: jax.Array) -> jax.Array:
        """Images x [B, H, W, channels] -> their vectors [B, E] float32, of length 1."""
        return unit(self.project_images(x))

    def project_images(self, x: jax.Array) -> jax.Array:
        """Images x [B, H, W, channels] -> one vector each, [B, E] float32."""
        h = self.vision.pooled(x)
        return h.astype(jnp.float32) if self.image_projection is None else self.image_projection(h, "float32")

    def logits(self, images: jax.Array, texts: jax.Array) -> jax.Array:
        """Vectors of images [A, E] and of texts [B, E] -> how well they go together, [A, B] float32."""
        scale = jnp.exp(self.logit_scale.get_value())
        scale = scale if self.sigmoid else jnp.minimum(scale, LARGEST_SCALE)
        similarity = exact_matmul(images, texts.T) * scale[None]
        return similarity if self.logit_bias is None else similarity + self.logit_bias.get_value()[None]


def unit(x: jax.Array) -> jax.Array:
    """x [..., E] divided by its length, float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))

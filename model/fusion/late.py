"""Late fusion: a text and an image, encoded apart, become one vector, which a pooled head labels.

With vision.combine="concatenation" both vectors lie side by side (iBOWIMG, arXiv:1512.02167); with "average" they are
added with learned weights for every feature, s for the image's and 1 - s for the text's, which begin as halves (the
additive fusion of arXiv:1802.02892, with weights).

They meet before the tanh of BERT's pooler, which is the hidden layer of arXiv:1606.08390. A linear head alone would add
up what each says by itself: whatever the text, the same image would fit it best, and no matching could be learned.

Legend: B rows, T tokens, D embed_dim, P pooled_width, L labels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from model.bert import Bert
from model.config import ModelConfig
from model.linear import Linear, parameter, zeros
from model.place import Place
from model.vision.vision import Vision


class Late(Bert):
    """A BERT whose pooled head reads an image too. Weights that a BERT has too have the same paths as there."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        self.vision, width = Vision(config, rngs), config.vision.encoder_width
        self.image_projection = Linear(config, ((width, "embed"),), ((config.embed_dim, "mlp"),), True, rngs)
        averages = config.vision.combine == "average"
        gate = parameter(rngs, (config.embed_dim,), ("norm",), config.weight_dtype, zeros) if averages else None
        self.image_gate = gate

    def text(self, tokens: jax.Array, place: Place, key: jax.Array | None = None) -> jax.Array:
        """Tokens [B, T] int32 at `place` -> the state of each row's first token, [B, D]; `key` as for `Bert`."""
        return self(tokens, place, key=key)[0][:, 0]

    def image(self, x: jax.Array) -> jax.Array:
        """Images x [B, H, W, channels] -> one vector each, [B, D]."""
        return self.image_projection(self.vision.pooled(x))

    def logits(self, text: jax.Array, image: jax.Array) -> jax.Array:
        """Vectors of texts and of images, both [B, D] -> logits of their labels [B, L] float32."""
        if self.image_gate is None:
            return self.head(jnp.concatenate([text, image], axis=-1))  # [B, P]
        share = jax.nn.sigmoid(self.image_gate.get_value().astype(jnp.float32))[None]
        return self.head(share * image + (1 - share) * text)

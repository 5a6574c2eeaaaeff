"""A class for an image."""

from __future__ import annotations

import jax
from flax import nnx

from model.config import ModelConfig
from model.linear import Linear
from model.vision.vision import Vision


class ImageClassifier(nnx.Module):
    """An encoder of images and a linear head over one vector of each."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.vision = Vision(config, rngs)
        inputs, labels = ((config.vision.encoder_width, "embed"),), ((config.labels, "vocab"),)
        self.head = Linear(config, inputs, labels, True, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Images x [R, H, W, channels] -> logits [R, labels] float32."""
        return self.head(self.vision.pooled(x), "float32")

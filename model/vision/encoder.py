"""Encoders of images, and the pooling of their vectors by attention."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from model.attention.cross_attention import CrossAttention, Source
from model.config import ModelConfig
from model.linear import parameter
from model.mlp import MLP
from model.norms import Norm
from model.place import Place
from model.vision.convolution import CNN
from model.vision.images import normalized
from model.vision.resnet import ResNet
from model.vision.vit import ViT, grid_positions, patches, position_table, resampled, tower_config


class Encoder(nnx.Module):
    """Images to a grid of vectors: a ViT, on patches of pixels or on a ResNet's vectors, a ResNet or a CNN."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        vision = config.vision
        self.patch, self.normalization = (vision.patch_size, vision.reduction_across), vision.normalization
        self.temporal_patch = vision.temporal_patch
        hybrid = vision.encoder == "vit" and vision.stem == "resnet"
        self.resnet = ResNet(config, rngs) if vision.encoder == "resnet" or hybrid else None
        self.cnn = CNN(config, rngs) if vision.encoder == "cnn" else None
        inputs = (1, 1, vision.widths[-1]) if hybrid else (*self.patch, vision.channels)
        inputs = (vision.temporal_patch, *inputs) if vision.temporal_patch > 1 else inputs
        self.vit = ViT(config, inputs, rngs) if vision.encoder == "vit" else None
        # The vectors of convolutions do not say where they are; a mean has no use for it.
        placed = self.vit is None and vision.positions == "learned" and vision.pool != "mean"
        self.grid, rows = (vision.grid, vision.columns), vision.grid * vision.columns
        self.position_embedding = position_table(rngs, rows, config, config.vision.encoder_width) if placed else None

    def __call__(self, x: jax.Array) -> tuple[jax.Array, tuple[int, int]]:
        """Images x [R, H, W, channels] -> (vectors [R, P, C], a class token's first; vectors along both sides)."""
        x = normalized(x, self.normalization)
        for convolutional in (self.resnet, self.cnn):
            x = x if convolutional is None else convolutional(x)
        size = self.patch if self.resnet is None and self.cnn is None else (1, 1)
        grid = (x.shape[1] // size[0], x.shape[2] // size[1])
        x = patches(x, *size)
        if self.vit is None:
            x = x.reshape(*x.shape[:2], -1)
            if self.position_embedding is not None:
                x = x + resampled(self.position_embedding.get_value(), self.grid, grid).astype(x.dtype)
            return x, grid
        if self.temporal_patch > 1:
            x = jnp.repeat(x[:, :, None], self.temporal_patch, axis=2)
        positions = jnp.broadcast_to(grid_positions(*grid), (len(x), x.shape[1], 2))
        return self.vit(x, jnp.ones(x.shape[:2], jnp.int32), positions, grid=grid), grid


class MapPool(nnx.Module):
    """One vector of many: a learned probe attends to them, and a feed-forward block follows (SigLIP, arXiv:2303.15343;
    multihead attention pooling, arXiv:1810.00825)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        tower = dataclasses.replace(tower_config(config), embed_dim=config.vision.encoder_width)

        def draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            return jax.random.normal(key, shape) / shape[-1] ** 0.5

        self.probe = parameter(rngs, (1, tower.embed_dim), ("positions", "norm"), config.weight_dtype, draw)
        self.attention = CrossAttention(tower, rngs)
        self.norm = Norm(tower, tower.embed_dim, "norm", rngs)
        self.mlp = MLP(tower, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [R, P, C] -> [R, C]."""
        probe = jnp.broadcast_to(self.probe.get_value().astype(x.dtype), (len(x), 1, x.shape[-1]))
        query, keys = (
            Place(jnp.ones(shape, jnp.int32), jnp.zeros(shape, jnp.int32)) for shape in ((len(x), 1), x.shape[:2])
        )
        h, _ = self.attention(probe, query, Source(x, keys), None, None)
        return (h + self.mlp(self.norm(h)))[:, 0]

"""What sees: an encoder of images and the connector behind it; and the images of a batch as the model takes them.

Legend: B rows, N images of a row, H, W pixels along their sides, P patches or vectors of one, M of all of a row, T
tokens of a row, C the width of the vectors, S = N P.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from model.attention import Place, visible
from model.config import ModelConfig
from model.connector import Connector, encoder_width, source_width
from model.convolution import CNN
from model.cross_attention import CrossAttention, Source
from model.linear import Linear, parameter
from model.mlp import MLP
from model.norms import Norm
from model.resnet import ResNet
from model.vision_config import NORMALIZATIONS
from model.vit import ViT, grid_positions, patches, position_table, resampled, tower_config
from tpu.errors import UserError


class Images(NamedTuple):
    """The images of a batch, and how its tokens stand to them.

    Images of one size are `pixels` [B, N, H, W, channels], uint8 or, normalised, float32. Those of several sizes are
    packed: `pixels` [B, M, rows, columns, channels] are patches, or [B, M, time, rows, columns, channels] with
    vision.temporal_patch; `positions` says where they are and `segments` of which image.
    """

    pixels: jax.Array
    segments: (
        jax.Array
    )  # [B, N] int32, the segment of the row's tokens that an image belongs to, 0: none; packed [B, M]
    slots: jax.Array  # [B, T] int32, which of the row's image vectors stands at a token (merge), -1: none
    seen: jax.Array  # [B, T] int32, images of the row up to and with this token
    given: jax.Array  # [B, T] int32, 1 where a token is given, 0 where it is to be answered
    positions: jax.Array | None = None  # [B, M, 2] int32, row and column of a packed patch; None: images of one size
    visible: jax.Array | None = None  # [B, T, N] bool, images that a token looks at (cross); None: as vision.sees says

    def queries(self, place: Place) -> Place:
        """Where tokens at `place` stand among the images: at the last one that they have seen."""
        return Place(place.segments, self.seen - 1)

    def of_token(self, number: jax.Array) -> Images:
        """The same for the token `number` [B] of each row alone."""
        number = number[:, None]
        visible = self.visible
        return self._replace(
            seen=jnp.take_along_axis(self.seen, number, axis=1),
            visible=None if visible is None else jnp.take_along_axis(visible, number[..., None], axis=1),
        )

    def looked_at(self, source: Source, place: Place) -> Source:
        """The images' vectors as tokens at `place` see them: by `visible`, or by where they stand among the images."""
        if self.visible is None:
            return source._replace(queries=self.queries(place))
        vectors = source.place.segments.shape[1] // self.visible.shape[2]
        return source._replace(mask=jnp.repeat(self.visible, vectors, axis=2))

    def opening(self, place: Place) -> jax.Array:
        """[B, T] int32, 1 for the tokens at `place` that are given before the first of their text to be answered.

        These alone may be shown to what comes before them: a later question knows the answers between.
        """
        answers = Place(jnp.where(self.given > 0, 0, place.segments), place.positions)
        return jnp.where(visible(Place(*place[:2]), answers, 0).any(-1), 0, self.given)

    def blocks(self, mask: str, place: Place) -> jax.Array | None:
        """[B, T] int32, tokens at `place` that see each other both ways under vision.mask; None: causal alone."""
        if mask == "prefix":
            return self.opening(place)
        return jnp.where(self.slots >= 0, self.seen, 0) if mask == "images" else None


def normalized(pixels: jax.Array, normalization: str) -> jax.Array:
    """uint8 pixels [..., channels] -> float32 with mean and deviation as NORMALIZATIONS; floats stay as they are."""
    if pixels.dtype != jnp.uint8:
        return pixels
    mean, deviation = (np.float32(part)[: pixels.shape[-1]] for part in NORMALIZATIONS[normalization])
    return (pixels.astype(jnp.float32) / 255 - mean) / deviation


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
        self.position_embedding = position_table(rngs, rows, config, encoder_width(config)) if placed else None

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
        tower = dataclasses.replace(tower_config(config), embed_dim=encoder_width(config))

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


class Vision(nnx.Module):
    """Images to the vectors that the text meets, or, where vision.pool says so, to one vector each."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        vision = config.vision
        self.encoder = Encoder(config, rngs)
        self.pool, self.class_token, self.keep_class = vision.pool, vision.class_token, vision.keep_class
        self.map_pool = MapPool(config, rngs) if vision.pool == "map" else None
        self.connector = Connector(config, rngs) if vision.pool == "none" else None
        rows, width = vision.image_positions, source_width(config)

        def draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            return config.init_std * jax.random.normal(key, shape)

        of_images = parameter(rngs, (rows, width), ("positions", "norm"), config.weight_dtype, draw) if rows else None
        self.image_positions, self.needs_one_size = of_images, config.needs_one_size

    def pooled(self, x: jax.Array) -> jax.Array:
        """Images x [R, H, W, channels] -> one vector each, [R, C]."""
        with jax.named_scope("vision"):
            h, _ = self.encoder(x)
            if self.map_pool is not None:
                return self.map_pool(h)
            return h[:, 0] if self.pool == "class" else h[:, self.class_token :].mean(1)

    def __call__(self, images: Images) -> Source:
        """The vectors of all images of a row, [B, S, C], and their places: the image's segment and number in the row.

        Of packed images all vectors are in segment 1, for which of them are a text's is said by slots alone. Raises
        UserError where a model cannot take them.
        """
        with jax.named_scope("vision"):
            return self._whole(images) if images.positions is None else self._packed(images)

    def places(self, images: Images, vectors: int) -> Place:
        """Where the vectors of images of one size stand, `vectors` of each."""
        numbers = jnp.broadcast_to(jnp.arange(images.segments.shape[1], dtype=jnp.int32), images.segments.shape)
        return Place(*(jnp.repeat(a, vectors, axis=1) for a in (images.segments, numbers)))

    def _whole(self, images: Images) -> Source:
        b, n = images.pixels.shape[:2]
        h, grid = self.encoder(images.pixels.reshape(b * n, *images.pixels.shape[2:]))
        first = h[:, : self.class_token]
        h = h[:, self.class_token :]
        if self.keep_class:  # Only where neighbours stay apart.
            h, grid = jnp.concatenate([first, h], 1), None
        h = self.connector(h, grid, jnp.ones(h.shape[:2], jnp.int32))
        h = h.reshape(b, n, *h.shape[1:])
        if self.image_positions is not None:
            table, numbers = self.image_positions.get_value(), _numbers(images.segments)
            h = h + jnp.take(table, numbers, axis=0)[:, :, None].astype(h.dtype)
        return Source(h.reshape(b, -1, h.shape[-1]), self.places(images, h.shape[2]))

    def _packed(self, images: Images) -> Source:
        if self.needs_one_size:
            raise UserError(f"{self.needs_one_size}: not with images of several sizes in one row")
        x = normalized(images.pixels, self.encoder.normalization)
        h = self.encoder.vit(x, images.segments, images.positions)
        h = self.connector(h, None, images.segments)
        ones = jnp.ones(h.shape[:2], jnp.int32)
        return Source(h, Place(ones, jnp.zeros_like(ones)))


def _numbers(segments: jax.Array) -> jax.Array:
    """segments [B, N] of images -> [B, N] int32: how many of its own segment are before each."""
    before = jnp.tril(jnp.ones((segments.shape[1],) * 2, bool), -1)
    return jnp.sum(before & (segments[:, :, None] == segments[:, None, :]), axis=-1, dtype=jnp.int32)


class ImageClassifier(nnx.Module):
    """An encoder of images and a linear head over one vector of each."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.vision = Vision(config, rngs)
        inputs, labels = ((encoder_width(config), "embed"),), ((config.labels, "vocab"),)
        self.head = Linear(config, inputs, labels, True, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Images x [R, H, W, channels] -> logits [R, labels] float32."""
        return self.head(self.vision.pooled(x), "float32")

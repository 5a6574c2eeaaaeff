"""What sees: an encoder of images and the connector behind it; and the images of a batch as the model takes them.

Legend: B rows, N images of a row, H, W pixels along their sides, P patches or vectors of one, M of all of a row, T
tokens of a row, C the width of the vectors, S = N P.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from model.attention.cross_attention import Source
from model.config import ModelConfig
from model.linear import parameter
from model.place import Place
from model.vision.connector import Connector
from model.vision.encoder import Encoder, MapPool
from model.vision.images import Images, normalized
from tpu.errors import UserError


class Vision(nnx.Module):
    """Images to the vectors that the text meets, or, where vision.pool says so, to one vector each."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        vision = config.vision
        self.encoder = Encoder(config, rngs)
        self.pool, self.class_token, self.keep_class = vision.pool, vision.class_token, vision.keep_class
        self.map_pool = MapPool(config, rngs) if vision.pool == "map" else None
        self.connector = Connector(config, rngs) if vision.pool == "none" else None
        rows, width = vision.image_positions, config.source_width

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
        if x.ndim == 5 and self.encoder.temporal_patch > 1:  # still images
            x = jnp.repeat(x[:, :, None], self.encoder.temporal_patch, axis=2)
        h = self.encoder.vit(x, images.segments, images.positions)
        h = self.connector(h, None, images.segments)
        ones = jnp.ones(h.shape[:2], jnp.int32)
        return Source(h, Place(ones, jnp.zeros_like(ones)))


def _numbers(segments: jax.Array) -> jax.Array:
    """segments [B, N] of images -> [B, N] int32: how many of its own segment are before each."""
    before = jnp.tril(jnp.ones((segments.shape[1],) * 2, bool), -1)
    return jnp.sum(before[None] & (segments[:, :, None] == segments[:, None, :]), axis=-1, dtype=jnp.int32)

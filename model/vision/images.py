"""Images as arrays: pixels or patches, with where each belongs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from model.attention.cross_attention import Source
from model.fields.image import NORMALIZATIONS
from model.place import Place, visible


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

    def of_tokens(self, part: Callable[[jax.Array], jax.Array]) -> Images:
        """The same for some tokens, those that `part` takes of arrays [B, T, ...]."""
        visible = None if self.visible is None else part(self.visible)
        return self._replace(slots=part(self.slots), seen=part(self.seen), given=part(self.given), visible=visible)

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
    mean, deviation = (
        jax.lax.broadcast_to_rank(np.float32(part)[: pixels.shape[-1]], pixels.ndim)
        for part in NORMALIZATIONS[normalization]
    )
    return (pixels.astype(jnp.float32) / 255 - mean) / deviation

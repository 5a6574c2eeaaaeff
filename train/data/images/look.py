"""The images of a conversation as the model takes them: made one size, cut into tiles, or packed at their own sizes.

data.image_fit: "squash", "pad" and "crop" make every image one of model.vision.image_size (and image_width). "tiles"
makes several squares of one, an overview first (LLaVA-NeXT). "native" keeps sizes, up to data.patches patches in all
the images of a row, and packs them (Qwen2-VL). All of them resize by data.image_resample. An animated file is
data.frames images with times, or its first frame.

Legend: N images of a row, S pixels of a side, M patches of a row, P pixels of a patch's side, f neighbours that become
one vector.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from model.config import ModelConfig, VisionConfig
from tpu.errors import UserError
from train.config import DataConfig
from train.data.chat.record import IMAGE, Conversation
from train.data.images import tiles as image_layout
from train.data.images.decode import Limits, decode, frames
from train.data.images.resize import fit, resize


class Looked(NamedTuple):
    """A conversation with as many images as the model gets, of each the vectors it gives, and the arrays."""

    conversation: Conversation
    vectors: tuple[int, ...]
    fields: dict[str, np.ndarray]  # of a `train.data.batch.Batch`: images, image_segments and, packed, image_positions
    grids: tuple[tuple[int, int], ...] = ()  # of each image the rows and columns of its vectors


def look(conversation: Conversation, data: DataConfig, model: ModelConfig) -> Looked:
    """Decodes and shapes all images. Raises UserError for what cannot be read, is too much, or does not match the text.

    Where images do not stand in the text (fusions other than merge) they give it no vectors.
    """
    limits = Limits(megapixels=data.max_megapixels)
    if data.frames and not conversation.times:
        conversation = _with_frames(conversation, data, limits)
    decoded = [
        decode(source, limits, f"{conversation.key}, image {number}")
        for number, source in enumerate(conversation.images, start=1)
    ]
    if data.image_fit == "tiles":
        conversation, decoded = _with_tiles(conversation, decoded, data, model)
    _check(conversation, data, model)
    if data.image_fit == "native":
        patched, fields = _packed(conversation.key, decoded, data, model)
        grids = tuple((rows // model.vision.shrink, columns // model.vision.shrink) for rows, columns in patched)
    else:
        fields = _whole(conversation.key, decoded, data, model)
        grids = (vector_grid(model.vision),) * len(decoded)
    merges = model.fusion == "merge"
    return Looked(conversation, tuple(math.prod(grid) if merges else 0 for grid in grids), fields, grids)


def vector_grid(vision: VisionConfig) -> tuple[int, int]:
    """Rows and columns of the vectors of an image of vision.image_size; those that have no place in it are one row."""
    if vision.connector == "perceiver" or vision.keep_class:
        return 1, vision.vectors
    return vision.grid // vision.shrink, vision.columns // vision.shrink


def _check(conversation: Conversation, data: DataConfig, model: ModelConfig) -> None:
    placed, count = sum(turn.text.count(IMAGE) for turn in conversation.turns), len(conversation.images)
    if placed != count:
        raise UserError(f"{conversation.key}: {placed} {IMAGE} in the text, {count} images; must be as many")
    if data.image_fit != "native" and count > data.images:
        raise UserError(f"{conversation.key}: {count} images; a row holds data.images={data.images} of them")
    if 0 < model.vision.image_positions < count:
        raise UserError(
            f"{conversation.key}: {count} images; model.vision.image_positions={model.vision.image_positions} tells no "
            "more of them apart"
        )


def expanded(conversation: Conversation, counts: list[int]) -> Conversation:
    """The conversation with as many placeholders in place of each as `counts` says."""
    left, turns = iter(counts), []
    for turn in conversation.turns:
        first, *rest = turn.text.split(IMAGE)
        turns.append(turn._replace(text=first + "".join(IMAGE * next(left, 1) + piece for piece in rest)))
    return conversation._replace(turns=tuple(turns))


def _with_frames(conversation: Conversation, data: DataConfig, limits: Limits) -> Conversation:
    """Every animated file as data.frames frames, their times as times; still images at 0 s where others move."""
    found = [
        frames(source, data.frames, limits, f"{conversation.key}, image {number}")
        for number, source in enumerate(conversation.images, start=1)
    ]
    moves = [len(set(times)) > 1 for _, times in found]
    if not any(moves):
        return conversation
    kept = [
        (images, times) if moving else (images[:1], times[:1])
        for (images, times), moving in zip(found, moves, strict=True)
    ]
    return expanded(conversation, [len(images) for images, _ in kept])._replace(
        images=tuple(image for images, _ in kept for image in images),
        times=tuple(time for _, times in kept for time in times),
    )


def tile_grids(data: DataConfig) -> list[tuple[int, int]]:
    """The grids of tiles, rows and columns, that an image may be cut into."""
    most = range(1, data.max_tiles + 1)
    return [(rows, columns) for rows in most for columns in most if rows * columns <= data.max_tiles]


def _with_tiles(
    conversation: Conversation, decoded: list[np.ndarray], data: DataConfig, model: ModelConfig
) -> tuple[Conversation, list[np.ndarray]]:
    grids = tile_grids(data)
    tiles = [image_layout.tiles(image, model.vision.image_size, grids, method=data.image_resample) for image in decoded]
    images = [tile for of_image in tiles for tile in of_image]
    placed = expanded(conversation, [len(of_image) for of_image in tiles])
    times = [time for time, of_image in zip(conversation.times, tiles, strict=False) for _ in of_image]
    return placed._replace(images=tuple(images), times=tuple(times)), images


def _whole(key: str, decoded: list[np.ndarray], data: DataConfig, model: ModelConfig) -> dict[str, np.ndarray]:
    """images [N, S, S, channels] uint8, or of model.vision.image_width beside S, and image_segments [N] int32."""
    sides, channels = model.vision.sides, model.vision.channels
    how = "squash" if data.image_fit == "tiles" else data.image_fit
    images, there = np.zeros((data.images, *sides, channels), np.uint8), np.zeros(data.images, np.int32)
    for number, image in enumerate(decoded):
        with _of(key, number + 1):
            images[number], there[number] = _channels(fit(image, *sides, how, method=data.image_resample), channels), 1
    return {"images": images, "image_segments": there}


@contextlib.contextmanager
def _of(key: str, number: int) -> Iterator[None]:
    """Says of which record and image an error is."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{key}, image {number}: {error}") from error


def _channels(image: np.ndarray, channels: int) -> np.ndarray:
    return image if channels == 3 else image.mean(-1, keepdims=True).round().astype(np.uint8)


def native_size(height: int, width: int, images: int, data: DataConfig, vision: VisionConfig) -> tuple[int, int]:
    """What an image becomes that shares data.patches with all `images` of its conversation. Raises UserError."""
    factor, each = vision.patch_size * vision.shrink, max(vision.shrink**2, data.patches // max(1, images))
    return image_layout.smart_resize(height, width, factor, factor**2, each * vision.patch_size**2)


def _packed(
    key: str, decoded: list[np.ndarray], data: DataConfig, model: ModelConfig
) -> tuple[list[tuple[int, int]], dict[str, np.ndarray]]:
    """The grids of patches, and images [M, P, P, channels], image_segments [M], image_positions [M, 2].

    The f f patches that become one vector follow each other.
    """
    vision = model.vision
    side, near, length = vision.patch_size, vision.shrink, data.patches
    packed = np.zeros((length, side, side, vision.channels), np.uint8)
    positions, segments, grids, start = np.zeros((length, 2), np.int32), np.zeros(length, np.int32), [], 0
    for number, image in enumerate(decoded, start=1):
        with _of(key, number):
            height, width = native_size(*image.shape[:2], len(decoded), data, vision)
        resized = resize(image, height, width, data.image_resample)
        cut, grid = image_layout.patches(_channels(resized, vision.channels), side)
        if start + len(cut) > length:
            raise UserError(f"{key}: its images take {start + len(cut)} patches and more; data.patches={length}")
        where = np.indices(grid).reshape(2, -1).T
        order = np.lexsort((where[:, 1] % near, where[:, 0] % near, where[:, 1] // near, where[:, 0] // near))
        here = slice(start, start + len(cut))
        packed[here] = cut[order].reshape(-1, side, side, vision.channels)
        positions[here], segments[here] = where[order], number
        grids.append(grid)
        start += math.prod(grid)
    return grids, {"images": packed, "image_segments": segments, "image_positions": positions}

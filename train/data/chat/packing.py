"""Conversations that share a row: as many as fit, each a segment of its own, with its own images.

Which of them share one follows from their sizes, in tokens and images, which are found once from their texts, without
decoding an image. A row is then known by its number, as rows of documents are.

Legend: N conversations.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from model.config import ModelConfig
from tpu.errors import UserError
from train.config import DataConfig
from train.data.batch import Batch
from train.data.chat.record import IMAGE, Conversation, Side
from train.data.chat.template import Assembly, Tokens, rope_positions, row_fields, tokenize
from train.data.images.decode import Limits, size
from train.data.images.look import Looked, expanded, look, native_size, tile_grids, vector_grid
from train.data.images.tiles import best_grid
from train.data.text import cache
from train.data.text.tokenizer import Tokenizer

SIGHT = ("image_slots", "images_seen", "given")  # the fields of rows that only models that see take
OPEN_ROWS = 64  # that are looked at for room
CODE = ("packing", "template", "llava", "sources", "tar_shards")  # files here that sizes depend on


class Part(NamedTuple):
    """A conversation, ready to be joined to others in a row."""

    tokens: Tokens
    looked: Looked


def part(
    conversation: Conversation, tokenizer: Tokenizer, data: DataConfig, model: ModelConfig, counts: Counter[str]
) -> Part:
    """Tokens and images of a conversation; counts it where it is cut. Raises UserError for one that makes no row."""
    _check_sight(conversation, model)
    looked = look(conversation, data, model) if model.vision.encoder != "none" else Looked(conversation, (), {})
    tokens = tokenize(looked.conversation, looked.vectors, tokenizer, assembly_of(data))
    if not any(tokens.learned):
        raise UserError(f"{conversation.key}: the assistant says nothing")
    if tokens.cut:
        counts["cut_conversations"] += 1
    return Part(tokens, looked)


def joined(parts: Sequence[Part], data: DataConfig, model: ModelConfig) -> Batch:
    """The row [T] of these conversations, which learns what the assistant says in each.

    Raises UserError where they do not fit, which they did when they were measured.
    """
    sees, turned = model.vision.encoder != "none", None
    if model.rope_sections:
        turned = [rope_positions(part.tokens, part.looked.grids) for part in parts]
    tokens = [part.tokens for part in parts]
    images = joined_images([part.looked.fields for part in parts], data.image_fit == "native") if sees else {}
    if len(parts) > 1 and sum(len(part.ids) - 1 for part in tokens) > data.context:
        raise UserError(f"{parts[0].looked.conversation.key}: its images have changed since data.sources was opened")
    fields = row_fields(tokens, assembly_of(data), turned if sees else None)
    return {name: fields[name] for name in fields if sees or name not in SIGHT} | images


def joined_images(parts: Sequence[dict[str, np.ndarray]], native: bool) -> dict[str, np.ndarray]:
    """The images of several conversations as those of one row; of `native` ones patches, numbered by their images."""
    if len(parts) == 1:
        return parts[0]
    row, at, before = {name: np.zeros_like(array) for name, array in parts[0].items()}, 0, 0
    for segment, fields in enumerate(parts, start=1):
        used = int(np.count_nonzero(fields["image_segments"]))
        for name, array in fields.items():
            row[name][at : at + used] = array[:used]
        number = fields["image_segments"][:used] + before if native else segment
        row["image_segments"][at : at + used] = number
        at, before = at + used, before + int(fields["image_segments"].max(initial=0))
    return row


def assembly_of(data: DataConfig) -> Assembly:
    """How rows are made."""
    return Assembly(data.context, data.user_format, data.assistant_format)


def room(data: DataConfig) -> tuple[int, int]:
    """Tokens of a row, and its images, or patches of native ones."""
    return data.context, data.patches if data.image_fit == "native" else data.images


def depends_on_pictures(data: DataConfig, model: ModelConfig) -> bool:
    """Whether the size of a conversation is known only when the headers of its images have been read."""
    return model.vision.encoder != "none" and (data.image_fit in ("native", "tiles") or data.frames > 0)


def measure(conversation: Conversation, tokenizer: Tokenizer, data: DataConfig, model: ModelConfig) -> tuple[int, int]:
    """What a conversation takes of a row's `room`. Raises UserError for one that makes no row.

    Images are looked at where `depends_on_pictures` alone, their headers only.
    """
    _check_sight(conversation, model)
    vision, count = model.vision, sum(turn.text.count(IMAGE) for turn in conversation.turns)
    if vision.encoder == "none" or not count:
        taken, grids = 0, []
    elif data.frames:
        return room(data)  # How many there are of an animated file, only its end says.
    elif data.image_fit in ("native", "tiles"):
        limits = Limits(megapixels=data.max_megapixels)
        names = (f"{conversation.key}, image {number}" for number in range(1, count + 1))
        sides = [size(image, limits, name) for image, name in zip(conversation.images, names, strict=False)]
        if data.image_fit == "native":
            pixels = [native_size(*of, len(sides), data, vision) for of in sides]
            patches = [(height // vision.patch_size, width // vision.patch_size) for height, width in pixels]
            taken = sum(map(math.prod, patches))
            grids = [(rows // vision.shrink, columns // vision.shrink) for rows, columns in patches]
        else:
            tiles = [1 + math.prod(best_grid(*of, tile_grids(data), vision.image_size)) for of in sides]
            conversation, taken = expanded(conversation, tiles), sum(tiles)
            grids = [vector_grid(vision)] * taken
    else:
        taken, grids = count, [vector_grid(vision)] * count
    vectors = [math.prod(grid) if model.fusion == "merge" else 0 for grid in grids]
    if vision.encoder == "none":
        vectors = [0] * count
    tokens = tokenize(conversation, vectors, tokenizer, assembly_of(data))
    return len(tokens.ids) - 1, taken


def _check_sight(conversation: Conversation, model: ModelConfig) -> None:
    if model.vision.encoder == "none" and conversation.images:
        raise UserError(f"{conversation.key}: has images, and model.vision.encoder='none' cannot see")


def groups(
    side: Side, source: tuple[str, str], tokenizer: Tokenizer, data: DataConfig, model: ModelConfig
) -> list[list[int]]:
    """The numbers of the records of every row of a side. What makes no row has one to itself: reading it tells why.

    Sizes that do not depend on pictures come from the cache or go into it, by the `source`: a digest, and the side.
    """
    pictures, most = depends_on_pictures(data, model), room(data)

    def taken(number: int) -> tuple[int, int]:
        try:
            conversation = side.read(number) if pictures else side.text(number)
            return measure(conversation, tokenizer, data, model)
        except UserError:
            return most

    def sizes() -> np.ndarray:
        return np.array([taken(number) for number in range(side.length)], np.int32).reshape(-1, 2)

    if pictures:
        return together(sizes(), most)
    vision = model.vision
    settings = [*source, data.holdout, tokenizer.to_dict(), dataclasses.asdict(assembly_of(data)), data.images]
    settings += [vision.encoder, vector_grid(vision) if vision.encoder != "none" else None, model.fusion]
    settings += [Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8") for name in CODE]
    return together(cache.array(data, f"sizes-{cache.digest(settings)}.npy", sizes), most)


def together(sizes: Iterable[tuple[int, int]], room: tuple[int, int]) -> list[list[int]]:
    """The numbers of the conversations of every row: each goes to the first of the rows still open that has room.

    A row closes when OPEN_ROWS later ones are open. Whatever is as large as `room`, or larger, has a row to itself.
    """
    rows: list[list[int]] = []
    left, first = np.zeros((0, 2), np.int64), 0  # of rows[first:]
    for number, taken in enumerate(sizes):
        fits = np.flatnonzero((left >= taken).all(1))
        if len(fits):
            rows[first + fits[0]].append(number)
            left[fits[0]] -= taken
            continue
        rows.append([number])
        left = np.concatenate([left, [np.maximum(np.subtract(room, taken), 0)]])
        closed = max(0, len(left) - OPEN_ROWS)
        left, first = left[closed:], first + closed
    return rows

"""From conversations to a row: the one place where texts, images and frames become tokens and places for images.

A conversation is [end of document, user, assistant, end of document, user, ...], and a row holds one or several, each a
segment of its own. Where an image stands in a text, a model that
merges images gets as many tokens as the image has vectors, and any other none: there an image has been seen by the
tokens after it. What the assistant says, with what its format has after that, and the end, is learned; all else is
given. Frames of a video stand one after the other, each with its time before it.

An image is never cut. What does not fit is cut at the end of the text, or the record is refused.

Legend: T tokens per row.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from model.positions.sections import turns
from tpu.errors import UserError
from train.data.chat.record import IMAGE, Conversation
from train.data.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Assembly:
    """How rows are made: of T = `context` tokens, with these formats around what each side says."""

    context: int
    user_format: str
    assistant_format: str


class Tokens(NamedTuple):
    """A conversation as one run of tokens, each with what is known of it."""

    ids: list[int]
    slots: list[int]  # which of the conversation's image vectors stands there, -1 for text
    seen: list[int]  # images up to and with this token
    learned: list[bool]  # whether the assistant is to say it
    cut: bool = False  # whether something at the end was left out
    vectors: tuple[int, ...] = ()  # of each image


def tokenize(
    conversation: Conversation,
    vectors: Sequence[int],
    tokenizer: Tokenizer,
    assembly: Assembly,
    answer: bool = True,
) -> Tokens:
    """The tokens of a conversation; without `answer`, of what stands before the assistant's last turn.

    vectors: of each image; 0: it stands between tokens. Raises UserError where there are more or fewer images in the
    text, and where images and questions do not fit into a row.
    """
    placed = sum(turn.text.count(IMAGE) for turn in conversation.turns)
    if placed != len(vectors):
        raise UserError(f"{conversation.key}: {placed} {IMAGE} in the text, {len(vectors)} images; must be as many")
    end = tokenizer.end_of_document
    ids, slots, seen, learned = [tokenizer.beginning], [-1], [0], [False]

    def add(new: list[int], from_slot: int, of_assistant: bool) -> None:
        ids.extend(new)
        slots.extend(range(from_slot, from_slot + len(new)) if from_slot >= 0 else [-1] * len(new))
        seen.extend([images] * len(new))
        learned.extend([of_assistant] * len(new))

    images, last = 0, len(conversation.turns) - 1
    for number, turn in enumerate(conversation.turns):
        of_assistant = turn.role == "assistant"
        before, _, after = (assembly.assistant_format if of_assistant else assembly.user_format).partition("{}")
        if of_assistant:  # Apart from the answer, as a prompt ends with it: no token reaches from one into the other.
            add(tokenizer.encode(before) if before else [], -1, False)
            if number == last and not answer:
                break
            before = ""
        pieces = (before + turn.text + after).split(IMAGE)
        for index, piece in enumerate(pieces):
            if index:
                images += 1
                add([end] * vectors[images - 1], sum(vectors[: images - 1]), False)
            if index < len(pieces) - 1 and conversation.times:
                piece += f"{conversation.times[images]:g} s:"
            add(tokenizer.encode(piece) if piece else [], -1, of_assistant)
        if of_assistant:
            add([end], -1, True)
    return _fitted(Tokens(ids, slots, seen, learned, vectors=tuple(vectors)), conversation, assembly, answer)


def _fitted(tokens: Tokens, conversation: Conversation, assembly: Assembly, answer: bool) -> Tokens:
    """The tokens cut to a row and the target of its last position. Raises UserError where that is no row any more."""
    room = assembly.context + answer
    images_end = max((i + 1 for i, slot in enumerate(tokens.slots) if slot >= 0), default=0)
    if len(tokens.ids) <= room and images_end <= assembly.context:
        return tokens
    first_learned = tokens.learned.index(True) if answer and True in tokens.learned else len(tokens.ids)
    if images_end > assembly.context or first_learned >= room or not answer:
        raise UserError(
            f"{conversation.key}: its images and questions take {len(tokens.ids)} tokens; data.context="
            f"{assembly.context} (images alone take {sum(slot >= 0 for slot in tokens.slots)})"
        )
    return Tokens(*(part[:room] for part in tokens[:4]), cut=True, vectors=tokens.vectors)


def rope_positions(tokens: Tokens, grids: Sequence[tuple[int, int]]) -> np.ndarray:
    """Time, row and column that each token is turned by with model.rope_sections, [tokens, 3] int32.

    grids: rows and columns of each image's vectors. An image lies at one time.
    """
    runs, at, shown = [], 0, iter(grids)
    while at < len(tokens.ids):
        grid = next(shown) if tokens.slots[at] >= 0 else None
        runs.append((1, *grid) if grid else 1)
        at += math.prod(grid) if grid else 1
    return turns(runs)


def row_fields(
    parts: Sequence[Tokens], assembly: Assembly, turned: Sequence[np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """The fields of a `train.data.batch.Batch` [T] of conversations with their answers, one after the other, padded to
    T. Their images are those of the row in the same order.

    turned: `rope_positions` of each, with model.rope_sections.
    """
    fields = {name: [] for name in ("tokens", "targets", "loss_weights", "segments", "positions")}
    fields |= {name: [] for name in ("image_slots", "images_seen", "given")}
    vectors, images = 0, 0  # of the parts before
    for number, part in enumerate(parts, start=1):
        count = len(part.ids) - 1
        given = part.learned.index(True) if True in part.learned else len(part.ids)
        fields["tokens"] += part.ids[:-1]
        fields["targets"] += part.ids[1:]
        fields["loss_weights"] += part.learned[1:]
        fields["segments"] += [number] * count
        fields["positions"] += range(count)
        fields["image_slots"] += [slot + vectors if slot >= 0 else -1 for slot in part.slots[:-1]]
        fields["images_seen"] += [seen + images for seen in part.seen[:-1]]
        fields["given"] += [1] * min(given, count) + [0] * (count - given)
        vectors, images = vectors + sum(part.vectors), images + len(part.vectors)
    T, used = assembly.context, len(fields["tokens"])

    def padded(name: str) -> np.ndarray:
        dtype, fill = np.float32 if name == "loss_weights" else np.int32, -1 if name == "image_slots" else 0
        return np.array([*fields[name], *[fill] * (T - used)], dtype)

    row = {name: padded(name) for name in fields}
    if turned is not None:
        row["rope_positions"] = np.zeros((T, 3), np.int32)
        row["rope_positions"][:used] = np.concatenate([part[:-1] for part in turned])
    return row

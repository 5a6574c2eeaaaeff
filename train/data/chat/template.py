"""From a conversation to a row: the one place where texts, images and frames become tokens and places for images.

A row is [end of document, user, assistant, end of document, user, ...]. Where an image stands in a text, a model that
merges images gets as many tokens as the image has vectors, and any other none: there an image has been seen by the
tokens after it. What the assistant says, with what its format has after that, and the end, is learned; all else is
given. Frames of a video stand one after the other, each with its time before it.

An image is never cut. What does not fit is cut at the end of the text, or the record is refused.

Legend: T tokens per row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

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
    return _fitted(Tokens(ids, slots, seen, learned), conversation, assembly, answer)


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
    return Tokens(*(part[:room] for part in tokens[:4]), cut=True)


def row_fields(tokens: Tokens, assembly: Assembly) -> dict[str, np.ndarray]:
    """The fields of a `train.data.batch.Batch` [T] that tokens with their answers make, padded to T."""
    T, count = assembly.context, len(tokens.ids) - 1
    given = tokens.learned.index(True) if True in tokens.learned else len(tokens.ids)

    def padded(values: list[int], fill: int = 0) -> np.ndarray:
        return np.array([*values[:T], *[fill] * (T - min(T, len(values)))], np.int32)

    weights = np.zeros(T, np.float32)
    weights[:count] = tokens.learned[1:]
    return {
        "tokens": padded(tokens.ids[:-1]),
        "targets": padded(tokens.ids[1:]),
        "loss_weights": weights,
        "segments": padded([1] * count),
        "positions": padded(list(range(count))),
        "image_slots": padded(tokens.slots[:-1], -1),
        "images_seen": padded(tokens.seen[:-1]),
        "given": padded([1] * min(given, count)),
    }

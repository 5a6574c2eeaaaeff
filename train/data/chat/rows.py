"""Sources of conversations about images, as rows: by random access, so that a batch is a pure function of its number.

scenes:question and others of train.data.made.made    made here; see there for the names
DIR/*.jsonl, *.json (LLaVA's format), *.tar      files, as train.data.chat.sources reads them
tfds:NAME[:SPLIT]                                TensorFlow Datasets with an image and a text or a label

Legend: T tokens per row, N images per row, S pixels along a side of an image.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from model.config import ModelConfig
from tpu.errors import UserError
from train.config import DataConfig
from train.data.batch import Batch
from train.data.chat import packing
from train.data.chat import sources as image_text
from train.data.chat.record import IMAGE, Conversation, Side
from train.data.chat.skipping import Skipping, walk
from train.data.images.look import look
from train.data.made import made
from train.data.text.sources import is_held_out
from train.data.text.tokenizer import Tokenizer

MADE_TRAIN, MADE_HELD_OUT = 2**20, 512  # records of a source that is made here


@dataclasses.dataclass(frozen=True)
class ConversationSource:
    """Both sides of one entry of data.sources, and a digest of what it holds."""

    name: str
    train: Side
    held_out: Side
    digest: str
    names: tuple[str, ...] = ()  # of all classes, where the source lists them
    alone: bool = False  # whether each record has a row to itself, for it costs too much to know its size, or is known


def open_source(name: str, data: DataConfig, size: int) -> ConversationSource:
    """Opens an entry of data.sources; images made here get `size` pixels along a side. Raises UserError."""
    if name in made.NAMES or name.partition(":")[0] in made.MAKERS:
        made.make(name, 0, "train", 0, size)

        def side(split: str, length: int) -> Side:
            read = functools.partial(made.make, name, 0, split, size=size)
            return Side(length, read, read)

        held_out = side("test", MADE_HELD_OUT if data.holdout else 0)
        listed = made.ANSWERS.get(name, ())
        return ConversationSource(name, side("train", MADE_TRAIN), held_out, made.digest(), listed, alone=True)
    found = image_text.open_source(name, data, image_field=data.image_field, text_field=data.caption_field)
    numbers: dict[bool, list[int]] = {False: [], True: []}
    for index in range(len(found)):
        numbers[is_held_out(found.key(index), data.holdout)].append(index)

    def of(held_out: bool) -> Side:
        chosen = np.array(numbers[held_out], np.int64)
        return Side(len(chosen), lambda index: found[int(chosen[index])], lambda index: found.text(int(chosen[index])))

    alone = name.startswith("tfds:") and data.images == 1 and data.image_fit != "native"
    return ConversationSource(name, of(False), of(True), found.digest, found.names, alone)


class Rows(Sequence[Batch]):
    """Rows of one side of a source, made on access of what stands in each; the few bad records are left out, and good
    rows stand in for those that have no other."""

    def __init__(
        self,
        name: str,
        side: Side,
        make: Callable[[Conversation, Counter[str]], Any],
        data: DataConfig,
        join: Callable[[list[Any]], Batch] = lambda parts: parts[0],
        groups: Sequence[Sequence[int]] | None = None,
    ):
        """name: of source and side in messages; make: of a record what `join` makes a row of, adding to the counter
        what it left out; groups: the records of each row; None: one in each."""
        self.name, self.made = name, 0  # rows
        self._cut: Counter[str] = Counter()
        self._records = good(side, data, lambda conversation: make(conversation, self._cut))
        self._join, self._groups = join, groups

    def __len__(self) -> int:
        return len(self._records) if self._groups is None else len(self._groups)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        for row in walk(int(index), len(self)):
            numbers = (row,) if self._groups is None else self._groups[row]
            if parts := [part for number in numbers if (part := self._records.get(number)) is not None]:
                self.made += 1
                return self._join(parts)
        raise self._records.none_good()

    def left_out(self) -> Counter[str]:
        """What was left out since the process began: rows that were cut, and records read over, by what is wrong."""
        return self._cut + self._records.reasons


def conversation_row(
    conversation: Conversation, tokenizer: Tokenizer, data: DataConfig, model: ModelConfig, counts: Counter[str]
) -> Batch:
    """A row [T] that learns what the assistant says. Raises UserError for a conversation that makes none."""
    return packing.joined([packing.part(conversation, tokenizer, data, model, counts)], data, model)


def last_answer(conversation: Conversation) -> str:
    """What the assistant says last. Raises UserError where it says nothing."""
    return _last(conversation, "assistant")


def _last(conversation: Conversation, role: str) -> str:
    for turn in reversed(conversation.turns):
        if turn.role == role:
            return turn.text
    raise UserError(f"{conversation.key}: the {role} says nothing")


def text_row(text: str, tokenizer: Tokenizer, context: int) -> Batch:
    """A text alone as a row [T] of a contrastive model, [beginning, text, end, end, ...], where ends but the first are
    padding (as CLIP and SigLIP have it); its first position has the row's weight."""
    return _text_row(tokenizer.encode(text), tokenizer, context)


def _text_row(text: list[int], tokenizer: Tokenizer, context: int) -> Batch:
    end = tokenizer.end_of_document
    ids = [tokenizer.beginning, *text[: context - 2], end][:context]
    tokens = np.full(context, end, np.int32)
    tokens[: len(ids)] = ids
    there, steps = (np.arange(context) < len(ids)).astype(np.int32), np.arange(context, dtype=np.int32)
    weights = (steps == 0).astype(np.float32)
    found = {"tokens": tokens, "targets": tokens, "loss_weights": weights}
    return found | {"segments": there, "positions": steps * there}


def caption_row(
    conversation: Conversation, tokenizer: Tokenizer, data: DataConfig, model: ModelConfig, counts: Counter[str]
) -> Batch:
    """A row of an image and a text about it, what the assistant says last (contrastive)."""
    return _said(last_answer(conversation), tokenizer, data, counts) | _one_image(conversation, data, model)


def question_row(
    conversation: Conversation,
    names: dict[str, int],
    tokenizer: Tokenizer,
    data: DataConfig,
    model: ModelConfig,
    counts: Counter[str],
) -> Batch:
    """A row [T] of an image, what the user says last about it, and, at its first position, its class, which what
    counts in the assistant's last answer is the name of."""
    row = _said(_last(conversation, "user").replace(IMAGE, "").strip(), tokenizer, data, counts)
    number = _number(conversation, made.answer(last_answer(conversation)), names)
    targets = np.where(np.arange(data.context) == 0, number, 0).astype(np.int32)
    return row | {"targets": targets} | _one_image(conversation, data, model)


def _said(text: str, tokenizer: Tokenizer, data: DataConfig, counts: Counter[str]) -> Batch:
    """The row [T] of a text, which is counted where it has to be cut."""
    ids = tokenizer.encode(text)
    if len(ids) > data.context - 2:
        counts["cut_texts"] += 1
    return _text_row(ids, tokenizer, data.context)


def class_row(conversation: Conversation, names: dict[str, int], data: DataConfig, model: ModelConfig) -> Batch:
    """A row [1] of an image and its class, which what the assistant says last is the name of."""
    number = _number(conversation, last_answer(conversation), names)
    one, target = np.ones(1, np.int32), np.array([number], np.int32)
    row = {"tokens": 0 * one, "targets": target, "loss_weights": one.astype(np.float32)}
    return row | {"segments": one, "positions": 0 * one} | _one_image(conversation, data, model)


def _number(conversation: Conversation, name: str, names: dict[str, int]) -> int:
    if name not in names:
        raise UserError(f"{conversation.key}: {name!r} is none of the {len(names)} classes")
    return names[name]


def _one_image(conversation: Conversation, data: DataConfig, model: ModelConfig) -> dict[str, np.ndarray]:
    if len(conversation.images) != 1:
        raise UserError(f"{conversation.key}: {len(conversation.images)} images; one is wanted")
    fields = look(conversation, data, model).fields
    return {name: array[:1] for name, array in fields.items()}


def good(side: Side, data: DataConfig, read: Callable[[Conversation], Any] = lambda record: record) -> Skipping:
    """What `read` makes of the records of a side, where good ones stand in for the few bad ones."""
    return Skipping(lambda index: read(side.read(index)), side.length, data.max_bad_fraction)


def class_names(
    sources: Sequence[ConversationSource],
    labels: int,
    data: DataConfig,
    of: Callable[[str], str] = lambda said: said,
) -> tuple[str, ...]:
    """The classes of all sources in order; `of`: the class that something said is of. Raises UserError as soon as more
    than `labels` are found."""
    names: set[str] = set()
    for name in (name for source in sources for name in _names_of(source, data)):
        names.add(of(name))
        if len(names) > labels:
            raise UserError(f"model.labels={labels}: there are more classes: {', '.join(sorted(names)[:20])}")
    return tuple(sorted(names))


def _names_of(source: ConversationSource, data: DataConfig) -> Iterator[str]:
    """The classes that a source lists; else the class of every record, read without its images."""
    if source.names:
        yield from source.names
        return
    for side in (source.train, source.held_out):
        said = good(dataclasses.replace(side, read=side.text), data, last_answer)
        yield from (said[index] for index in range(side.length))


@dataclasses.dataclass(frozen=True)
class Conversations:
    """All sources as rows, and reports as `Labelled` has them, but of what is passed over, which
    only `Rows.left_out` knows."""

    train: list[Sequence[Batch]]
    held_out: list[Sequence[Batch]]
    labels: tuple[str, ...]
    reports: list[dict[str, Any]]


def open_sources(data: DataConfig, model: ModelConfig) -> list[ConversationSource]:
    """Opens all of data.sources. Raises UserError."""
    return [open_source(name, data, model.vision.image_size) for name in data.sources]


def load(
    sources: Sequence[ConversationSource],
    data: DataConfig,
    make: Callable[[Conversation, Counter[str]], Any],
    names: tuple[str, ...] = (),
    join: Callable[[list[Any]], Batch] = lambda parts: parts[0],
    groups: Callable[[ConversationSource, str, Side], Sequence[Sequence[int]] | None] = lambda source, name, side: None,
) -> Conversations:
    """The rows of all sources, made as `Rows` takes `make`, `join` and, of a side by its name, `groups`; `names` are
    those of the labels."""

    def rows(source: ConversationSource, name: str, side: Side) -> Rows:
        return Rows(name, side, make, data, join, groups(source, name, side))

    def count(side: Side) -> dict[str, int]:
        return {"documents": side.length, "bytes": 0, "tokens": 0}

    reports = [
        {
            "source": s.name,
            "digest": s.digest,
            "train": count(s.train),
            "held_out": count(s.held_out),
        }
        for s in sources
    ]
    train = [rows(s, f"{s.name}, train", s.train) for s in sources]
    held_out = [rows(s, f"{s.name}, held out", s.held_out) for s in sources]
    return Conversations(train, held_out, names, reports)


def texts(data: DataConfig, size: int, limit: int = 10_000) -> Iterator[str]:
    """What is said in the first training records of every source, for a tokenizer to learn from."""
    for name in data.sources:
        side = good(open_source(name, data, size).train, data)
        for index in range(min(limit, len(side))):
            yield from (turn.text for turn in side[index].turns)

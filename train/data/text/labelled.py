"""Labelled records: lines of .jsonl files with a text, perhaps a second one, and what is to be said of them.

`data.text_field`, `data.pair_field` and `data.label_field` name the fields. The label is

    classification        a name                              multi_label           a list of names
    regression            a number, or a list of them         sequence_to_sequence  the text to write
    token_classification  [[start, end, name], ...]           span                  [start, end], the answer's

with characters [start, end) counted in the text. A record is one row: end of document, text, and, where there is a
second text, end of document and that, as token type 1. What a task makes of the label is the objective's
(`train.objectives.labels`, `train.objectives.sequence_to_sequence`).

Legend: T tokens per row.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from tpu.errors import UserError
from train.config import DataConfig
from train.data.batch import Batch
from train.data.text.sources import is_held_out, labelled_records, source_digest
from train.data.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Text:
    """What is read of a record."""

    tokens: np.ndarray  # [T] int32
    valid: np.ndarray  # [T] int32, 0 for padding
    types: np.ndarray  # [T] int32, 1 for the second text
    spans: list[tuple[int, int]]  # which characters of the text its tokens, from token 1 on, stand for

    def touched(self, start: int, end: int) -> np.ndarray:
        """Which tokens of the text, from token 1 on, hold a character of [start, end)."""
        return np.array([a < end and b > start for a, b in self.spans], bool)


class Task(NamedTuple):
    """What is to be said of records."""

    name: str  # of the objective
    needs: str  # what a label must be, in words
    is_label: Callable[[Any, int], bool]  # whether this is a label of a text of so many characters
    row: Callable[[Text, Any, Sequence[str], Counter[str]], Batch] | None = None  # (text, label, all names, counts)
    names: Callable[[Any], Iterable[str]] = lambda label: ()  # that a label holds
    unnamed: tuple[str, ...] = ()  # names of the first labels, which no record gives


@dataclasses.dataclass(frozen=True)
class Labelled:
    """All records, as rows (Batches of arrays [T]) per entry of data.sources."""

    train: list[list[Batch]]
    held_out: list[list[Batch]]
    labels: tuple[str, ...]  # names, in the order of their numbers; () where labels have no names
    reports: list[dict[str, Any]]  # per source: documents, bytes and tokens of both sides, what was passed over, digest


def load(data: DataConfig, task: Task, labels: int, tokenizer: Tokenizer) -> Labelled:
    """Reads all of `data.sources`. Raises UserError naming the line of a record that is not as it should be, and where
    there are more names than `labels`."""
    records = [_records(source, data, task) for source in data.sources]
    names = _names([record for source in records for record in source[0]], task, labels)
    train, held_out, reports = [], [], []
    for source, (found, counts) in zip(data.sources, records, strict=True):
        sides: dict[str, list[Batch]] = {"train": [], "held_out": []}
        tallies = {side: Counter(documents=0, bytes=0, tokens=0) for side in sides}
        for record in found:
            key = hashlib.blake2b(record.text.encode(errors="replace"), digest_size=16).hexdigest()
            side = "held_out" if is_held_out(key, data.holdout) else "train"
            text = _text(record, data, tokenizer, counts)
            sides[side].append(task.row(text, record.label, names, counts))
            size = len(record.text.encode(errors="replace"))
            tallies[side].update(documents=1, bytes=size, tokens=int(text.valid.sum()))
        train.append(sides["train"])
        held_out.append(sides["held_out"])
        report = {"source": source, "digest": source_digest(source, data), "passed_over": dict(counts)}
        reports.append(report | {side: dict(tally) for side, tally in tallies.items()})
    return Labelled(train, held_out, tuple(names), reports)


@dataclasses.dataclass(frozen=True)
class _Record:
    place: str
    text: str
    pair: str
    label: Any


def _records(source: str, data: DataConfig, task: Task) -> tuple[list[_Record], Counter[str]]:
    counts: Counter[str] = Counter()
    found = []
    for place, record in labelled_records(source, data, counts):
        fields = [data.text_field, data.label_field] + ([data.pair_field] if data.pair_field else [])
        for field in fields:
            if field not in record:
                raise UserError(f"{place}: no field {field!r}; has {', '.join(record) or 'none'}")
        text, label, *pair = (record[field] for field in fields)
        if not all(isinstance(part, str) for part in (text, *pair)):
            raise UserError(f"{place}: data.text_field={data.text_field!r} and data.pair_field must hold text")
        if not task.is_label(label, len(text)):
            raise UserError(f"{place}: {data.label_field!r} holds {label!r:.60}; {task.name} needs {task.needs}")
        found.append(_Record(place, text, "".join(pair), label))
    return found, counts


def is_span(span: Any, size: int, *more: type) -> bool:
    """Whether this is [start, end, ...] in a text of so many characters, with values of these types after the two."""
    right = isinstance(span, list) and [type(part) for part in span] == [int, int, *more]
    return right and 0 <= span[0] < span[1] <= size


def _names(records: Sequence[_Record], task: Task, labels: int) -> list[str]:
    """The names of the labels in order."""
    names = {name for record in records for name in task.names(record.label)}
    found = [*task.unnamed, *sorted(names)]
    if names and len(found) > labels:
        raise UserError(f"model.labels={labels}: the records have {len(found)}: {', '.join(found[:20])}")
    return found


def _text(record: _Record, data: DataConfig, tokenizer: Tokenizer, counts: Counter[str]) -> Text:
    T, end = data.context, tokenizer.end_of_document
    ids, spans = tokenizer.encode_with_spans(record.text)
    second = [end, *tokenizer.encode(record.pair)] if data.pair_field else []
    room = max(0, T - 1 - len(second))
    if len(ids) > room:
        counts["cut_records"] += 1
    ids, spans = ids[:room], spans[:room]
    valid = (np.arange(T) < 1 + len(ids) + len(second)).astype(np.int32)
    types = (np.arange(T) > len(ids)).astype(np.int32) * valid
    return Text(padded([tokenizer.beginning, *ids, *second], T), valid, types, spans)


def padded(ids: list[int], size: int) -> np.ndarray:
    """The first tokens as a row [size] int32, filled up with 0."""
    row = np.zeros(size, np.int32)
    row[: min(size, len(ids))] = ids[:size]
    return row

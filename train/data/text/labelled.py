"""Labelled records: lines of .jsonl files with a text, perhaps a second one, and what is to be said of them.

`data.text_field`, `data.pair_field` and `data.label_field` name the fields. The label is

    classification        a name                              multi_label           a list of names
    regression            a number, or a list of them         sequence_to_sequence  the text to write
    token_classification  [[start, end, name], ...]           span                  [start, end], the answer's

with characters [start, end) counted in the text. A record is one row: end of document, text, and, where there is a
second text, end of document and that, as token type 1. The label of a whole text stands at its first token.

Legend: T tokens per row, U of a sequence_to_sequence target, L labels.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from tpu.errors import UserError
from train.config import DataConfig
from train.data.batch import Batch
from train.data.text.sources import is_held_out, labelled_records, source_digest
from train.data.text.tokenizer import Tokenizer

Spans = list[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Labelled:
    """All records, as rows (Batches of arrays [T]) per entry of data.sources."""

    train: list[list[Batch]]
    held_out: list[list[Batch]]
    labels: tuple[str, ...]  # names, in the order of their numbers; () where labels have no names
    reports: list[dict[str, Any]]  # per source: documents, bytes and tokens of both sides, what was passed over, digest


def load(data: DataConfig, objective: str, labels: int, tokenizer: Tokenizer) -> Labelled:
    """Reads all of `data.sources`. Raises UserError naming the line of a record that is not as it should be."""
    records = [_records(source, data, objective) for source in data.sources]
    names = _names([record for source in records for record in source[0]], objective, labels)
    train, held_out, reports = [], [], []
    for source, (found, counts) in zip(data.sources, records, strict=True):
        sides: dict[str, list[Batch]] = {"train": [], "held_out": []}
        tallies = {side: Counter(documents=0, bytes=0, tokens=0) for side in sides}
        for record in found:
            key = hashlib.blake2b(record.text.encode(errors="replace"), digest_size=16).hexdigest()
            side = "held_out" if is_held_out(key, data.holdout) else "train"
            row = _row(record, data, objective, names, labels, tokenizer, counts)
            sides[side].append(row)
            size = int((row.segments if row.inputs is None else row.input_segments).sum())
            tallies[side].update(documents=1, bytes=len(record.text.encode(errors="replace")), tokens=size)
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


def _records(source: str, data: DataConfig, objective: str) -> tuple[list[_Record], Counter[str]]:
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
        if not _is_label(objective, label, len(text)):
            raise UserError(f"{place}: {data.label_field!r} holds {label!r:.60}; {objective} needs {NEEDS[objective]}")
        found.append(_Record(place, text, "".join(pair), label))
    return found, counts


NEEDS = {
    "classification": "a name",
    "regression": "a number or a list of numbers",
    "multi_label": "a list of names",
    "token_classification": "[[start, end, name], ...] in characters of the text",
    "span": "[start, end] in characters of the text",
    "sequence_to_sequence": "a text",
}


def _is_label(objective: str, label: Any, size: int) -> bool:
    def is_span(span: Any, *more: type) -> bool:
        types = (int, int, *more)
        right = isinstance(span, list) and [type(part) for part in span] == list(types)
        return right and 0 <= span[0] < span[1] <= size

    if objective in ("classification", "sequence_to_sequence"):
        return isinstance(label, str)
    if objective == "span":
        return is_span(label)
    if objective == "regression" and not isinstance(label, list):
        label = [label]
    if not isinstance(label, list):
        return False
    if objective == "regression":
        return all(type(number) in (int, float) and np.isfinite(number) for number in label)
    if objective == "multi_label":
        return all(isinstance(name, str) for name in label)
    return all(is_span(span, str) for span in label)


def _names(records: Sequence[_Record], objective: str, labels: int) -> list[str]:
    """The names of the labels in order; 0 is what no label was given to, where tokens are classified."""
    names: set[str] = set()
    for record in records:
        if objective == "classification":
            names.add(record.label)
        elif objective == "multi_label":
            names.update(record.label)
        elif objective == "token_classification":
            names.update(name for _, _, name in record.label)
    found = ([""] if objective == "token_classification" else []) + sorted(names)
    if names and len(found) > labels:
        raise UserError(f"model.labels={labels}: the records have {len(found)}: {', '.join(found[:20])}")
    return found


def _row(
    record: _Record,
    data: DataConfig,
    objective: str,
    names: list[str],
    labels: int,
    tokenizer: Tokenizer,
    counts: Counter[str],
) -> Batch:
    T, end = data.context, tokenizer.end_of_document
    ids, spans = tokenizer.encode_with_spans(record.text)
    second = [end, *tokenizer.encode(record.pair)] if data.pair_field else []
    room = max(0, T - 1 - len(second))
    if len(ids) > room:
        counts["cut_records"] += 1
    ids, spans = ids[:room], spans[:room]
    row = _padded([tokenizer.beginning, *ids, *second], T)
    valid = (np.arange(T) < 1 + len(ids) + len(second)).astype(np.int32)
    if objective == "sequence_to_sequence":
        return _target(record.label, row, valid, data, tokenizer, counts)
    types = (np.arange(T) > len(ids)).astype(np.int32) * valid
    targets, weights = _labels(record.label, objective, names, labels, spans, T, counts)
    steps = np.arange(T, dtype=np.int32) * valid
    return Batch(row, targets, weights, valid, steps, token_types=types if data.pair_field else None)


def _labels(
    label: Any, objective: str, names: list[str], labels: int, spans: Spans, T: int, counts: Counter[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Targets and loss weights of a row as `train.losses.labels` reads them; `spans` are the text's tokens', from 1."""
    weights = np.zeros(T, np.float32)
    if objective == "token_classification":
        targets = np.zeros(T, np.int32)
        weights[1 : 1 + len(spans)] = 1.0
        for start, end, name in label:
            targets[1:][: len(spans)][_touched(spans, start, end)] = names.index(name)
        return targets, weights
    if objective == "span":
        targets = np.zeros((T, 2), np.float32)
        inside = np.flatnonzero(_touched(spans, *label))
        if not len(inside) or spans[inside[-1]][1] < label[1]:
            counts["cut_answers"] += 1  # The row has no answer, and weighs nothing.
            return targets, weights
        for which, token in enumerate((inside[0], inside[-1])):
            targets[1 + token, which] = 1.0
            weights[1 + token] += 0.5
        return targets, weights
    weights[0] = 1.0
    if objective == "classification":
        targets = np.zeros(T, np.int32)
        targets[0] = names.index(label)
        return targets, weights
    targets = np.zeros((T, labels), np.float32)
    if objective == "regression":
        numbers = label if isinstance(label, list) else [label]
        if len(numbers) != labels:
            raise UserError(f"model.labels={labels}: a record has {len(numbers)} numbers to predict")
        targets[0] = numbers
    else:
        targets[0, [names.index(name) for name in label]] = 1.0
    return targets, weights


def _target(
    text: str, row: np.ndarray, valid: np.ndarray, data: DataConfig, tokenizer: Tokenizer, counts: Counter[str]
) -> Batch:
    """A decoder row that begins with end of document and writes the text and end of document."""
    U, end = data.target_context or data.context, tokenizer.end_of_document
    ids = [*tokenizer.encode(text), end]
    if len(ids) > U:
        counts["cut_targets"] += 1
    there = (np.arange(U) < len(ids)).astype(np.int32)
    return Batch(
        tokens=_padded([end, *ids[:-1]], U),
        targets=_padded(ids, U),
        loss_weights=there.astype(np.float32),
        segments=there,
        positions=np.arange(U, dtype=np.int32) * there,
        inputs=row,
        input_segments=valid,
    )


def _touched(spans: Spans, start: int, end: int) -> np.ndarray:
    """Which tokens hold a character of [start, end)."""
    return np.array([a < end and b > start for a, b in spans], bool)


def _padded(ids: list[int], size: int) -> np.ndarray:
    row = np.zeros(size, np.int32)
    row[: min(size, len(ids))] = ids[:size]
    return row

"""The data path: sources → documents → tokens → packed rows → batches, of which a process makes its own rows only.

A training batch is a pure function of (seed, step), so the only state of the data is the step: a run resumes at any
step, on any number of hosts, with the batches it would have seen.

Legend: B rows per global batch, L those of them that this process makes, T tokens per row.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tpu.errors import UserError
from train.config import DataConfig
from train.data import cache
from train.data.batch import Batch
from train.data.packing import PackedRows, padding_row
from train.data.sources import documents, is_held_out
from train.data.tokenizer import ByteTokenizer, Tokenizer, from_file

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Everything `data` names, tokenised and packed, by row."""

    tokenizer: Tokenizer
    train: tuple[PackedRows, ...]  # one per entry of data.sources
    held_out: tuple[PackedRows, ...]  # one per entry that has held-out documents; empty where data.holdout is 0
    held_out_bytes: int  # UTF-8 bytes of the held-out documents: what bits per byte divides by
    held_out_tokens: int  # targets with weight 1 in the held-out rows, ends of documents included
    report: dict[str, Any]  # JSON-able: tokenizer size, and per source documents, bytes, tokens, digest


def load(data: DataConfig, *, tokenizer: Tokenizer | None = None) -> Corpus:
    """Reads, tokenises and packs all of `data.sources`, through the cache.

    tokenizer: that of a checkpoint, so that it is never trained again; without it, the one that data.tokenizer names.
    Raises UserError for sources that cannot be read or leave the train or the held-out side empty.
    """
    tokenizer = tokenizer or _tokenizer(data)
    sources = [cache.streams(source, data, tokenizer) for source in data.sources]
    for source in sources:
        _log(source.report)
    _check_sides([source.report for source in sources], data)
    held_out = [source.report["held_out"] for source in sources]
    return Corpus(
        tokenizer=tokenizer,
        train=tuple(PackedRows(s.train, data.context, tokenizer.end_of_document, keep_last=False) for s in sources),
        held_out=tuple(
            PackedRows(s.held_out, data.context, tokenizer.end_of_document, keep_last=True)
            for s in sources
            if len(s.held_out)
        ),
        held_out_bytes=sum(side["bytes"] for side in held_out),
        held_out_tokens=sum(side["tokens"] for side in held_out),
        report={"vocab_size": tokenizer.vocab_size, "sources": [source.report for source in sources]},
    )


def _tokenizer(data: DataConfig) -> Tokenizer:
    if data.tokenizer == "bytes":
        return ByteTokenizer()
    if data.tokenizer == "bpe":
        return cache.bpe_tokenizer(data)
    return from_file(data.tokenizer)


def _log(report: dict[str, Any]) -> None:
    train, held_out = report["train"], report["held_out"]
    log.info(
        "data %s: train %d documents, %d bytes, %d tokens, %.2f bytes/token; held out %d, %d, %d; %s; digest %s",
        report["source"],
        *(train["documents"], train["bytes"], train["tokens"], train["bytes"] / max(1, train["tokens"])),
        *(held_out["documents"], held_out["bytes"], held_out["tokens"]),
        ", ".join(f"{count} {name}" for name, count in report["passed_over"].items()) or "nothing passed over",
        report["digest"],
    )


def _check_sides(reports: list[dict[str, Any]], data: DataConfig) -> None:
    total = sum(report[side]["documents"] for report in reports for side in ("train", "held_out"))
    for report in reports:
        found = report["train"]["documents"] + report["held_out"]["documents"]
        if not found:
            raise UserError(f"data.sources: {report['source']!r} holds no text; give at least one document with some")
        if not report["train"]["documents"]:
            raise UserError(
                f"data.holdout={data.holdout}: keeps all of the {found} documents of {report['source']!r} for "
                "evaluation; give more documents or a smaller share"
            )
    if data.holdout and not any(report["held_out"]["documents"] for report in reports):
        raise UserError(
            f"data.holdout={data.holdout}: none of the {total} documents fell into the held-out share; "
            "give more documents or a larger share, or 0 for no held-out set"
        )


def held_out_documents(data: DataConfig) -> Iterator[str]:
    """Yields the held-out texts of all sources; the sum of their UTF-8 lengths is `Corpus.held_out_bytes`."""
    for source in data.sources:
        for document in documents(source, data, Counter()):
            if is_held_out(document.key, data.holdout):
                yield document.text


class _Selected:
    """The given rows of every global batch, one batch after the other, as Grain reads them."""

    def __init__(self, stream: Any, batch_size: int, rows: Sequence[int]) -> None:
        self._stream, self._batch_size, self._rows = stream, batch_size, rows

    def __len__(self) -> int:
        return len(self._stream) // self._batch_size * len(self._rows)

    def __getitem__(self, index: int) -> Batch:
        step, row = divmod(int(index), len(self._rows))
        return self._stream[step * self._batch_size + self._rows[row]]


def train_batches(
    corpus: Corpus, data: DataConfig, seed: int, start_step: int = 0, rows: Sequence[int] = ()
) -> Iterator[Batch]:
    """An endless iterator of training batches [L, T] from `start_step` on, made ahead in a thread.

    Every source is shuffled anew in each of its epochs and gives data.weights of the rows (by default in proportion to
    its rows). `close()` stops the thread; what fails in it is raised by `next`.

    rows: which rows of each global batch to make (see `tpu.distributed.rows_here`), ascending; none given: all.
    """
    import grain

    sources = [
        grain.MapDataset.source(rows).seed((seed + index) % 2**32).shuffle().repeat()
        for index, rows in enumerate(corpus.train)
    ]
    weights = data.weights or [len(rows) for rows in corpus.train]
    # Grain 0.2 overflows on batches of one row of an endless mixture; no run reaches this many.
    stream = grain.MapDataset.mix(sources, weights)[: 2**48]
    if rows:
        stream = grain.MapDataset.source(_Selected(stream, data.batch_size, rows))
    batches = stream.batch(len(rows) or data.batch_size)[start_step:]
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=data.prefetch)))


def held_out_batches(
    corpus: Corpus, data: DataConfig, batch_size: int, limit: int = 0, rows: Sequence[int] = ()
) -> Iterator[Batch]:
    """Yields the held-out rows in order as batches of `batch_size` rows, the last filled up with padding rows.

    rows: as in `train_batches`; the batches are [L, T] then, and [batch_size, T] without.
    limit: at most so many batches; 0: all. With a limit, bits per byte must count bytes as
    `held_out_bytes / held_out_tokens` per token of weight 1, for the bytes of single rows are not known.
    """
    stream = ((packed, index) for packed in corpus.held_out for index in range(len(packed)))
    padding = padding_row(data.context, corpus.tokenizer.end_of_document)
    count = 0
    while chunk := list(itertools.islice(stream, batch_size)):
        mine = [chunk[row] if row < len(chunk) else None for row in rows or range(batch_size)]
        made = [padding if place is None else place[0][place[1]] for place in mine]
        yield Batch(*(np.stack(arrays) for arrays in zip(*made, strict=True)))
        count += 1
        if count == limit:
            return

"""The data path: sources → documents → tokens → packed rows → batches, of which a process makes its own rows only.

A training batch is a pure function of (seed, step), so the only state of the data is the step: a run resumes at any
step, on any number of hosts, with the batches it would have seen.

Legend: B rows per global batch, L those of them that this process makes, T tokens per row.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from model.config import ModelConfig
from tpu.errors import UserError
from train.config import DataConfig, Experiment
from train.data import cache, conversations, labelled
from train.data.batch import Batch
from train.data.masking import Masking
from train.data.packing import PackedRows, padding_row
from train.data.sources import documents, is_held_out
from train.data.span_corruption import SpanCorruption
from train.data.tokenizer import ByteTokenizer, Tokenizer, from_file, train_bpe
from train.objectives import CONVERSATIONS, LABELLED

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Everything `data` names, tokenised and packed, by row."""

    tokenizer: Tokenizer
    train: tuple[Sequence[Batch], ...]  # one per entry of data.sources
    held_out: tuple[Sequence[Batch], ...]  # one per entry that has held-out documents; empty where data.holdout is 0
    held_out_bytes: int  # UTF-8 bytes of the held-out documents: what bits per byte divides by
    held_out_tokens: int  # targets with weight 1 in the held-out rows, ends of documents included
    report: dict[str, Any]  # JSON-able: tokenizer size, and per source documents, bytes, tokens, digest
    labels: tuple[str, ...] | None = None  # names of the labels, of labelled records only (train.data.labelled)


def load(
    data: DataConfig,
    *,
    tokenizer: Tokenizer | None = None,
    objective: str = "next_token",
    model: ModelConfig | None = None,
) -> Corpus:
    """Reads, tokenises and packs all of `data.sources`, through the cache.

    tokenizer: that of a checkpoint, so that it is never trained again; without it, the one that data.tokenizer names.
    objective: a name of `train.objectives.OBJECTIVES`; some read labelled records, or conversations, and need the
      `model`: how many labels it has, how it sees.
    Raises UserError for sources that cannot be read or leave the train or the held-out side empty.
    """
    if objective in CONVERSATIONS:
        tokenizer = tokenizer or _conversation_tokenizer(data, model)
    tokenizer = tokenizer or _tokenizer(data)
    if objective in LABELLED or objective in CONVERSATIONS:
        if objective in LABELLED:
            found = labelled.load(data, objective, model.labels, tokenizer)
        else:
            found = conversations.load(data, objective, model, tokenizer)
        for report in found.reports:
            _log(report)
        _check_sides(found.reports, data)
        return Corpus(
            tokenizer=tokenizer,
            train=tuple(found.train),
            held_out=tuple(rows for rows in found.held_out if rows),
            held_out_bytes=sum(report["held_out"]["bytes"] for report in found.reports),
            held_out_tokens=sum(report["held_out"]["tokens"] for report in found.reports),
            report={"vocab_size": tokenizer.vocab_size, "labels": list(found.labels), "sources": found.reports},
            labels=found.labels,
        )
    sources = [cache.streams(source, data, tokenizer) for source in data.sources]
    for source in sources:
        _log(source.report)
    _check_sides([source.report for source in sources], data)
    held_out = [source.report["held_out"] for source in sources]
    packed = functools.partial(
        PackedRows, context=data.context, end_of_document=tokenizer.end_of_document, continuing=data.contiguous
    )
    corpus = Corpus(
        tokenizer=tokenizer,
        train=tuple(packed(s.train, keep_last=False) for s in sources),
        held_out=tuple(packed(s.held_out, keep_last=True) for s in sources if len(s.held_out)),
        held_out_bytes=sum(side["bytes"] for side in held_out),
        held_out_tokens=sum(side["tokens"] for side in held_out),
        report={"vocab_size": tokenizer.vocab_size, "sources": [source.report for source in sources]},
    )
    if data.contiguous and (found := sum(map(len, corpus.train))) < data.batch_size:
        raise UserError(
            f"data.batch_size={data.batch_size}: data.contiguous=True needs at least as many rows of data.context="
            f"{data.context} tokens, and the sources have {found}"
        )
    return corpus


def _tokenizer(data: DataConfig) -> Tokenizer:
    if data.tokenizer == "bytes":
        return ByteTokenizer()
    if data.tokenizer == "bpe":
        return cache.bpe_tokenizer(data)
    return from_file(data.tokenizer)


def _conversation_tokenizer(data: DataConfig, model: ModelConfig) -> Tokenizer:
    if data.tokenizer != "bpe":
        return _tokenizer(data)
    return train_bpe(conversations.texts(data, model.vision.image_size), data.bpe_vocab_size)


def _log(report: dict[str, Any]) -> None:
    train, held_out = report["train"], report["held_out"]
    passed_over = "rows are made when they are asked for"
    if "passed_over" in report:
        passed_over = _listed(report["passed_over"]) or "nothing passed over"
    log.info(
        "data %s: train %d documents, %d bytes, %d tokens, %.2f bytes/token; held out %d, %d, %d; %s; digest %s",
        report["source"],
        *(train["documents"], train["bytes"], train["tokens"], train["bytes"] / max(1, train["tokens"])),
        *(held_out["documents"], held_out["bytes"], held_out["tokens"]),
        passed_over,
        report["digest"],
    )


def log_left_out(sources: Sequence[Sequence[Batch]]) -> None:
    """Logs of each source of a side of a Corpus what the rows of conversations made in this process left out, if any
    did; other rows are known when the corpus is loaded."""
    for rows in sources:
        if isinstance(rows, conversations.Rows) and (found := rows.left_out()):
            log.info("data %s: %d rows made so far; %s", rows.name, rows.made, _listed(found))


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


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


Transform = Callable[[int, Batch], Batch]


def row_transform(experiment: Experiment, corpus: Corpus, held_out: bool = False) -> Transform | None:
    """What `experiment.objective` makes of a packed row, given its number in the run; None where rows stay as they are.

    Held-out rows do not depend on run.seed, so that runs compare.
    """
    objective, model, tokenizer = experiment.objective, experiment.model, corpus.tokenizer
    seed = 2**32 if held_out else experiment.run.seed
    special = model.vocab_size - 1 if objective.special_token < 0 else objective.special_token
    end = tokenizer.end_of_document
    if objective.name == "masked":
        partners = corpus.train if model.next_sentence and not held_out else ()
        return Masking(seed, objective.corruption, special, tokenizer.vocab_size, end, partners)
    if objective.name == "span_corruption":
        start = end if model.start_token < 0 else model.start_token
        return SpanCorruption(seed, *objective.spans(experiment.data.context), special, start, end)
    return None


class _Lanes:
    """Rows of `rows`, one of every batch following that of the batch before, as Grain reads them.

    The rows lie in a circle, cut into `batch_size` lanes of one length; each epoch begins to cut it elsewhere. What
    does not divide into lanes is left out at the end of the circle.
    """

    def __init__(self, rows: Sequence[Batch], batch_size: int, seed: int) -> None:
        self._rows, self._batch_size, self._seed = rows, batch_size, seed
        self._length = len(rows) // batch_size  # rows of a lane

    def __len__(self) -> int:
        return 2**48

    def __getitem__(self, index: int) -> Batch:
        step, lane = divmod(int(index), self._batch_size)
        epoch, row = divmod(step, self._length)
        circle = self._batch_size * self._length
        begin = np.random.default_rng((self._seed, epoch)).integers(circle) if epoch else 0
        return self._rows[(int(begin) + lane * self._length + row) % circle]


class _Joined:
    """The rows of several sources, one source after the other."""

    def __init__(self, sources: Sequence[PackedRows]) -> None:
        self._sources, self._ends = sources, np.cumsum([len(rows) for rows in sources])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, row: int) -> Batch:
        source = int(np.searchsorted(self._ends, row, side="right"))
        return self._sources[source][row - (int(self._ends[source - 1]) if source else 0)]


def train_batches(
    corpus: Corpus,
    data: DataConfig,
    seed: int,
    start_step: int = 0,
    rows: Sequence[int] = (),
    transform: Transform | None = None,
) -> Iterator[Batch]:
    """An endless iterator of training batches [L, T] from `start_step` on, made ahead in a thread.

    Every source is shuffled anew in each of its epochs and gives data.weights of the rows (by default in proportion to
    its rows). With data.contiguous rows keep their order instead, and row b of a batch goes on where row b of the batch
    before ended. `close()` stops the thread; what fails in it is raised by `next`.

    rows: which rows of each global batch to make (see `tpu.distributed.rows_here`), ascending; none given: all.
    transform: applied to every row and its number in the run.
    """
    import grain

    if data.contiguous:
        stream = grain.MapDataset.source(_Lanes(_Joined(corpus.train), data.batch_size, seed))
    else:
        sources = [
            grain.MapDataset.source(rows).seed((seed + index) % 2**32).shuffle().repeat()
            for index, rows in enumerate(corpus.train)
        ]
        weights = data.weights or [len(rows) for rows in corpus.train]
        # Grain 0.2 overflows on batches of one row of an endless mixture; no run reaches this many.
        stream = grain.MapDataset.mix(sources, weights)[: 2**48]
    if transform is not None:
        stream = stream.map_with_index(transform)
    if rows:
        stream = grain.MapDataset.source(_Selected(stream, data.batch_size, rows))
    batches = stream.batch(len(rows) or data.batch_size)[start_step:]
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=data.prefetch)))


def held_out_batches(
    corpus: Corpus,
    data: DataConfig,
    batch_size: int,
    limit: int = 0,
    rows: Sequence[int] = (),
    transform: Transform | None = None,
) -> Iterator[Batch]:
    """Yields the held-out rows in order as batches of `batch_size` rows, the last filled up with padding rows.

    With data.contiguous the rows are cut into `batch_size` runs of one length, the last filled up, and row b of every
    batch comes from run b.
    rows, transform: as in `train_batches`; the batches are [L, T] then, and [batch_size, T] without.
    limit: at most so many batches; 0: all. With a limit, bits per byte must count bytes as
    `held_out_bytes / held_out_tokens` per token of weight 1, for the bytes of single rows are not known.
    """
    if not corpus.held_out:
        return
    stream = _Joined(corpus.held_out)
    padding = padding_row(data.context, corpus.tokenizer.end_of_document)
    if corpus.labels is not None:  # Rows of labelled records have fields and widths of their own.
        like = corpus.held_out[0][0]
        padding = like._replace(loss_weights=np.zeros_like(like.loss_weights))
    batches = -(-len(stream) // batch_size)
    for step in range(min(batches, limit or batches)):
        numbers = [step * batch_size + row for row in rows or range(batch_size)]
        places = [row * batches + step for row in rows or range(batch_size)] if data.contiguous else numbers
        made = [stream[place] if place < len(stream) else padding for place in places]
        if transform is not None:
            made = [transform(number, row) for number, row in zip(numbers, made, strict=True)]
        yield Batch(*(None if arrays[0] is None else np.stack(arrays) for arrays in zip(*made, strict=True)))

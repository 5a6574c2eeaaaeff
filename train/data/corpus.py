"""Documents, tokenized, of both sides: what is trained on and what is held out."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from model.config import ModelConfig
from tpu.errors import UserError
from train.config import DataConfig
from train.data.batch import Batch
from train.data.chat import rows as conversations
from train.data.text import cache
from train.data.text.labelled import Labelled
from train.data.text.packing import PackedRows
from train.data.text.sources import documents, is_held_out
from train.data.text.tokenizer import ByteTokenizer, Tokenizer, from_file, train_bpe

Change = Callable[[int, Batch], Batch]  # (number of the row in the run or of the side, row) -> row
HELD_OUT_SEED = 2**32  # of changes to held-out rows: they do not depend on run.seed, so that runs compare

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
    labels: tuple[str, ...] = ()  # names of the labels, in the order of their numbers
    train_change: Change | None = None  # what is made of every row that is read; None: rows stay as they are
    held_out_change: Change | None = None


def record_corpus(found: Labelled | conversations.Conversations, data: DataConfig, tokenizer: Tokenizer) -> Corpus:
    """The corpus of records that are a row each. Raises UserError where they leave a side empty."""
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


def load_corpus(data: DataConfig, *, tokenizer: Tokenizer | None = None) -> Corpus:
    """Reads, tokenises and packs the documents of all `data.sources`, through the cache.

    tokenizer: that of a checkpoint, so that it is never trained again; without it, the one that data.tokenizer names.
    Raises UserError for sources that cannot be read or leave the train or the held-out side empty.
    """
    tokenizer = tokenizer or text_tokenizer(data)
    sources = [cache.streams(source, data, tokenizer) for source in data.sources]
    for source in sources:
        _log(source.report)
    _check_sides([source.report for source in sources], data)
    held_out = [source.report["held_out"] for source in sources]
    packed = functools.partial(
        PackedRows,
        context=data.context,
        end_of_document=tokenizer.end_of_document,
        continuing=data.contiguous,
        beginning=tokenizer.beginning,
    )
    unlearned = tokenizer.beginning != tokenizer.end_of_document  # of every document, the token after its end
    corpus = Corpus(
        tokenizer=tokenizer,
        train=tuple(packed(s.train, keep_last=False) for s in sources),
        held_out=tuple(packed(s.held_out, keep_last=True) for s in sources if len(s.held_out)),
        held_out_bytes=sum(side["bytes"] for side in held_out),
        held_out_tokens=sum(side["tokens"] - unlearned * side["documents"] for side in held_out),
        report={"vocab_size": tokenizer.vocab_size, "sources": [source.report for source in sources]},
    )
    if data.contiguous and (found := sum(map(len, corpus.train))) < data.batch_size:
        raise UserError(
            f"data.batch_size={data.batch_size}: data.contiguous=True needs at least as many rows of data.context="
            f"{data.context} tokens, and the sources have {found}"
        )
    return corpus


def text_tokenizer(data: DataConfig) -> Tokenizer:
    """The tokenizer that data.tokenizer names, trained on the documents where that says so."""
    if data.tokenizer == "bytes":
        return ByteTokenizer()
    if data.tokenizer == "bpe":
        return cache.bpe_tokenizer(data)
    return from_file(data.tokenizer)


def conversation_tokenizer(data: DataConfig, model: ModelConfig) -> Tokenizer:
    """The tokenizer that data.tokenizer names, trained on what is said in the conversations where that says so."""
    if data.tokenizer != "bpe":
        return text_tokenizer(data)
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

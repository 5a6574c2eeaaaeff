"""What is worked out once and kept on disk: the trained tokenizer, and every source as two streams of tokens.

A name in the cache is a hash of all that its content depends on, this package's code included, so nothing in it is ever
out of date. Files appear by rename: a process that dies leaves no half file behind, and several may build at once.

Legend: S tokens in a stream.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from tpu import host
from tpu.errors import UserError
from train.config import DataConfig
from train.data.text.sources import Document, documents, is_held_out, source_digest
from train.data.text.tokenizer import JsonTokenizer, Tokenizer, from_dict, train_bpe

BATCH_BYTES = 1 << 20  # text encoded at a time


class Streams(NamedTuple):
    """A tokenised source: per document `[end_of_document, t1 .. tn]`, or with a beginning of its own; see
    `train.data.text.packing`."""

    train: np.ndarray  # [S] uint16 or uint32, memory-mapped
    held_out: np.ndarray  # [S], of the documents that `is_held_out`
    report: dict[str, Any]  # per side documents, bytes and tokens; what was passed over; digest


def streams(source: str, data: DataConfig, tokenizer: Tokenizer) -> Streams:
    """The token streams of one entry of `data.sources`, from the cache or into it. Raises UserError (bad input)."""
    content = source_digest(source, data)
    settings = [source, content, tokenizer.to_dict(), data.text_field, data.invalid_utf8, data.holdout]
    name = f"tokens-{digest(settings)}"
    try:
        return _open(data, name)
    except (OSError, ValueError, KeyError, TypeError, EOFError):  # not there, or damaged
        _build(source, data, tokenizer, name, content)
        return _open(data, name)


def _open(data: DataConfig, name: str) -> Streams:
    folder = cache_folder(data)
    report = json.loads((folder / f"{name}.json").read_bytes())
    sides = []
    for side in ("train", "held_out"):
        size = report[side]["tokens"]
        # Mapping no bytes is an error; numpy itself refuses a file shorter than its header says.
        path = folder / f"{name}.{side}.npy"
        stream = np.asarray(np.load(path, mmap_mode="r")) if size else np.zeros(0, np.uint16)
        if len(stream) != size:
            raise ValueError(f"{path}: {len(stream)} tokens instead of {size}")
        sides.append(stream)
    return Streams(*sides, report)


def _build(source: str, data: DataConfig, tokenizer: Tokenizer, name: str, content: str) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    tallies = {side: Counter(documents=0, bytes=0, tokens=0) for side in ("train", "held_out")}
    counts: Counter[str] = Counter()
    end = [] if tokenizer.beginning == tokenizer.end_of_document else [tokenizer.end_of_document]
    with _new_file(data, f"{name}.train.npy") as train, _new_file(data, f"{name}.held_out.npy") as held_out:
        files = {"train": train, "held_out": held_out}
        for file in files.values():
            _write_header(file, 0, dtype)
        for batch in _batches(documents(source, data, counts)):
            encoded = tokenizer.encode_batch([document.text for document in batch])
            for document, ids in zip(batch, encoded, strict=True):
                side = "held_out" if is_held_out(document.key, data.holdout) else "train"
                # The id must mean one thing; a vocabulary that spells it as text would otherwise split a document.
                ids = ids[(ids != tokenizer.end_of_document) & (ids != tokenizer.beginning)]
                ids = np.concatenate([[tokenizer.beginning], ids, end])
                files[side].write(ids.astype(dtype).tobytes())
                tallies[side].update(documents=1, bytes=len(document.text.encode()), tokens=len(ids))
        for side, file in files.items():
            file.seek(0)
            _write_header(file, tallies[side]["tokens"], dtype)
    report = {"source": source, "digest": content} | {side: dict(tally) for side, tally in tallies.items()}
    with _new_file(data, f"{name}.json") as file:
        file.write(json.dumps(report | {"passed_over": dict(counts)}).encode())


def _write_header(file: BinaryIO, size: int, dtype: np.dtype) -> None:
    """numpy leaves room in it for the largest size, so that it can be written again over itself."""
    header = {"descr": dtype.str, "fortran_order": False, "shape": (size,)}
    np.lib.format.write_array_header_1_0(file, header)


def _batches(stream: Iterable[Document]) -> Iterator[list[Document]]:
    batch, size = [], 0
    for document in stream:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def bpe_tokenizer(data: DataConfig) -> JsonTokenizer:
    """The byte-pair tokenizer trained on the train side of all sources, from the cache or into it."""
    import tokenizers

    contents = [[source, source_digest(source, data)] for source in data.sources]
    settings = [contents, data.text_field, data.invalid_utf8, data.holdout, data.bpe_vocab_size, tokenizers.__version__]
    name = f"bpe-{digest(settings)}.json"
    try:
        saved = json.loads((cache_folder(data) / name).read_bytes())
        if saved["digest"] == digest(saved["tokenizer"]):
            return from_dict(saved["tokenizer"])
    except (OSError, ValueError, KeyError, TypeError):  # not there, or damaged
        pass
    tokenizer = train_bpe(_train_texts(data), data.bpe_vocab_size)
    with _new_file(data, name) as file:
        saved = tokenizer.to_dict()
        file.write(json.dumps({"digest": digest(saved), "tokenizer": saved}).encode())
    return tokenizer


def _train_texts(data: DataConfig) -> Iterator[str]:
    for source in data.sources:
        for document in documents(source, data, Counter()):
            if not is_held_out(document.key, data.holdout):
                yield document.text


def digest(settings: Any) -> str:
    """A hash of anything JSON can hold and of the code that reads documents and makes tokens of them."""
    content = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16)
    for module in ("python_docs", "sources", "tokenizer", "cache"):
        content.update(Path(__file__).with_name(f"{module}.py").read_bytes())
    return content.hexdigest()


def array(data: DataConfig, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    """The array of that name, a hash of all that `make` depends on, from the cache or into it."""
    try:
        return np.load(cache_folder(data) / name)
    except (OSError, ValueError, EOFError):  # not there, or damaged
        made = make()
        with _new_file(data, name) as file:
            np.save(file, made)
        return made


def cache_folder(data: DataConfig) -> Path:
    """data.cache_dir, else that of all commands (`tpu.host.cache_dir`). Raises UserError where there is neither."""
    return Path(os.path.expanduser(data.cache_dir)) if data.cache_dir else host.cache_dir()


@contextlib.contextmanager
def _new_file(data: DataConfig, name: str) -> Iterator[BinaryIO]:
    """A file that takes its name when complete, and is gone where writing it failed."""
    folder = cache_folder(data)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=f"{name}.", suffix=".tmp", delete=False) as file:
            try:
                yield file
                file.flush()
                os.replace(file.name, folder / name)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        raise UserError(f"data.cache_dir={str(folder)!r}: cannot be written ({error})") from error

"""Sources: what `data.sources` may name, read as a stream of documents in a fixed order.

python_docs                                  the manual and library of the running Python
scenes:caption and others                    what is said in data made here, without its pictures (train.data.made.made)
PATTERN.txt .jsonl .parquet .array_record    files by glob ("**" goes into folders)
tfds:NAME, tfds:NAME:SPLIT                   TensorFlow Datasets with random access (no TensorFlow needed)
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tpu.errors import UserError
from train.config import DataConfig
from train.data.chat.record import IMAGE
from train.data.made import made
from train.data.text import python_docs

SUFFIXES = (".txt", ".jsonl", ".parquet", ".array_record")
PIECE_BYTES = 32 * 1024  # a longer .txt file is cut into documents of about this size
MADE_TEXTS = 10_000  # documents of a source that is made here
BATCH_RECORDS = 1000  # records read at a time


class Document(NamedTuple):
    """A text, and the key whose hash decides on which side of the held-out split it falls."""

    key: str
    text: str


def documents(source: str, data: DataConfig, counts: Counter[str]) -> Iterator[Document]:
    """Yields the documents of one entry of `data.sources`, without those that are empty.

    `counts` gathers what was passed over: `replaced_characters` (invalid UTF-8 turned into U+FFFD), `empty_documents`,
    `unparsed_files`. Raises UserError, naming file and line, for what cannot be read.
    """
    for document in _read(source, data, counts):
        if document.text:
            yield document
        else:
            counts["empty_documents"] += 1


def source_digest(source: str, data: DataConfig) -> str:
    """A hash that changes with the source's content. Of files it sees path, size and time, so it need not read them."""
    if source == "python_docs":
        return python_docs.digest()
    if source in made.NAMES:
        return made.digest()
    if source.startswith("tfds:"):
        paths = sorted(str(p) for p in Path(_tfds_builder(source, data).data_path).iterdir())
    else:
        paths = _paths(source)
    return files_digest(paths)


def files_digest(paths: Sequence[str]) -> str:
    """A hash of the files' paths, sizes and times of change."""
    content = hashlib.blake2b(digest_size=16)
    for path in paths:
        status = os.stat(path)
        content.update(f"{os.path.abspath(path)}\0{status.st_size}\0{status.st_mtime_ns}\0".encode(errors="replace"))
    return content.hexdigest()


def labelled_records(source: str, data: DataConfig, counts: Counter[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (place to name in messages, object) for every line of the .jsonl files that `source` names.

    Raises UserError, naming file and line, for what cannot be read; `counts` as for `documents`.
    """
    for path in _paths(source):
        if not path.endswith(".jsonl"):
            raise UserError(f"data.sources: {path}: labelled records are read from .jsonl only")
        yield from _json_objects(path, data, counts)


def is_held_out(key: str, holdout: float) -> bool:
    """Whether a document with this key is kept for evaluation: depends on nothing else, so that adding or reordering
    documents never moves one across."""
    value = int.from_bytes(hashlib.blake2b(key.encode(errors="replace"), digest_size=8).digest(), "big")
    return value < holdout * 2**64


def _read(source: str, data: DataConfig, counts: Counter[str]) -> Iterator[Document]:
    if source == "python_docs":
        yield from (Document(key, text) for key, text in python_docs.texts(counts))
    elif source in made.NAMES:
        for index in range(MADE_TEXTS):
            turns = made.make(source, 0, "train", index).turns
            yield Document(f"{source} {index}", "\n".join(turn.text.replace(IMAGE, "") for turn in turns))
    elif source.startswith("tfds:"):
        yield from _by_text(_tfds_records(source, data), data, counts)
    else:
        # Keys are relative to the folder before the first wildcard: the split is the same on every machine.
        root = os.path.dirname(re.split(r"[*?\[]", os.path.expanduser(source))[0])
        for path in _paths(source):
            try:
                if path.endswith(".txt"):
                    yield from _text_pieces(path, os.path.relpath(path, root or "."), data, counts)
                elif path.endswith(".jsonl"):
                    yield from _by_text(_json_records(path, data, counts), data, counts)
                elif path.endswith(".parquet"):
                    yield from _by_text(_parquet_records(path, data), data, counts)
                else:
                    yield from _by_text(_array_records(path), data, counts)
            except OSError as error:
                raise UserError(f"{path}: cannot be read ({error})") from error


def _paths(pattern: str) -> list[str]:
    paths = sorted(p for p in glob.glob(os.path.expanduser(pattern), recursive=True) if os.path.isfile(p))
    if not paths:
        valid = f"python_docs, a glob of files, tfds:NAME, {', '.join(made.NAMES)}"
        raise UserError(f"data.sources: {pattern!r} matches no file; valid: {valid}")
    for path in paths:
        if not path.endswith(SUFFIXES):
            raise UserError(f"data.sources: {path}: unknown kind of file; valid: {', '.join(SUFFIXES)}")
    return paths


def decode(raw: bytes, data: DataConfig, counts: Counter[str], place: Callable[[int], str]) -> str:
    """`raw` as text, without a byte-order mark at its beginning; `place` names the position of a byte for the message.

    Invalid UTF-8 is replaced and counted, or raises UserError, as `data.invalid_utf8` says. UTF-16 always raises it:
    its bytes would mostly pass for UTF-8, with a NUL in every second place.
    """
    check_encoding(raw, place(0))
    raw = raw.removeprefix(codecs.BOM_UTF8)
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        if data.invalid_utf8 == "refuse":
            raise UserError(
                f"{place(error.start)}: not UTF-8 (byte 0x{raw[error.start]:02x}); convert it, "
                "or set data.invalid_utf8=replace"
            ) from error
    text = raw.decode(errors="replace")
    counts["replaced_characters"] += text.count("\ufffd") - raw.count("\ufffd".encode())
    return text


def check_encoding(raw: bytes, place: str) -> None:
    """Raises UserError, beginning with `place`, for text that is UTF-16 or UTF-32, by its mark or by its NULs."""
    marked = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    if marked or 4 * raw.count(0) > len(raw):
        how = "its byte-order mark says" if marked else "the NULs in it look like"
        raise UserError(f"{place}: not UTF-8: {how} UTF-16; convert it, as by iconv -f UTF-16 -t UTF-8")


def _text_pieces(path: str, key: str, data: DataConfig, counts: Counter[str]) -> Iterator[Document]:
    """Cuts a file at paragraph or line ends; the pieces joined are the file."""
    whole = os.path.getsize(path) <= PIECE_BYTES
    newline, line, number, rest = b"\n", 1, 0, b""
    with open(path, "rb") as file:
        while True:
            rest += file.read(PIECE_BYTES - len(rest))
            if not rest:
                return
            cut = len(rest) if whole or len(rest) < PIECE_BYTES else _cut(rest)
            piece, rest = rest[:cut], rest[cut:]
            text = decode(piece, data, counts, lambda at: f"{path}, line {piece.count(newline, 0, at) + line}")
            yield Document(key if whole else f"{key}#{number}", text)
            line, number = line + piece.count(newline), number + 1


def _cut(raw: bytes) -> int:
    """Where to cut: after the last empty line, else line, else word of the second half, else between characters."""
    for end in (b"\n\n", b"\n", b" "):
        at = raw.rfind(end, len(raw) // 2)
        if at >= 0:
            return at + len(end)
    cut = len(raw)
    while cut > len(raw) - 4 and raw[cut - 1] & 0xC0 == 0x80:  # a continuation byte: go back to its first
        cut -= 1
    return cut - 1 if raw[cut - 1] >= 0xC0 else len(raw)


# A record is (the place to name in messages, its text).
Record = tuple[str, Any]


def _by_text(records: Iterator[Record], data: DataConfig, counts: Counter[str]) -> Iterator[Document]:
    """Documents keyed by the hash of their text, so that duplicates fall on the same side of the split."""
    for place, value in records:
        if isinstance(value, str):
            value = value.encode(errors="surrogatepass")  # JSON can hold half a surrogate pair: invalid UTF-8
        if not isinstance(value, bytes):
            raise UserError(f"{place}: data.text_field={data.text_field!r} holds {type(value).__name__}, not text")
        text = decode(value, data, counts, lambda at: place)
        yield Document(hashlib.blake2b(text.encode(), digest_size=16).hexdigest(), text)


def _json_records(path: str, data: DataConfig, counts: Counter[str]) -> Iterator[Record]:
    return ((place, _field(record, data, place)) for place, record in _json_objects(path, data, counts))


def _json_objects(path: str, data: DataConfig, counts: Counter[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            place = f"{path}, line {number}"
            line = decode(raw, data, counts, lambda at: place)
            if not line.strip():
                continue
            yield place, json_object(line, place)


def json_object(text: str, place: str) -> dict[str, Any]:
    """The object that `text` holds as JSON. Raises UserError, beginning with `place`, where it is none."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not JSON ({error})") from error
    if not isinstance(record, dict):
        raise UserError(f"{place}: a JSON {type(record).__name__}; each record must be an object")
    return record


def _parquet_records(path: str, data: DataConfig) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        with pa.parquet.ParquetFile(path) as file:
            column = _field({field.name: field for field in file.schema_arrow}, data, path)
            if column.type not in (pa.string(), pa.large_string(), pa.binary(), pa.large_binary()):
                raise UserError(f"{path}: data.text_field={data.text_field!r} holds {column.type}, not text")
            row = 0
            for batch in file.iter_batches(batch_size=BATCH_RECORDS, columns=[data.text_field]):
                # As bytes: pyarrow does not check that its strings are UTF-8.
                for value in batch.column(0).cast(pa.large_binary()).to_pylist():
                    row += 1
                    yield f"{path}, row {row}", value
    except pa.ArrowException as error:
        raise UserError(f"{path}: not a readable Parquet file ({error})") from error


def _array_records(path: str) -> Iterator[Record]:
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        reader = ArrayRecordReader(path)
        if not reader.ok():
            raise RuntimeError("truncated, or of another format")
        for start in range(0, reader.num_records(), BATCH_RECORDS):
            stop = min(start + BATCH_RECORDS, reader.num_records())
            for number, raw in enumerate(reader.read(start, stop), start + 1):
                yield f"{path}, record {number}", raw
        reader.close()
    except (RuntimeError, IndexError) as error:
        raise UserError(f"{path}: not a readable ArrayRecord file ({error})") from error


def _tfds_builder(source: str, data: DataConfig) -> Any:
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(source.split(":")[1], data_dir=data.tfds_dir or None)
        builder.download_and_prepare(file_format="array_record")  # does nothing where the data set is there
    except Exception as error:  # of a data set's own code: anything
        raise UserError(f"data.sources: {source!r}: {_first_line(error)}; see data.tfds_dir") from error
    return builder


def tfds_source(source: str, data: DataConfig, decoders: dict[str, Any] | None = None) -> Any:
    """The records of "tfds:NAME[:SPLIT]" with random access; `decoders` as TensorFlow Datasets has them, by field.

    Raises UserError where the data set or the split is not there.
    """
    _, _, split = source.removeprefix("tfds:").partition(":")
    builder = _tfds_builder(source, data)
    try:
        return builder.as_data_source(split or "train", decoders=decoders)
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"data.sources: {source!r}: {_first_line(error)}") from error


def _tfds_records(source: str, data: DataConfig) -> Iterator[Record]:
    records = tfds_source(source, data)
    for number in range(len(records)):
        place = f"{source}, record {number + 1}"
        yield place, _field(records[number], data, place)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")


def _field(record: dict[str, Any], data: DataConfig, place: str) -> Any:
    if data.text_field not in record:
        raise UserError(
            f"{place}: no field {data.text_field!r}; has {', '.join(record) or 'none'}: set data.text_field"
        )
    return record[data.text_field]

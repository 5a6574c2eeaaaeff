"""Sources of image–text data with random access, so that what a step reads depends on seed and step alone.

PATTERN.jsonl .json      conversations in LLaVA's format (train.data.chat.llava), images in files below the same folder
PATTERN.tar              WebDataset's shards (train.data.chat.tar_shards)
tfds:NAME, tfds:NAME:SPLIT    TensorFlow Datasets with an image and a caption or label (no TensorFlow needed)

A pattern is a glob ("**" goes into folders), after braces: "shards-{000..009}.tar", "{train,extra}/*.jsonl".

Legend: N records.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tpu.errors import UserError
from train.config import DataConfig
from train.data.chat import llava
from train.data.chat.record import Conversation
from train.data.chat.tar_shards import TarShards
from train.data.text.sources import check_encoding, decode, files_digest, json_object, source_digest, tfds_source

SUFFIXES = (".json", ".jsonl", ".tar")


class Source(Protocol):
    """Records by index. Images of a Conversation are encoded bytes; its key names the record in messages."""

    digest: str  # changes with the source's files, as `train.data.text.sources.source_digest` does
    names: tuple[str, ...]  # of all classes, where the texts are classes and the source lists them; else ()

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Conversation:
        """Raises UserError, beginning with where the record is, for one that is not as it should be."""

    def text(self, index: int) -> Conversation:
        """The record with anything in place of its images, which are not read where they lie apart. Raises as above."""

    def key(self, index: int) -> str:
        """What `train.data.text.sources.is_held_out` takes: the same on every machine. Bad records have one too."""


def open_source(source: str, data: DataConfig, *, image_field: str = "image", text_field: str = "caption") -> Source:
    """Opens what `source` names, indexing files without reading images.

    image_field: of TensorFlow Datasets; text_field: of theirs and of KEY.json in tars: the caption, or the label.
    Raises UserError for files that are not there, of another kind, or damaged, and where there is no record.
    """
    found: Source
    if source.startswith("tfds:"):
        found = TfdsImages(source, image_field, text_field, data)
    else:
        paths = _paths(source)
        if paths[0].endswith(".tar"):
            root = os.path.dirname(re.split(r"[*?\[{]", os.path.expanduser(source))[0])
            names = [os.path.relpath(path, root or ".") for path in paths]
            found = TarShards(paths, names, text_field, data)
        else:
            found = JsonFiles(paths, data)
    if not len(found):
        raise UserError(f"data.sources: {source!r} holds no record; give at least one")
    return found


class JsonFiles:
    """The records of .json and .jsonl files; image paths are relative to their folders. Keeps only where each lies."""

    names = ()

    def __init__(self, paths: Sequence[str], data: DataConfig):
        """Raises UserError for a file that cannot be read, or a .json file that is no list."""
        self.digest = files_digest(paths)  # does not see the images
        self._paths, self._data = paths, data
        spans = ((number, *span) for number, path in enumerate(paths) for span in _spans(path))
        self._places = np.fromiter(spans, np.dtype((np.int64, 4)))  # [N, 4]: file, offset, length, number in the file

    def __len__(self) -> int:
        return len(self._places)

    def key(self, index: int) -> str:
        """The paths of the record's images, so that all records of an image share a side of the split; else a hash."""
        raw = self._raw(index)
        try:
            paths = llava.image_paths(self._record(index, raw), "")
        except UserError:
            paths = ()
        return "\n".join(paths) or hashlib.blake2b(raw, digest_size=16).hexdigest()

    def __getitem__(self, index: int) -> Conversation:
        found = self.text(index)
        folder = os.path.dirname(self._paths[self._places[index, 0]])
        return found._replace(images=tuple(_contents(folder, path, found.key) for path in found.images))

    def text(self, index: int) -> Conversation:
        """The record with the paths of its images."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        record, place = self._record(index, self._raw(index)), self._place(index)
        return llava.conversation(record, llava.image_paths(record, place), place, self._data)

    def _raw(self, index: int) -> bytes:
        file_number, offset, length, _ = self._places[index].tolist()
        try:
            with open(self._paths[file_number], "rb") as file:
                file.seek(offset)
                return file.read(length).strip()
        except OSError as error:
            raise UserError(f"{self._place(index)}: cannot be read ({error})") from error

    def _record(self, index: int, raw: bytes) -> dict[str, Any]:
        place = self._place(index)
        return json_object(decode(raw, self._data, Counter(), lambda at: place), place)

    def _place(self, index: int) -> str:
        file_number, _, _, number = self._places[index].tolist()
        path = self._paths[file_number]
        return f"{path}, {'line' if path.endswith('.jsonl') else 'record'} {number}"


class TfdsImages:
    """The records of a prepared data set."""

    def __init__(self, source: str, image_field: str, text_field: str, data: DataConfig):
        """Raises UserError where the data set is not there, or has no such fields."""
        import tensorflow_datasets as tfds

        self.digest = source_digest(source, data)
        self._source, self._image_field, self._text_field, self._data = source, image_field, text_field, data
        self._records = tfds_source(source, data, decoders={image_field: tfds.decode.SkipDecoding()})
        features = self._records.dataset_info.features
        for name, field in (("image_field", image_field), ("text_field", text_field)):
            if field not in features:
                raise UserError(f"{name}={field!r}: {source!r} has no such field; valid: {', '.join(features)}")
        if not isinstance(features[image_field], tfds.features.Image):
            raise UserError(f"image_field={image_field!r}: {source!r} holds no image there")
        label = features[text_field]
        is_label = isinstance(label, tfds.features.ClassLabel)
        self._label_name = label.int2str if is_label else None
        self.names = tuple(name.strip() for name in label.names) if is_label else ()

    def __len__(self) -> int:
        return len(self._records)

    def key(self, index: int) -> str:
        """The source and the record's place in it, which are fixed when the data set is prepared."""
        return f"{self._source}, record {index + 1}"

    def __getitem__(self, index: int) -> Conversation:
        if not 0 <= index < len(self):
            raise IndexError(index)
        place = self.key(index)
        try:
            record = self._records[int(index)]
        except (RuntimeError, IndexError, ValueError) as error:
            raise UserError(f"{place}: cannot be read ({error})") from error
        text = record[self._text_field]
        if self._label_name:
            if text < 0:
                raise UserError(f"{place}: text_field={self._text_field!r} is {text}, no label")
            text = self._label_name(int(text)).encode()
        if not isinstance(text, bytes):
            raise UserError(
                f"{place}: text_field={self._text_field!r} holds {type(text).__name__}, not text or a label"
            )
        return llava.caption(decode(text, self._data, Counter(), lambda at: place), (record[self._image_field],), place)

    def text(self, index: int) -> Conversation:
        """The record as it is, for image and text lie together."""
        return self[index]


def _paths(pattern: str) -> list[str]:
    """The files that a pattern names, as they follow from its braces, then by name. All of them must be of one kind."""
    paths: dict[str, None] = {}
    for part in _braces(os.path.expanduser(pattern)):
        found = sorted(path for path in glob.glob(part, recursive=True) if os.path.isfile(path))
        if not found:
            raise UserError(
                f"data.sources: {part!r} matches no file; valid: a glob of {', '.join(SUFFIXES)} files, with braces "
                "such as {000..009}, or tfds:NAME"
            )
        paths.update(dict.fromkeys(found))
    for path in paths:
        if re.search(r"\.tar\.\w+$|\.tgz$", path):
            raise UserError(f"data.sources: {path}: a compressed tar has no random access; uncompress it to .tar")
        if not path.endswith(SUFFIXES):
            raise UserError(f"data.sources: {path}: unknown kind of file; valid: {', '.join(SUFFIXES)}")
        if path.endswith(".tar") != next(iter(paths)).endswith(".tar"):
            raise UserError(f"data.sources: {pattern!r} matches .tar and other files; name them as two sources")
    return list(paths)


def _braces(pattern: str) -> Iterator[str]:
    """Expands {000..009}, which counts with as many digits as it is written with, and {a,b}, as shells do."""
    brace = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern, re.ASCII)
    if brace is None:
        yield pattern
        return
    before, after = pattern[: brace.start()], pattern[brace.end() :]
    if brace[3] is not None:
        choices: Iterator[str] = iter(brace[3].split(","))
    else:
        first, last = int(brace[1]), int(brace[2])
        if first > last:
            raise UserError(f"data.sources: {pattern!r}: {brace[0]} counts down; give the smaller number first")
        width = len(brace[1]) if brace[1].startswith("0") else 0
        choices = (f"{number:0{width}d}" for number in range(first, last + 1))
    for choice in choices:
        yield from _braces(before + choice + after)


def _spans(path: str) -> Iterator[tuple[int, int, int]]:
    """Yields (offset, length, number from 1) of a file's records: in .jsonl those of the lines that are not empty."""
    try:
        if path.endswith(".json"):
            yield from _element_spans(path)
            return
        offset = 0
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield offset, len(line), number
                offset += len(line)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


def _element_spans(path: str) -> Iterator[tuple[int, int, int]]:
    raw = Path(path).read_bytes()
    check_encoding(raw, path)
    text = raw.decode("latin-1")  # one character for each byte: positions are the file's

    def after_space(at: int) -> int:
        return re.compile(r"[ \t\r\n]*").match(text, at).end()

    mark = codecs.BOM_UTF8.decode("latin-1")
    decoder, number, at = json.JSONDecoder(), 0, after_space(len(mark) if text.startswith(mark) else 0)
    if text[at : at + 1] != "[":
        raise UserError(f"{path}: not a JSON list of records; for one record a line name the file .jsonl")
    at = after_space(at + 1)
    try:
        while number or text[at : at + 1] != "]":
            _, end = decoder.raw_decode(text, at)
            number += 1
            yield at, end - at, number
            at = after_space(end)
            if text[at : at + 1] != ",":
                break
            at = after_space(at + 1)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}, record {number + 1}: not JSON ({error})") from error
    if text[at : at + 1] != "]" or after_space(at + 1) < len(text):
        raise UserError(f"{path}: not JSON after record {number} (byte {at})")


def _contents(folder: str, path: str, place: str) -> bytes:
    try:
        return Path(folder, path).read_bytes()
    except OSError as error:
        raise UserError(f"{place}: image {path!r} cannot be read ({error.strerror or error})") from error

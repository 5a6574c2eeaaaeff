"""Conversations in WebDataset's tar shards (github.com/webdataset/webdataset), by random access.

Members of one key, which is their name up to the first dot after the last slash, are one record:

    KEY.jpg .jpeg .png .webp            its image
    KEY.0.jpg KEY.1.jpg ...             its images in this order
    KEY.txt                             what is said of them, or, where there is none:
    KEY.json                            the caption in a field of an object, or a conversation (train.data.chat.llava)

Other members are passed over. Headers are read once, for an index of where members lie (a million in about a minute);
a record's bytes when asked.

Legend: N records, M members of them all.
"""

from __future__ import annotations

import re
import tarfile
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from tpu.errors import UserError
from train.config import DataConfig
from train.data.chat import llava
from train.data.chat.record import Conversation
from train.data.text.sources import decode, files_digest, json_object

TEXT, JSON = -2, -1  # kinds of members; an image's is its number, from 0


class TarShards:
    """The records of all shards, in the order of the shards and, within one, of their first members."""

    names = ()

    def __init__(self, paths: Sequence[str], names: Sequence[str], text_field: str, data: DataConfig):
        """paths: of the shards; names: of theirs in keys; text_field: that of KEY.json which holds a caption.

        Raises UserError naming a shard that is compressed, damaged or cut short.
        """
        self.digest = files_digest(paths)
        self._paths, self._names, self._text_field, self._data = paths, names, text_field, data
        self._keys: list[str] = []  # N
        self._first_records: list[int] = []  # of each shard
        members = [np.zeros((0, 4), np.int64)]
        for path in paths:
            self._first_records.append(len(self._keys))
            members.append(self._read_headers(path))
        table = np.concatenate(members)
        self._members = table[:, 1:]  # [M, 3]: kind, offset, size; those of a record together, by kind
        self._bounds = np.searchsorted(table[:, 0], np.arange(len(self._keys) + 1))  # [N + 1], in _members

    def _read_headers(self, path: str) -> np.ndarray:
        """Adds a shard's keys. Returns its members by record and kind, [members, 4]: record, kind, offset, size."""
        found, records = array("q"), {}
        for name, offset, size in _members(path):
            folder, slash, last = name.removeprefix("./").rpartition("/")
            stem, _, suffix = last.partition(".")
            kind = _kind(suffix.lower())
            if stem and kind is not None:
                key = folder + slash + stem
                record = records.setdefault(key, len(self._keys) + len(records))
                found.extend((record, kind, offset, size))
        self._keys += records
        members = np.array(found, np.int64).reshape(-1, 4)
        return members[np.lexsort((members[:, 1], members[:, 0]))]

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, index: int) -> str:
        """The record's key after its shard's name: what decides on which side of the held-out split it falls."""
        return f"{self._names[self._shard(index)]}/{self._keys[index]}"

    def __getitem__(self, index: int) -> Conversation:
        return self._conversation(index, with_images=True)

    def text(self, index: int) -> Conversation:
        """The record with no bytes in place of its images."""
        return self._conversation(index, with_images=False)

    def _conversation(self, index: int, with_images: bool) -> Conversation:
        if not 0 <= index < len(self):
            raise IndexError(index)
        path = self._paths[self._shard(index)]
        place = f"{path}, {self._keys[index]}"
        members = self._members[self._bounds[index] : self._bounds[index + 1]].tolist()
        if len({kind for kind, _, _ in members}) < len(members):
            raise UserError(f"{place}: several texts, or several images in one place, under this key; rename them")
        contents = {}
        try:
            with open(path, "rb") as file:
                for kind, offset, size in members:
                    wanted = size if with_images or kind < 0 else 0
                    file.seek(offset)
                    contents[kind] = file.read(wanted)
                    if len(contents[kind]) < wanted:
                        raise UserError(f"{place}: the shard was cut short while in use")
        except OSError as error:
            raise UserError(f"{place}: cannot be read ({error})") from error
        images = tuple(content for kind, content in contents.items() if kind >= 0)
        if TEXT in contents:
            return llava.caption(self._decode(contents[TEXT], place), images, place)
        if JSON not in contents:
            raise UserError(f"{place}: an image without a .txt or .json")
        record = json_object(self._decode(contents[JSON], place), place)
        if any(field in record for field in llava.TURNS):
            return llava.conversation(record, images, place, self._data)
        text = record.get(self._text_field)
        if not isinstance(text, str):
            raise UserError(
                f"{place}: the .json has no text in {self._text_field!r}, nor 'conversations'; has "
                f"{', '.join(record) or 'no field'}"
            )
        return llava.caption(self._decode(text.encode(errors="surrogatepass"), place), images, place)

    def _shard(self, index: int) -> int:
        return bisect_right(self._first_records, index) - 1

    def _decode(self, raw: bytes, place: str) -> str:
        return decode(raw, self._data, Counter(), lambda at: place)


def _kind(suffix: str) -> int | None:
    """TEXT, JSON or the number of an image, by what follows the key and its dot in a member's name."""
    image = re.fullmatch(r"(?:(\d{1,18})\.)?(?:jpg|jpeg|png|webp)", suffix, re.ASCII)
    return int(image[1] or 0) if image else {"txt": TEXT, "json": JSON}.get(suffix)


def _members(path: str) -> Iterator[tuple[str, int, int]]:
    """Yields (name, offset of the data, size) of a shard's files, from headers alone."""
    try:
        with tarfile.open(path, "r:", encoding="utf-8", errors="backslashreplace") as shard:
            while (member := shard.next()) is not None:
                shard.members.clear()  # else it would keep them all
                if member.islnk() or member.issym() or member.issparse():
                    raise UserError(f"{path}: member {member.name!r} is a link or sparse; write it as a file")
                if member.isreg():
                    yield member.name, member.offset_data, member.size
            # tarfile takes a damaged header for the end; the real one is a block of zeros.
            shard.fileobj.seek(shard.offset)
            if shard.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise UserError(f"{path}: damaged or cut short at byte {shard.offset}; make or fetch it again")
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{path}: not a whole, uncompressed tar file ({error}); make or fetch it again") from error

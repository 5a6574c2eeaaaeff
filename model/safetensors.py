"""Safetensors files: a length, a JSON header, and the tensors' bytes (https://github.com/huggingface/safetensors).

Read by mapping into memory, after a header has been checked in full: a file from elsewhere is not trusted, and nothing
of it is ever executed. Written in one pass, a piece at a time. A model is one file or several with an index.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import mmap
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from tpu.errors import UserError

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LONGEST_HEADER = 100_000_000  # bytes, as in the reference implementation
CHUNK = 16 * 2**20  # bytes of a mapped tensor that are in memory at one time
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class Spec(NamedTuple):
    """What a header says of a tensor."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """The length of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


class Tensor(NamedTuple):
    """A tensor in a mapped file."""

    spec: Spec
    file: mmap.mmap
    start: int

    def view(self) -> np.ndarray:
        """The tensor as it lies in the file, read-only; reading it brings its pages into memory."""
        count = math.prod(self.spec.shape)
        return np.frombuffer(self.file, self.spec.dtype, count, self.start).reshape(self.spec.shape)

    def copy(self, view: np.ndarray) -> np.ndarray:
        """A contiguous copy of `view`, a view of `self.view()`; no more than CHUNK of the file is in memory."""
        out = np.empty(view.shape, view.dtype)
        if not view.size:
            return out
        outermost = int(np.argmax(view.strides)) if view.ndim else 0  # So each page is read once, whatever the order.
        rows = max(1, CHUNK * view.shape[outermost] // view.nbytes) if view.ndim else 1
        source, target = (np.moveaxis(np.atleast_1d(a), outermost, 0) for a in (view, out))
        for first in range(0, len(source), rows):
            target[first : first + rows] = source[first : first + rows]
            self.file.madvise(mmap.MADV_DONTNEED)
        return out


class Joined(NamedTuple):
    """Tensors that follow each other along their first dimension, as one, made in memory whenever it is read."""

    parts: tuple[Tensor, ...]

    @property
    def spec(self) -> Spec:
        """What a header would say of it."""
        first = self.parts[0].spec
        return Spec(first.dtype, (sum(part.spec.shape[0] for part in self.parts), *first.shape[1:]))

    def view(self) -> np.ndarray:
        """The whole."""
        return np.concatenate([part.view() for part in self.parts])

    def copy(self, view: np.ndarray) -> np.ndarray:
        """A contiguous copy of `view`."""
        return np.ascontiguousarray(view)


def open_file(path: Path) -> dict[str, Tensor]:
    """The tensors of one file by name. Raises UserError, naming the file and what is wrong with it."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            length = file.read(8)
            if len(length) < 8:
                raise UserError(f"{path}: not a safetensors file: it has {size} bytes")
            (length,) = struct.unpack("<Q", length)
            if length > LONGEST_HEADER or length > size - 8:
                raise UserError(
                    f"{path}: damaged or not a safetensors file: a header of {length:,} bytes in a file of {size:,}"
                )
            specs = _checked(path, _parse(path, file.read(length)), size - 8 - length)
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    return {name: Tensor(spec, mapped, 8 + length + start) for name, (spec, start) in specs.items()}


def _parse(path: Path, header: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) != len(pairs):
            raise ValueError("a name occurs twice")
        return dict(pairs)

    try:
        tree = json.loads(header.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: its header is not valid JSON ({error})") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: its header is not a JSON object")
    return tree


def _checked(path: Path, header: dict[str, Any], size: int) -> dict[str, tuple[Spec, int]]:
    """Spec and offset of each tensor of a header, whose data must fill `size` bytes without a gap or an overlap."""
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        match entry:
            case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [start, end]}:
                pass
            case _:
                raise UserError(f"{path}: tensor {name!r}: needs dtype, shape and data_offsets, has {entry!r:.80}")
        if any(type(number) is not int or number < 0 for number in (*shape, start, end)):
            raise UserError(f"{path}: tensor {name!r}: shape {shape} at {[start, end]} are not all natural numbers")
        if math.prod(number for number in shape if number) >= 2**60:
            raise UserError(f"{path}: tensor {name!r}: shape {shape} is too large for any memory")
        if dtype not in DTYPES:
            raise UserError(f"{path}: tensor {name!r}: unknown dtype {dtype!r}; valid: {', '.join(DTYPES)}")
        spec = Spec(DTYPES[dtype], tuple(shape))
        if end > size:
            raise UserError(f"{path}: tensor {name!r} ends at byte {end:,} of {size:,}; the file is truncated")
        if end - start != spec.bytes:
            raise UserError(
                f"{path}: tensor {name!r}: {dtype} {shape} takes {spec.bytes:,} bytes, its offsets give {end - start:,}"
            )
        found[name] = spec, start
    at = 0
    for name, (spec, start) in sorted(found.items(), key=lambda item: (item[1][1], item[1][0].bytes)):
        if start != at:
            what = "overlaps the one before it" if start < at else "leaves a gap before it"
            raise UserError(f"{path}: tensor {name!r} begins at byte {start:,} instead of {at:,}: it {what}")
        at += spec.bytes
    if at != size:
        raise UserError(f"{path}: {size - at:,} bytes after the last tensor belong to none")
    return found


def open_directory(directory: Path) -> dict[str, Tensor]:
    """All tensors of a model's directory. Raises UserError.

    They are those of model.safetensors, else of the files that its index names, as transformers has it; else those of
    the one .safetensors file there is. Adapters and other layouts of the same weights may lie beside the first two.
    """
    if (directory / SINGLE).is_file():
        return open_file(directory / SINGLE)
    if (directory / INDEX).is_file():
        return _open_indexed(directory)
    files = sorted(path for path in directory.glob("*.safetensors") if not path.name.startswith("."))
    if len(files) == 1:
        return open_file(files[0])
    if files:
        raise UserError(f"{directory}: has {len(files)} .safetensors files and no {INDEX} to say which belong together")
    pickled = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    also = f"; {pickled[0]} is a pickle, which could run any code: save it anew as safetensors" if pickled else ""
    raise UserError(f"{directory}: has no .safetensors file{also}")


def _open_indexed(directory: Path) -> dict[str, Tensor]:
    index = directory / INDEX
    match read_json(index):
        case {"weight_map": dict(places)} if all(isinstance(file, str) for file in places.values()):
            pass
        case _:
            raise UserError(f"{index}: has no weight_map from names of tensors to names of files")
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(places.values())):
        if Path(file).name != file:
            raise UserError(f"{index}: names {file!r}, which is no file of this directory")
        opened = open_file(directory / file)
        listed = {name for name, place in places.items() if place == file}
        for name in sorted(listed ^ opened.keys()):
            what = "is not in it" if name in listed else "is in it, but not listed there"
            raise UserError(f"{index}: of {file}: tensor {name!r} {what}")
        tensors |= opened
    return tensors


def read_json(path: Path) -> Any:
    """The contents of a JSON file. Raises UserError, naming it."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error


def write_file(
    path: Path,
    specs: dict[str, Spec],
    pieces: Callable[[str], Iterable[np.ndarray]],
    metadata: dict[str, str] | None = None,
) -> None:
    """Writes the tensors of `specs`; `pieces(name)` gives each one's data, in order, in any number of arrays."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at = 0
    # The widest first, as others write it: then every tensor begins at a multiple of its own width.
    order = sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name))
    for name in order:
        dtype, shape = specs[name]
        end = at + specs[name].bytes
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            before = file.tell()
            for piece in pieces(name):
                file.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
            if file.tell() - before != specs[name].bytes:
                raise ValueError(f"{name}: {file.tell() - before} bytes given for {specs[name]}")


def write_directory(
    directory: Path, specs: dict[str, Spec], pieces: Callable[[str], Iterable[np.ndarray]], shard_bytes: int
) -> None:
    """Writes model.safetensors, or several files of at most `shard_bytes` (or one tensor) each and their index."""
    shards: list[dict[str, Spec]] = [{}]
    for name, spec in specs.items():
        if shards[-1] and sum(s.bytes for s in shards[-1].values()) + spec.bytes > shard_bytes:
            shards.append({})
        shards[-1][name] = spec
    metadata = {"format": "pt"}  # transformers refuses files without it.
    if len(shards) == 1:
        write_file(directory / SINGLE, shards[0], pieces, metadata)
        return
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for file, shard in zip(names, shards, strict=True):
        write_file(directory / file, shard, pieces, metadata)
    places = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
    total = sum(spec.bytes for spec in specs.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """A temporary directory that becomes `path` at the end, or is removed where that is not reached.

    It has a name that nothing had before, so several may be in the making at once: the first to end has `path`. An
    empty directory that is there already (it may be where somebody is, or a mount) is filled, not replaced.

    Raises UserError where `path` exists and is not an empty directory, at the beginning or by the end, or cannot be
    written.
    """
    taken = UserError(f"{path}: exists already and is not an empty directory; give another name")
    path = Path(os.path.abspath(path))
    there, holder = path.exists(), None
    if there and not (path.is_dir() and not any(path.iterdir())):
        raise taken
    try:
        parent = path if there else path.parent
        parent.mkdir(parents=True, exist_ok=True)
        holder = Path(tempfile.mkdtemp(prefix=f"{path.name}.", suffix=".tmp", dir=parent))
        made = holder / path.name  # The holder is this user's alone; what becomes `path` has the usual permissions.
        made.mkdir()
        yield made
        if there:
            if any(other != holder for other in path.iterdir()):
                raise taken
            for child in sorted(made.iterdir()):
                child.rename(path / child.name)
        else:
            made.rename(path)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR) and path.exists():
            raise taken from error
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        if holder:
            shutil.rmtree(holder, ignore_errors=True)

"""Safetensors files: what is written is read, whoever wrote it, and no damaged or hostile file gets past its header."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from model.safetensors import INDEX, Spec, open_directory, open_file, whole_directory, write_directory, write_file
from tpu.errors import UserError

ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(3, dtype=np.float16),
    "c": np.array(2.5, np.float32),
    "d": np.zeros((0, 4), np.int64),
    "e": np.array([1, -2], ml_dtypes.bfloat16),
}


def specs(arrays: dict[str, np.ndarray]) -> dict[str, Spec]:
    return {name: Spec(array.dtype, array.shape) for name, array in arrays.items()}


def assert_holds(path: Path, arrays: dict[str, np.ndarray]) -> None:
    found = open_file(path) if path.is_file() else open_directory(path)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].spec == Spec(array.dtype, array.shape)
        np.testing.assert_array_equal(found[name].view(), array)
        np.testing.assert_array_equal(found[name].copy(found[name].view().T), array.T)


def test_read_what_the_library_wrote(tmp_path):
    arrays = {name: array for name, array in ARRAYS.items() if name != "e"}
    safetensors.numpy.save_file(arrays, tmp_path / "x.safetensors", {"format": "pt"})
    assert_holds(tmp_path / "x.safetensors", arrays)


def test_the_library_reads_what_we_write(tmp_path):
    arrays = {name: array for name, array in ARRAYS.items() if name != "e"}
    write_file(tmp_path / "x.safetensors", specs(arrays), lambda name: [arrays[name]], {"format": "pt"})
    found = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    assert all(np.array_equal(found[name], array) for name, array in arrays.items())
    assert found.keys() == arrays.keys()


@given(st.data(), st.integers(0, 200))
def test_any_view_is_copied_as_it_is_whatever_the_chunk(tmp_path_factory, data, chunk):
    shape = data.draw(st_numpy.array_shapes(min_dims=1, max_dims=4, max_side=5))
    array = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    path = tmp_path_factory.mktemp("x") / "x.safetensors"
    write_file(path, specs({"x": array}), lambda name: [array])
    tensor = open_file(path)["x"]
    order = data.draw(st.permutations(range(len(shape))))
    region = tuple(slice(data.draw(st.integers(0, 2)), data.draw(st.integers(2, 5))) for _ in shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("model.safetensors.CHUNK", chunk)
        found = tensor.copy(tensor.view().transpose(order)[region])
    np.testing.assert_array_equal(found, array.transpose(order)[region])
    assert found.flags.c_contiguous


def test_pieces_make_a_tensor_and_shards_a_directory(tmp_path):
    pieces = lambda name: list(ARRAYS[name]) if ARRAYS[name].ndim > 1 else [ARRAYS[name]]  # noqa: E731
    write_directory(tmp_path, specs(ARRAYS), pieces, 20)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_holds(tmp_path, ARRAYS)
    with pytest.raises(ValueError, match="0 bytes given"):
        write_file(tmp_path / "y", specs(ARRAYS), lambda name: [])


# Damaged and hostile files


def write_raw(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(start: int, end: int, shape: Any = (2,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry(0, 8)}, 7, "truncated"),
        ({"a": entry(0, 8)}, 9, "1 bytes after the last tensor"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "'b' begins at byte 4 instead of 8: it overlaps"),
        ({"a": entry(0, 8), "b": entry(0, 8)}, 8, "overlaps"),
        ({"a": entry(0, 8), "b": entry(12, 20)}, 20, "leaves a gap"),
        ({"a": entry(0, 8, (3,))}, 8, "takes 12 bytes, its offsets give 8"),
        ({"a": entry(8, 0)}, 8, "its offsets give -8"),
        ({"a": entry(-8, 0)}, 8, "natural numbers"),
        ({"a": entry(0, 8, (-1, -2))}, 8, "natural numbers"),
        ({"a": entry(0, 8, (2.0,))}, 8, "natural numbers"),
        ({"a": entry(0, 1, (True,), "U8")}, 1, "natural numbers"),
        ({"a": entry(0, 0, (2**62, 2**62, 0))}, 0, "too large"),
        ({"a": entry(0, 8, (2**32, 2**32))}, 8, "too large"),
        ({"a": entry(0, 8, (2**20, 2**20))}, 8, "takes 4,398,046,511,104 bytes"),
        ({"a": entry(0, 8, dtype="F33")}, 8, "unknown dtype 'F33'; valid: F64, F32"),
        ({"a": {"dtype": "F32"}}, 0, "needs dtype, shape and data_offsets"),
        ({"a": 3}, 0, "needs dtype, shape and data_offsets"),
        ([1], 0, "not a JSON object"),
        (b'{"a"', 0, "not valid JSON"),
        (b"\xff\xfe", 0, "not valid JSON"),
        (b"[" * 100_000, 0, "not valid JSON"),
        (b'{"a": 1, "a": 2}', 0, "a name occurs twice"),
    ],
)
def test_bad_headers(tmp_path, header, data, message):
    path = write_raw(tmp_path / "x.safetensors", header, b"\0" * data)
    with pytest.raises(UserError, match=message) as caught:
        open_file(path)
    assert "x.safetensors" in str(caught.value)


@pytest.mark.parametrize("length", [10**18, 2**64 - 1, 200_000_000, 100])
def test_a_giant_header_is_not_read(tmp_path, length):
    path = write_raw(tmp_path / "x", {"a": entry(0, 8)}, b"\0" * 8, length)
    with pytest.raises(UserError, match="a header of"):
        open_file(path)


@pytest.mark.parametrize("size", range(0, 90, 7))
def test_every_truncation_is_noticed(tmp_path, size):
    whole = write_raw(tmp_path / "x", {"a": entry(0, 8), "b": entry(8, 16)}, b"\0" * 16)
    content = whole.read_bytes()
    assert len(content) > size
    whole.write_bytes(content[:size])
    with pytest.raises(UserError):
        open_file(whole)


def edit_index(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        index = json.loads((directory / INDEX).read_text())
        change(index)
        (directory / INDEX).write_text(json.dumps(index))

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edit_index(lambda index: index["weight_map"].update(a="../x.safetensors")), "no file of this directory"),
        (edit_index(lambda index: index["weight_map"].update(zz=index["weight_map"]["a"])), "'zz' is not in it"),
        (edit_index(lambda index: index["weight_map"].pop("a")), "'a' is in it, but not listed"),
        (edit_index(lambda index: index.update(weight_map=[])), "no weight_map"),
        (lambda directory: (directory / INDEX).unlink(), "no model.safetensors.index.json to say"),
        (lambda directory: (directory / INDEX).write_text("{"), "not valid JSON"),
        (lambda directory: next(directory.glob("*-00001-*")).unlink(), "No such file"),
    ],
)
def test_a_damaged_set_of_files(tmp_path, damage, message):
    arrays = {"a": ARRAYS["a"], "c": ARRAYS["c"], "f": ARRAYS["a"], "g": ARRAYS["a"]}
    write_directory(tmp_path, specs(arrays), lambda name: [arrays[name]], 30)
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        open_directory(tmp_path)


def test_a_pickle_is_never_read(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(UserError, match="a pickle, which could run any code"):
        open_directory(tmp_path)


def test_a_directory_appears_whole_or_not_at_all(tmp_path):
    def write_half() -> None:
        with whole_directory(tmp_path / "x") as made:
            (made / "file").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert list(tmp_path.iterdir()) == []
    with whole_directory(tmp_path / "x") as made:
        (made / "file").write_text("whole")
    assert (tmp_path / "x" / "file").read_text() == "whole"
    with pytest.raises(UserError, match="exists already"), whole_directory(tmp_path / "x"):
        pass
    with pytest.raises(UserError, match="cannot be written"), whole_directory(tmp_path / "x" / "file" / "y"):
        pass


def test_a_folder_of_the_users_beside_it_stays(tmp_path):
    (tmp_path / "x.tmp").mkdir()
    (tmp_path / "x.tmp" / "notes").write_text("precious")
    with whole_directory(tmp_path / "x") as made:
        (made / "file").write_text("whole")
    assert (tmp_path / "x.tmp" / "notes").read_text() == "precious"
    assert {p.name for p in tmp_path.iterdir()} == {"x", "x.tmp"}
    assert (tmp_path / "x").stat().st_mode & 0o777 == (tmp_path / "x.tmp").stat().st_mode & 0o777


@pytest.mark.parametrize("there", [False, True])
def test_of_two_at_once_the_first_to_end_has_the_name(tmp_path, there):
    def write_two() -> None:
        with whole_directory(tmp_path / "x") as second:
            (second / "file").write_text("second")
            with whole_directory(tmp_path / "x") as first:
                (first / "file").write_text("first")

    def overtaken() -> None:
        with whole_directory(tmp_path / "x") as second:
            (second / "file").write_text("second")
            (tmp_path / "x").mkdir(exist_ok=True)
            (tmp_path / "x" / "file").write_text("first")

    if there:  # Then the first to begin has it already.
        (tmp_path / "x").mkdir()
    with pytest.raises(UserError, match="exists already"):
        overtaken() if there else write_two()
    assert (tmp_path / "x" / "file").read_text() == "first"
    assert [p.name for p in tmp_path.rglob("*")] == ["x", "file"]


def test_an_empty_directory_is_filled_where_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = tmp_path.stat().st_ino
    with pytest.raises(UserError, match="cannot be written"), whole_directory(Path(".")) as made:
        (made / "nowhere" / "file").write_text("half")
    assert list(tmp_path.iterdir()) == []
    with whole_directory(Path(".")) as made:
        (made / "folder").mkdir()
        (made / "folder" / "file").write_text("whole")
    assert (tmp_path / "folder" / "file").read_text() == "whole"
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
    assert tmp_path.stat().st_ino == place
    with pytest.raises(UserError, match="exists already"), whole_directory(tmp_path / "folder" / ".."):
        pass


def test_the_file_that_transformers_takes_is_taken(tmp_path):
    """Also with an adapter, another layout or an old index beside it."""
    safetensors.numpy.save_file({"a": np.float32([1])}, tmp_path / "model.safetensors")
    for other in ("adapter_model.safetensors", "consolidated.safetensors", "model-00001-of-00001.safetensors"):
        safetensors.numpy.save_file({"a": np.float32([2])}, tmp_path / other)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}))
    assert open_directory(tmp_path)["a"].view() == 1
    (tmp_path / "model.safetensors").unlink()
    assert open_directory(tmp_path)["a"].view() == 2

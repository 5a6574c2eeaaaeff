"""Sources: every kind of file gives its documents back, and every bad one a line that names it."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tpu.errors import UserError
from train.config import DataConfig
from train.data.text import sources
from train.data.text.sources import documents, is_held_out, source_digest

TEXTS = ["first line\nsecond", "naïve café, 東京 🙂", "third", "fourth"]


def read(source, counts=None, **fields) -> list[str]:
    return [d.text for d in documents(str(source), DataConfig(**fields), Counter() if counts is None else counts)]


def write_array_record(path, records):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def write(folder, kind: str) -> str:
    path = folder / f"a.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps({"id": i, "text": t}) for i, t in enumerate(TEXTS)) + "\n\n")
    elif kind == "parquet":
        pq.write_table(pa.table({"id": range(len(TEXTS)), "text": TEXTS}), path)
    elif kind == "array_record":
        write_array_record(path, [t.encode() for t in TEXTS])
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "array_record"])
def test_records_come_back_in_order_with_keys_of_their_text(tmp_path, kind):
    found = list(documents(write(tmp_path, kind), DataConfig(), Counter()))
    assert [d.text for d in found] == TEXTS
    assert len({d.key for d in found}) == len(TEXTS)
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"text": TEXTS[2]}))
    assert next(documents(str(other), DataConfig(), Counter())).key == found[2].key  # duplicates share a side


def test_globs_read_sorted_and_recursive(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.txt", "sub/c.txt"):
        (tmp_path / name).write_text(name)
    found = list(documents(f"{tmp_path}/**/*.txt", DataConfig(), Counter()))
    assert [d.text for d in found] == ["a.txt", "b.txt", "sub/c.txt"]
    assert [d.key for d in found] == ["a.txt", "b.txt", "sub/c.txt"]  # nothing of this machine in the key


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=st.lists(st.text(max_size=12), min_size=1, max_size=20), size=st.integers(8, 64))
def test_pieces_of_a_long_text_join_to_the_file(tmp_path, monkeypatch, pieces, size):
    monkeypatch.setattr(sources, "PIECE_BYTES", size)
    text = "\n\n".join(pieces)
    path = tmp_path / "long.txt"
    path.write_bytes(text.encode())
    counts = Counter()
    found = list(documents(str(path), DataConfig(invalid_utf8="refuse"), counts))
    assert "".join(d.text for d in found) == text  # "refuse": no character was cut in two
    assert all(0 < len(d.text.encode()) <= size for d in found)
    assert len({d.key for d in found}) == len(found)
    if len(text.encode()) <= size:
        assert [d.key for d in found] == ["long.txt"] * bool(text)


def test_long_text_is_cut_at_paragraphs(tmp_path):
    paragraph = "word " * 100 + "\n" + "more " * 50 + "\n\n"
    path = tmp_path / "book.txt"
    path.write_text(paragraph * 300)
    found = list(documents(str(path), DataConfig(), Counter()))
    assert all(d.text.endswith("\n\n") for d in found)
    assert all(16_000 < len(d.text) <= sources.PIECE_BYTES for d in found[:-1])
    assert [d.key for d in found] == [f"book.txt#{n}" for n in range(len(found))]


def test_invalid_utf8_is_replaced_and_counted_or_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes("fine\nalso \ufffd\nb".encode() + b"\xe9d\nend \xff\xfe")
    counts = Counter()
    assert read(tmp_path / "a.txt", counts) == ["fine\nalso \ufffd\nb\ufffdd\nend \ufffd\ufffd"]
    assert counts == {"replaced_characters": 3}  # the one that was in the file is not counted
    with pytest.raises(UserError, match=r"a\.txt, line 3: not UTF-8 \(byte 0xe9\)"):
        read(tmp_path / "a.txt", invalid_utf8="refuse")


def test_invalid_utf8_in_records(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "ok"}\n{"text": "b\xe9d"}\n{"text": "half \\ud83d"}\n')
    counts = Counter()
    assert read(tmp_path / "a.jsonl", counts) == ["ok", "b\ufffdd", "half \ufffd\ufffd\ufffd"]
    assert counts == {"replaced_characters": 4}
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: not UTF-8"):
        read(tmp_path / "a.jsonl", invalid_utf8="refuse")
    write_array_record(tmp_path / "a.array_record", [b"ok", b"b\xe9d"])
    with pytest.raises(UserError, match=r"record 2: not UTF-8"):
        read(tmp_path / "a.array_record", invalid_utf8="refuse")
    broken = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xe9d"))
    pq.write_table(pa.table({"text": broken}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ["\ufffdd"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("invalid", ["replace", "refuse"])
def test_utf16_is_refused_whatever_is_asked_of_invalid_utf8(tmp_path, name, encoding, invalid):
    text = "plain words of a Windows editor\n" * 3000
    text = text if name == "a.txt" else json.dumps({"text": text}) + "\n"
    (tmp_path / name).write_bytes(text.encode(encoding))
    data = DataConfig(invalid_utf8=invalid)
    with pytest.raises(UserError, match=rf"{name}, line 1: not UTF-8: .*UTF-16; convert it"):
        list(documents(str(tmp_path / name), data, Counter()))


def test_utf16_in_records(tmp_path):
    raw = "plain words".encode("utf-16")
    pq.write_table(pa.table({"text": pa.array([b"good", raw], pa.binary())}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet, row 2: not UTF-8: its byte-order mark says UTF-16"):
        list(documents(str(tmp_path / "a.parquet"), DataConfig(), Counter()))


@pytest.mark.parametrize(("name", "content"), [("a.txt", "Привет"), ("a.jsonl", '{"text": "Привет"}\n{"text": "é"}\n')])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path, name, content):
    found = []
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / name).write_bytes(content.encode(encoding))
        found.append(list(documents(str(tmp_path / name), DataConfig(invalid_utf8="refuse"), Counter())))
    assert found[0] == found[1]
    assert found[0][0].text == "Привет"


def test_empty_documents_are_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": "x"}\n')
    counts = Counter()
    assert read(tmp_path / "a.jsonl", counts) == ["x"]
    assert counts == {"empty_documents": 1}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b"}\n', r"a\.jsonl, line 2: no field 'text'; has body"),
        ("a.jsonl", b"[1]\n", r"a\.jsonl, line 1: a JSON list"),
        ("a.jsonl", b'{"text": 3}\n', r"a\.jsonl, line 1: data\.text_field='text' holds int"),
        ("a.jsonl", b'{"text": ' + b"[" * 100_000, r"a\.jsonl, line 1: not JSON"),
        ("a.parquet", b"nothing of the kind", r"a\.parquet: not a readable Parquet file"),
        ("a.array_record", b"nothing of the kind", r"a\.array_record: not a readable ArrayRecord"),
        ("a.csv", b"a,b", r"a\.csv: unknown kind of file; valid: \.txt, \.jsonl, \.parquet, \.array_record"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(f"{tmp_path}/*")


def test_bad_parquet_columns_are_named(tmp_path):
    pq.write_table(pa.table({"body": ["x"], "text": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: no field 'story'; has body, text"):
        read(tmp_path / "a.parquet", text_field="story")
    with pytest.raises(UserError, match=r"a\.parquet: data\.text_field='text' holds int64"):
        read(tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["x", None]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b\.parquet, row 2: .* holds NoneType"):
        read(tmp_path / "b.parquet")


def test_truncated_array_record_is_refused(tmp_path):
    path = tmp_path / "a.array_record"
    write_array_record(path, [os.urandom(500).hex().encode() for _ in range(500)])
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match="not a readable ArrayRecord"):
        read(path)


def test_a_glob_without_files_is_refused(tmp_path):
    for call in (read, lambda source: source_digest(source, DataConfig())):
        with pytest.raises(UserError, match="matches no file; valid: python_docs"):
            call(f"{tmp_path}/*.txt")


def test_digest_changes_with_the_files(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    os.utime(path, ns=(0, 0))
    first = source_digest(str(path), DataConfig())
    assert source_digest(str(path), DataConfig()) == first
    os.utime(path, ns=(0, 1))
    assert source_digest(str(path), DataConfig()) != first
    (tmp_path / "b.txt").write_text("two")
    assert source_digest(f"{tmp_path}/*.txt", DataConfig()) != source_digest(str(path), DataConfig())


def test_held_out_share_and_stability():
    keys = [f"document {n}" for n in range(20_000)]
    held = [key for key in keys if is_held_out(key, 0.05)]
    assert 800 < len(held) < 1200  # 1000 expected, standard deviation 31
    assert held == [key for key in held if is_held_out(key, 0.2)]  # a larger share keeps what a smaller one holds
    assert not any(is_held_out(key, 0.0) for key in keys)
    assert is_held_out("document 18", 0.05) == ("document 18" in held)


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    """A data set made here, without a network."""
    import tensorflow_datasets as tfds

    class TinyStories(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        url_infos = None  # nothing is downloaded

        def _info(self):
            features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "id": tfds.features.Scalar(np.int64)})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(TEXTS), "validation": self._generate_examples(["held"])}

        def _generate_examples(self, texts):
            for number, text in enumerate(texts):
                yield number, {"text": text, "id": number}

    folder = tmp_path_factory.mktemp("tfds")
    TinyStories(data_dir=folder, file_format="array_record").download_and_prepare()
    return str(folder)


def test_tensorflow_datasets_without_tensorflow(tfds_folder):
    assert sorted(read("tfds:tiny_stories", tfds_dir=tfds_folder)) == sorted(TEXTS)  # tfds shuffles while preparing
    assert read("tfds:tiny_stories:validation", tfds_dir=tfds_folder) == ["held"]
    assert len(read("tfds:tiny_stories:train[:2]", tfds_dir=tfds_folder)) == 2
    data = DataConfig(tfds_dir=tfds_folder)
    assert source_digest("tfds:tiny_stories", data) == source_digest("tfds:tiny_stories", data)
    assert "tensorflow" not in sys.modules


def test_bad_tensorflow_datasets_are_named(tfds_folder):
    for source, fields, message in (
        ("tfds:no_such_set", {}, "'tfds:no_such_set': Dataset no_such_set not found"),
        ("tfds:tiny_stories:test", {}, "'tfds:tiny_stories:test'"),
        ("tfds:tiny_stories", {"text_field": "story"}, "record 1: no field 'story'; has id, text"),
        ("tfds:tiny_stories", {"text_field": "id"}, "record 1: data.text_field='id' holds int, not text"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            read(source, tfds_dir=tfds_folder, **fields)
        assert "\n" not in str(caught.value)

"""The cache: quick the second time, never stale, never half written."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tpu.errors import UserError
from train.config import DataConfig
from train.data.text import cache
from train.data.text.sources import is_held_out
from train.data.text.tokenizer import ByteTokenizer

TEXTS = [f"document number {n} says {n * n}" for n in range(40)]


@pytest.fixture
def data(tmp_path) -> DataConfig:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    return DataConfig(
        sources=(f"{tmp_path}/a.jsonl",), holdout=0.3, cache_dir=str(tmp_path / "cache"), bpe_vocab_size=300
    )


def streams(data, tokenizer=None):
    return cache.streams(data.sources[0], data, tokenizer or ByteTokenizer())


def texts(stream) -> list[str]:
    """The documents of a stream of bytes."""
    starts = np.flatnonzero(stream == 256)
    return [ByteTokenizer().decode(part[1:]) for part in np.split(stream, starts)[1:]]


def test_streams_hold_every_document_once_on_its_side(data):
    train, held_out, report = streams(data)
    assert train.dtype == np.uint16
    assert sorted(texts(train) + texts(held_out)) == sorted(TEXTS)
    assert [t for t in TEXTS if t in set(texts(train))] == texts(train)  # order kept
    assert 0 < report["held_out"]["documents"] == len(texts(held_out)) < len(TEXTS)
    for side, stream in (("train", train), ("held_out", held_out)):
        assert report[side]["tokens"] == len(stream)
        assert report[side]["bytes"] == sum(len(text.encode()) for text in texts(stream))


def test_a_large_vocabulary_takes_four_bytes(data):
    class Wide(ByteTokenizer):
        vocab_size = end_of_document = beginning = 70_000

    assert streams(data, Wide()).train.dtype == np.uint32
    assert streams(data, Wide()).train[0] == 70_000


def test_the_second_time_nothing_is_read_or_trained(data, monkeypatch):
    first, tokenizer = streams(data), cache.bpe_tokenizer(data)
    monkeypatch.setattr(cache, "documents", None)
    monkeypatch.setattr(cache, "train_bpe", None)
    np.testing.assert_array_equal(streams(data).train, first.train)
    assert streams(data).report == first.report
    assert cache.bpe_tokenizer(data).to_dict() == tokenizer.to_dict()


@pytest.mark.parametrize("change", [{"holdout": 0.5}, {"invalid_utf8": "refuse"}, {"text_field": "story"}])
def test_any_setting_that_matters_makes_another_entry(data, change):
    streams(data)
    before = set(os.listdir(data.cache_dir))
    for name, value in change.items():
        setattr(data, name, value)
    if "text_field" in change:
        with pytest.raises(UserError, match="no field 'story'"):
            streams(data)
        assert set(os.listdir(data.cache_dir)) == before  # nothing half made is left
    else:
        streams(data)
        assert len(os.listdir(data.cache_dir)) == 2 * len(before)


def test_new_content_makes_another_entry(data):
    streams(data)
    with open(data.sources[0], "a") as file:
        file.write('\n{"text": "one more"}')
    assert streams(data).report["train"]["documents"] + streams(data).report["held_out"]["documents"] == len(TEXTS) + 1


def truncate(path):
    os.truncate(path, os.path.getsize(path) // 2)


def empty(path):
    os.truncate(path, 0)


def overwrite(path):
    with open(path, "r+b") as file:
        file.write(b"garbage!" * 4)


@pytest.mark.parametrize("damage", [truncate, empty, overwrite, os.remove])
@pytest.mark.parametrize("suffix", [".train.npy", ".held_out.npy", ".json"])
def test_damaged_streams_are_built_again(data, damage, suffix):
    expected = streams(data)
    expected = [expected.train.copy(), expected.held_out.copy(), expected.report]
    (name,) = (n for n in os.listdir(data.cache_dir) if n.endswith(suffix))
    damage(os.path.join(data.cache_dir, name))
    found = streams(data)
    np.testing.assert_array_equal(found.train, expected[0])
    np.testing.assert_array_equal(found.held_out, expected[1])
    assert found.report == expected[2]


@pytest.mark.parametrize("damage", [truncate, empty, overwrite, "flip"])
def test_a_damaged_tokenizer_is_trained_again(data, damage):
    expected = cache.bpe_tokenizer(data).to_dict()
    (name,) = os.listdir(data.cache_dir)
    path = os.path.join(data.cache_dir, name)
    if damage == "flip":  # still JSON, still a tokenizer: only its digest tells
        with open(path) as file:
            content = file.read()
        changed = content.replace("<|endoftext|>", "<|endoftexts|>").replace('\\"id\\": 0', '\\"id\\":  0')
        assert changed != content
        with open(path, "w") as file:
            file.write(changed)
    else:
        damage(path)
    assert cache.bpe_tokenizer(data).to_dict() == expected


def test_the_tokenizer_is_trained_on_the_train_side_only(data, monkeypatch):
    seen = []
    monkeypatch.setattr(cache, "train_bpe", lambda texts, size: seen.extend(texts) or ByteTokenizer())
    cache.bpe_tokenizer(data)
    assert seen == texts(streams(data).train)
    assert len(seen) < len(TEXTS)


def test_a_full_disk_is_named_and_leaves_nothing(data, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache, "_write_header", full)
    with pytest.raises(UserError, match=r"data\.cache_dir=.*cannot be written .*No space left"):
        streams(data)
    assert os.listdir(data.cache_dir) == []


def test_a_cache_that_cannot_be_a_folder_is_named(data, tmp_path):
    (tmp_path / "file").write_text("")
    data.cache_dir = str(tmp_path / "file")
    with pytest.raises(UserError, match=r"data\.cache_dir=.*cannot be written"):
        streams(data)


def test_where_the_cache_is(monkeypatch):
    monkeypatch.setenv("FOURSIGHT_CACHE", "/somewhere")
    assert str(cache.cache_folder(DataConfig())) == "/somewhere"
    assert str(cache.cache_folder(DataConfig(cache_dir="/else"))) == "/else"
    monkeypatch.delenv("FOURSIGHT_CACHE")
    assert cache.cache_folder(DataConfig()).parts[-2:] == (".cache", "foursight")


def test_is_held_out_decides(data):
    held = {d.text for d in cache.documents(data.sources[0], data, {}) if is_held_out(d.key, data.holdout)}
    assert set(texts(streams(data).held_out)) == held


BUILD = """
import sys
from train.config import DataConfig
from train.data.text import cache
data = DataConfig(sources=(sys.argv[1],), holdout=0.3, cache_dir=sys.argv[2], bpe_vocab_size=300)
tokenizer = cache.bpe_tokenizer(data)
for _ in range(20):
    for side in ("train", "held_out"):
        assert cache.streams(data.sources[0], data, tokenizer).report[side]["documents"] > 0
    cache._build(data.sources[0], data, tokenizer, sys.argv[3], "digest")
"""


def test_two_processes_build_at_once(data):
    tokenizer = cache.bpe_tokenizer(data)
    command = [sys.executable, "-c", BUILD, data.sources[0], data.cache_dir, "tokens-shared"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [subprocess.Popen(command, env=environment) for _ in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    found, expected = cache._open(data, "tokens-shared"), streams(data, tokenizer)
    np.testing.assert_array_equal(found.train, expected.train)
    np.testing.assert_array_equal(found.held_out, expected.held_out)
    assert not [name for name in os.listdir(data.cache_dir) if name.endswith(".tmp")]

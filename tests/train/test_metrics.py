"""What a crash, or a disk that is full, does to a run's figures: nothing that ends the run."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from train.metrics import MetricsWriter


@pytest.mark.parametrize(
    "left",
    [
        b'{"step": 2, "lo',
        b"\xff\xfe\x8a",
        bytes(4096),
        b"[1]\n7\nnull",
        b'{"loss": 1}',
        b'{"step": "two"}',
        b"[" * 99_999,
    ],
    ids=["cut", "no UTF-8", "NULs", "no objects", "no step", "a word", "deep"],
)
def test_what_a_crash_leaves_at_the_end_is_passed_over(tmp_path, left):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2.0}\n' + left)
    writer = MetricsWriter(tmp_path, 1, tensorboard=False)
    writer.write(2, {"loss": float("nan")})
    writer.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": "nan"}]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_file_of_the_users_beside_it_stays(tmp_path):
    (tmp_path / "metrics.tmp").write_text("precious")
    MetricsWriter(tmp_path, 0, tensorboard=False).close()
    assert (tmp_path / "metrics.tmp").read_text() == "precious"


@pytest.mark.parametrize("tensorboard", [False, True])
def test_a_full_disk_is_said_once_and_training_goes_on(tmp_path, monkeypatch, caplog, tensorboard):
    monkeypatch.setattr("train.metrics.FLUSH_SECONDS", -1)
    writer = MetricsWriter(tmp_path, 0, tensorboard)
    with Path("/dev/full").open("ab", buffering=0) as full:
        if tensorboard:
            writer._board._file._py_recordio_writer._writer = full
        else:
            writer._file = io.TextIOWrapper(full, write_through=True)
        for step in range(1, 40):
            writer.write(step, {"loss": 1.0})
        writer.close()
    assert caplog.text.count("cannot be written at present (No space left on device); training goes on") == 1

"""The command line: every mistake is one line on standard error and status 2, and comes before jax is imported."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def call(*arguments: str, **options) -> subprocess.CompletedProcess:
    """`python -m train.pretrain` where a dry run would import jax and nothing else of size."""
    command = [sys.executable, "-m", "train.pretrain", *arguments]
    return subprocess.run(command, **{"cwd": ROOT, "capture_output": True, "text": True, "timeout": 60} | options)


MISTAKES = [
    ("", "--config is missing; give one of configs/adapter.py, configs/bert.py, "),
    (
        "--config=configs/none.py",
        "--config=configs/none.py: no such file; there is configs/adapter.py, configs/bert.py, ",
    ),
    ("--config configs/none.py", "configs/none.py"),
    ("--config=configs/gpt2.py:999m", "configs/gpt2.py:999m: valid: 124m, 355m, 774m, 1558m"),
    ("MINI --config.model.layrs=2", "config.model.layrs: no such field; did you mean layers? valid: vocab_size, "),
    ("MINI --config.model.layers.x=2", "config.model.layers.x: no such field; config.model.layers has no fields"),
    ("MINI --config.model.layers=two", "config.model.layers=two: must be an integer"),
    ("MINI --config.run.steps=1e3", "config.run.steps=1e3: must be an integer"),
    ("MINI --config.optimizer.eps=small", "config.optimizer.eps=small: must be a finite number"),
    ("MINI --config.model.tied_head=maybe", "config.model.tied_head=maybe: must be true or false"),
    ("MINI --config.data.weights=much", "data.weights"),
    ("MINI --config.data=big", "config.data=big: set one of its fields: sources, "),
    ("MINI --config.model.heads=3", "model.heads=3: does not divide model.embed_dim=256; valid: 1, 2, 4, 8, "),
    ("MINI --config.data.context=512", "data.context=512: longer than the learned positions; valid: 1 to "),
    ("MINI", "--workdir is missing"),
    ("MINI --wrkdir=x", "Unknown command line flag 'wrkdir'. Did you mean: workdir ?"),
    ("MINI runs/a", "'runs/a' is not a flag; flags begin with --"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[arguments for arguments, _ in MISTAKES])
def test_a_mistake_is_one_line(arguments, message):
    done = call(*arguments.replace("MINI", "--config=configs/gpt_mini.py").split())
    assert message in done.stderr
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: ")


CONFIG_FILES = [
    ("def get_config(:", "SyntaxError"),
    ("import nowhere", "No module named 'nowhere'"),
    ("def get_config(): raise ValueError('of mine')", "of mine"),
    ("x = 1", "get_config"),
    ("def get_config(): return 3", "int"),
    ("def get_config(): return {'model': 3}", "dict"),
    (
        "from train.config import *\ndef get_config():\n    e = Experiment()\n    e.model.heads = 5\n    return e",
        "model.heads=5: does not divide",
    ),
    (
        "from train.config import *\ndef get_config():\n    e = Experiment()\n    e.model = 5\n    return e",
        "model=5: must be a ModelConfig",
    ),
]


@pytest.mark.parametrize(("content", "message"), CONFIG_FILES)
def test_a_config_file_that_fails_is_one_line(tmp_path, content, message):
    path = tmp_path / "mine.py"
    path.write_text(content)
    done = call(f"--config={path}", "--dry_run")
    assert message in done.stderr
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


ENTRY = """
import sys
from tpu.errors import UserError
from train import entry
def main():
    {}
if __name__ == "__main__":
    entry.run(main)
"""


@pytest.mark.parametrize(
    ("body", "status", "stderr"),
    [
        ("pass", 0, ""),
        ("return 7", 7, ""),
        ("raise UserError('two\\n  lines')", 2, "error: two lines\n"),
        ("raise KeyboardInterrupt", 130, "interrupted\n"),
        ("raise BrokenPipeError", 141, ""),
    ],
)
def test_how_an_entry_point_ends(tmp_path, body, status, stderr):
    (tmp_path / "mine.py").write_text(ENTRY.format(body))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, tmp_path / "mine.py"], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (status, stderr)


def test_a_mistake_of_ours_keeps_its_traceback(tmp_path):
    (tmp_path / "mine.py").write_text(ENTRY.format("raise RuntimeError('ours')"))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, tmp_path / "mine.py"], capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.endswith("RuntimeError: ours\n")


@pytest.mark.parametrize("arguments", ["--help", "--config=configs/gpt_mini.py --dry_run"])
def test_a_reader_that_leaves_is_no_error(arguments):
    """As `... --dry_run | head -1`."""
    command = [sys.executable, "-m", "train.pretrain", *arguments.split()]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode in (141, -signal.SIGPIPE), done.stderr) == (True, "")


def test_overrides_reach_the_experiment(tmp_path):
    """Numbers, truth values, tuples, strings, and a file of one's own elsewhere."""
    path = tmp_path / "mine.py"
    path.write_text((ROOT / "configs" / "gpt_mini.py").read_text())
    given = {
        "model.layers": "2",
        "model.tied_head": "false",
        "model.pattern": "('local', 'global')",
        "model.window": "8",
        "data.sources": "('a.txt', 'b.txt')",
        "data.weights": "(0.5, 2.0)",
        "optimizer.learning_rate": "1e-4",
        "optimizer.no_decay": "()",
        "run.steps": "5000",
        "name": "mine",
    }
    flags = [f"--config.{field}={value}" for field, value in given.items()]
    done = call(f"--config={path}", "--dry_run", "--noconfig.run.tensorboard", *flags)
    assert (done.returncode, done.stderr) == (0, "")
    wanted = given | {"model.tied_head": "False", "name": "'mine'", "optimizer.learning_rate": "0.0001"}
    for field, value in (wanted | {"run.tensorboard": "False"}).items():
        assert f"{field} = {value}" in done.stdout.splitlines()

"""The command line: every mistake is one line on standard error and status 2, and comes before jax is imported."""

from __future__ import annotations

import ast
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tpu.errors import UserError
from train import entry

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
    (
        "MINI --config.data.sources=a,,b",
        "sources=a,,b: must be a tuple of str, such as a,b or \"('a', 'b')\"",
    ),
    ("MINI --config.data.sources=(a,b", "config.data.sources=(a,b: must be a tuple of str"),
    ("MINI --config.data=big", "config.data=big: set one of its fields: sources, "),
    ("MINI --config.model.heads=3", "model.heads=3: does not divide model.embed_dim=256; valid: 1, 2, 4, 8, "),
    ("MINI --config.data.context=512", "data.context=512: longer than the learned positions; valid: 1 to "),
    ("MINI", "--workdir is missing"),
    ("MINI --dry_run --json=configs", "json=configs: is a directory; give the name of a file"),
    ("MINI --workdir=x --json=x.json", "json=x.json: only with --dry_run; a run's figures are in its metrics.jsonl"),
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
    ("from model.vision_config import VisionConfig", "has moved: write `from model.config import VisionConfig` in"),
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
        ("raise OSError(28, 'No space left on device', 'a.json')", 2, "error: a.json: No space left on device\n"),
    ],
)
def test_how_an_entry_point_ends(tmp_path, body, status, stderr):
    (tmp_path / "mine.py").write_text(ENTRY.format(body))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, tmp_path / "mine.py"], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (status, stderr)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "out of memory: none was left; make the model, its batch or its context smaller, or "),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore"),
            "out of memory: Out of memory all",
        ),
        (OSError(28, "No space left on device"), "writing: No space left on device"),
        (FileNotFoundError(2, "No such file or directory", "ours"), ""),
        (RuntimeError("ours"), ""),
        (RuntimeError(), ""),
    ],
)
def test_what_the_machine_has_run_out_of_is_no_mistake_of_ours(error, message):
    found = entry._exhausted(error)
    assert found.startswith(message)
    assert bool(found) == bool(message)


def test_a_mistake_of_ours_keeps_its_traceback(tmp_path):
    (tmp_path / "mine.py").write_text(ENTRY.format("raise RuntimeError('ours')"))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, tmp_path / "mine.py"], capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.endswith("RuntimeError: ours\n")


def test_a_text_that_the_terminal_cannot_show_ends_nothing(tmp_path):
    (tmp_path / "mine.py").write_text(
        ENTRY.format("print('caf\u00e9 \udcff')"), encoding="utf-8", errors="backslashreplace"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, tmp_path / "mine.py"], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "caf\\xe9 \\udcff\n", "")


def test_a_path_may_begin_with_the_home(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert [entry.PATH.parse(path) for path in ("~", "~/a", "b/~", "c")] == ["/somewhere", "/somewhere/a", "b/~", "c"]
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # without HOME and an entry in the passwords
    with pytest.raises(ValueError, match="no home directory"):
        entry.PATH.parse("~/a")


def test_every_flag_that_is_a_path_is_read_as_one():
    """Those of all commands whose help speaks of a file or a directory."""
    found = set()
    for path in ROOT.glob("[mst]*/**/*.py"):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and getattr(call.func, "attr", "").startswith("DEFINE"):
                texts = [node.value for node in ast.walk(call) if isinstance(node, ast.Constant)]
                words = " ".join(text for text in texts if isinstance(text, str))
                if re.search(r"\b(file|directory|workdir|lies now)\b", words) and "PATH" not in ast.unparse(call):
                    found.add(texts[0])
    assert found == {"config", "space", "shard_bytes"}  # an experiment's file, what it holds, the size of a file


def test_a_file_that_cannot_be_written_is_named_before_the_work(tmp_path):
    (tmp_path / "folder").mkdir()
    for file, message in (
        (tmp_path / "folder", "is a directory; give the name of a file"),
        (tmp_path / "nowhere" / "x", "its directory does not exist"),
    ):
        with pytest.raises(UserError, match=f"json={file}: {message}"):
            entry.need_writable(page=None, json=str(file))
    entry.need_writable(json=str(tmp_path / "new"))
    entry.need_writable(json="/dev/stdout")


@pytest.mark.parametrize("arguments", ["--help", "--config=configs/gpt_mini.py --dry_run"])
def test_a_reader_that_leaves_is_no_error(arguments):
    """As `... --dry_run | head -1`."""
    command = [sys.executable, "-m", "train.pretrain", *arguments.split()]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode in (141, -signal.SIGPIPE), done.stderr) == (True, "")


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("corpus/*.jsonl", ("corpus/*.jsonl",)),
        ("a.jsonl,b.jsonl", ("a.jsonl", "b.jsonl")),
        ("a, b", ("a", "b")),
        ("5", ("5",)),
        ("tfds:wiki:train[:1%]", ("tfds:wiki:train[:1%]",)),
        ("('a','b')", ("a", "b")),
        ("('a,b',)", ("a,b",)),
        ("['(a)']", ("(a)",)),
        ("'a','b'", ("a", "b")),
        ("'a,b'", ("a,b",)),
        ("()", ()),
    ],
)
def test_tuples_of_strings_are_given_plainly_or_as_python_writes_them(given, names):
    from ml_collections.config_flags.tuple_parser import TupleParser

    for argv in ([f"--config.data.sources={given}"], ["--config.data.sources", given]):
        found = entry._with_tuples(["train.pretrain", *argv, "--config.run.steps=3", "--config=a,b"])
        assert TupleParser().parse(found[-3].removeprefix("--config.data.sources=")) == names
        assert found[-2:] == ["--config.run.steps=3", "--config=a,b"]
    numbers = ["train.pretrain", "--config.data.weights=0.5,2.0", "--workdir=a,b"]
    assert entry._with_tuples(numbers) == numbers


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
        "run.start": "runs/a,runs/b",
        "data.weights": "(0.5, 2.0)",
        "optimizer.learning_rate": "1e-4",
        "optimizer.no_decay": "()",
        "run.steps": "5000",
        "name": "mine",
    }
    flags = [f"--config.{field}={value}" for field, value in given.items()]
    done = call(f"--config={path}", "--dry_run", "--noconfig.run.tensorboard", *flags)
    assert (done.returncode, done.stderr) == (0, "")
    wanted = given | {
        "run.start": "('runs/a', 'runs/b')",
        "model.tied_head": "False",
        "name": "'mine'",
        "optimizer.learning_rate": "0.0001",
    }
    for field, value in (wanted | {"run.tensorboard": "False"}).items():
        assert f"{field} = {value}" in done.stdout.splitlines()

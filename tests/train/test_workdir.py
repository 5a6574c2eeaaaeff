"""The workdir: who may hold it, what it remembers, and which experiments may go on in it."""

from __future__ import annotations

import dataclasses
import fcntl
import importlib.metadata
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from model.config import ModelConfig, VisionConfig
from tpu.errors import UserError
from train.config import DataConfig, Experiment, OptimizerConfig, RunConfig
from train.resolve import resolve
from train.workdir import (
    Workdir,
    check_same_model,
    git_revision,
    read_experiment,
    versions,
    write_json,
)

# Fields of the model that change how it is computed or regularised, and neither its weights nor their meaning.
FREE = ("compute_dtype", "platform", "attention", "context_parallel", "pipeline_microbatches", "layer_loop", "remat")
FREE += ("embedding_noise", "embedding_dropout", "attention_dropout", "residual_dropout")

ROOT = Path(__file__).resolve().parents[2]

HOLD = """
    import sys, time
    from train.workdir import Workdir
    workdir = Workdir(sys.argv[1])
    print("held", flush=True)
    time.sleep(60)
"""


def hold(path: Path) -> subprocess.Popen:
    """Another process that has the workdir."""
    command = [sys.executable, "-c", textwrap.dedent(HOLD), str(path)]
    process = subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


# The lock


def test_the_second_process_is_refused_until_the_first_is_gone(tmp_path):
    path = tmp_path / "runs" / "a"
    process = hold(path)
    with pytest.raises(UserError, match=f"in use by process {process.pid} on {socket.gethostname()}"):
        Workdir(path)
    assert json.loads((path / "lock").read_text()) == {"pid": process.pid, "host": socket.gethostname()}
    process.send_signal(signal.SIGKILL)
    process.communicate()
    workdir = Workdir(path)
    assert json.loads((path / "lock").read_text())["pid"] == os.getpid()
    with pytest.raises(UserError, match=f"in use by process {os.getpid()} "):
        Workdir(path)
    workdir.close()
    Workdir(path).close()


def test_a_stale_lock_file_is_no_obstacle(tmp_path):
    (tmp_path / "lock").write_text(json.dumps({"pid": 1, "host": "elsewhere" * 20}))
    Workdir(tmp_path).close()
    assert json.loads((tmp_path / "lock").read_text()) == {"pid": os.getpid(), "host": socket.gethostname()}


def test_a_holder_that_has_not_said_its_name_yet(tmp_path):
    with (tmp_path / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="in use by another process; "):
            Workdir(tmp_path)


def test_a_workdir_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"workdir=.*file: File exists; give --workdir a directory"):
        Workdir(tmp_path / "file")
    with pytest.raises(UserError, match="Not a directory"):
        Workdir(tmp_path / "file" / "below")


def test_importing_it_leaves_jax_alone():
    code = "import sys, train.workdir, train.signals; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# The experiment


def an_experiment(**model) -> Experiment:
    experiment = Experiment(
        name="é",
        model=ModelConfig(**{"pattern": ("local", "global"), "window": 8, "rope_theta": 1 / 3} | model),
        data=DataConfig(sources=("a", "b"), weights=(0.1, 3e-5)),
    )
    return resolve(experiment)


def test_the_experiment_is_read_back_equal(tmp_path):
    experiment = an_experiment()
    workdir = Workdir(tmp_path)
    assert workdir.write_experiment(experiment) == []
    assert read_experiment(tmp_path) == experiment
    tree = json.loads((tmp_path / "experiment.json").read_text())
    assert tree["versions"] == versions()
    assert tree["git_revision"] == git_revision()
    changed = dataclasses.replace(experiment, run=RunConfig(steps=7), optimizer=OptimizerConfig(learning_rate=0.5))
    assert sorted(workdir.write_experiment(changed)) == [
        f"optimizer.decay_steps: {experiment.optimizer.decay_steps}, 0",
        "optimizer.learning_rate: 0.001, 0.5",
        "run.steps: 1000, 7",
    ]
    assert read_experiment(tmp_path) == changed
    with pytest.raises(UserError, match=r"another model \(model.heads: 6, 2; .*use another --workdir"):
        workdir.write_experiment(an_experiment(heads=2))
    assert read_experiment(tmp_path) == changed
    assert not list(tmp_path.glob("*.tmp"))
    workdir.close()


OTHER = {str: "other", bool: None, int: 12345, float: 0.123, tuple: ("global",)}


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(ModelConfig) if f.name != "vision"])
def test_every_field_of_the_model_is_refused_or_free(field):
    old = an_experiment()
    value = getattr(old.model, field)
    other = not value if isinstance(value, bool) else OTHER[type(value)]
    new = dataclasses.replace(old, model=dataclasses.replace(old.model, **{field: other}))
    row = f"model.{field}: {value!r}, {other!r}"
    if field in FREE:
        assert check_same_model(old, new) == [row]
    else:
        with pytest.raises(UserError) as error:
            check_same_model(old, new)
        assert row in str(error.value)
    assert check_same_model(old, old) == []


def test_every_field_of_sight_is_refused():
    old = an_experiment()
    for field in dataclasses.fields(VisionConfig):
        value = getattr(old.model.vision, field.name)
        other = not value if isinstance(value, bool) else OTHER[type(value)]
        vision = dataclasses.replace(old.model.vision, **{field.name: other})
        new = dataclasses.replace(old, model=dataclasses.replace(old.model, vision=vision))
        with pytest.raises(UserError) as error:
            check_same_model(old, new)
        assert f"model.vision.{field.name}: {value!r}, {other!r}" in str(error.value)


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"experiment": {"nonsense": 1}}'])
def test_an_unreadable_experiment_is_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "experiment.json").write_text(content)
    with pytest.raises(UserError, match=r"experiment\.json|nonsense: no such field") as error:
        read_experiment(tmp_path)
    assert "\n" not in str(error.value)


def test_versions():
    found = versions()
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["numpy"] == importlib.metadata.version("numpy")


def test_write_json_keeps_the_old_file_when_it_fails(tmp_path):
    write_json(tmp_path / "x", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "x", {"b": [2, object()]})
    assert json.loads((tmp_path / "x").read_text()) == {"a": 1}


def test_git_revision(tmp_path, monkeypatch):
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=n", "-c", "user.email=e@example.org")
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert git_revision(tmp_path) is None
    git("init")
    assert git_revision(tmp_path) is None  # no commit yet
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "file").write_text("1")
    git("add", ".")
    git("commit", "-m", "first")
    git("tag", "-a", "v1", "-m", "v1")
    head = git("rev-parse", "HEAD")
    assert git_revision(tmp_path) == head
    assert git_revision(tmp_path / "inner") is None
    (tmp_path / "inner" / "file").write_text("2")
    assert git_revision(tmp_path) == head + "+dirty"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_revision(tmp_path) is None

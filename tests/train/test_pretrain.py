"""Pre-training from end to end: resuming is bitwise, whatever ended the run before; mistakes are told.

The tests of signals and of kill -9 run the command as users do; the others call what it calls.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests.runs import PROGRAMS, terminated_at, train_here
from tpu import host
from tpu.errors import UserError
from train.checkpoint import checkpoint
from train.checkpoint.checkpoint import Checkpointer, read_meta
from train.config import Experiment
from train.objectives import next_token
from train.objectives.table import OBJECTIVES
from train.program import make_program
from train.tree import to_dict
from train.workdir import Workdir, read_experiment

ROOT = Path(__file__).resolve().parents[2]


def leaves(path: Path, step: int, mesh: jax.sharding.Mesh) -> dict[str, np.ndarray]:
    """Everything in a checkpoint but its meta, by path; random keys as their numbers."""
    step_dir = path / "checkpoints" / str(step)
    experiment = read_experiment(path)
    with jax.set_mesh(mesh):
        model = experiment.model.placed("cpu", host.fast_dtype("cpu"))
        abstract = make_program(dataclasses.replace(experiment, model=model), mesh).abstract_state
    found = {}
    for field, tree in abstract._asdict().items():
        if tree is not None:
            restored = checkpoint.load_weights(step_dir, tree, field)
            found |= {field + jax.tree_util.keystr(p): v for p, v in jax.tree_util.tree_leaves_with_path(restored)}
    return {name: np.asarray(jax.random.key_data(v) if name == "key" else v) for name, v in found.items()}


def assert_same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if a[name].tobytes() != b[name].tobytes()] == []


def steps_of(path: Path) -> list[int]:
    return sorted(int(p.name) for p in (path / "checkpoints").iterdir() if p.name.isdecimal())


def losses(path: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    found = [(line["step"], line["loss"]) for line in lines if "eval" not in line]
    assert len(dict(found)) == len(found)
    return dict(found)


# Resuming


OPTIMIZERS = [{"name": "adamw", "ema_decay": 0.9, "schedule": "cosine"}, {"name": "muon", "schedule": "wsd"}]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda optimizer: optimizer["name"])
def test_stopped_and_resumed_is_the_uninterrupted_run_to_the_bit(tmp_path, micro, one_device, capsys, optimizer):
    """With dropout, accumulation, an evaluation in between, and an average of the weights where there is one."""
    experiment = micro(optimizer=optimizer, run={"eval_every": 3, "tensorboard": True})
    assert experiment.model.residual_dropout > 0
    assert experiment.optimizer.accumulation == 2
    assert train_here(experiment, tmp_path / "whole") == 0
    with terminated_at(5):
        assert train_here(experiment, tmp_path / "parts") == 0
    assert steps_of(tmp_path / "parts") == [5]
    out = capsys.readouterr().out
    assert f"SIGTERM: step 5 is saved in {tmp_path / 'parts' / 'checkpoints'}; the same command goes on" in out
    assert train_here(experiment, tmp_path / "parts") == 0
    assert f"resuming from step 5 in {tmp_path / 'parts'}" in capsys.readouterr().out
    whole, parts = (leaves(tmp_path / name, 8, one_device) for name in ("whole", "parts"))
    assert_same_bits(whole, parts)
    assert whole["step"] == 8
    assert any(name.startswith("optimizer_state") and "kernel" in name for name in whole)
    assert len(list((tmp_path / "parts" / "tensorboard").iterdir())) == 2
    assert any(name.startswith("ema") for name in whole) == ("ema_decay" in optimizer)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert len(losses(tmp_path / "whole")) == 8


@pytest.mark.parametrize("devices", [1, 2])
def test_a_run_compiles_its_step_once(tmp_path, micro, caplog, devices):
    """On a mesh too, with evaluations between the steps; and once more when another process resumes it."""
    experiment = micro(run={"eval_every": 3}, mesh={"fsdp": devices})

    PROGRAMS.clear()

    def compilations() -> int:
        caplog.clear()
        with caplog.at_level(logging.WARNING), jax.log_compiles():
            assert train_here(experiment, tmp_path / "run", devices=devices) == 0
        PROGRAMS.clear()
        return sum("Compiling jit(step)" in record.getMessage() for record in caplog.records)

    with terminated_at(5):
        assert compilations() == 1
    assert compilations() == 1
    assert len(losses(tmp_path / "run")) == 8


def test_a_damaged_checkpoint_costs_its_steps_and_no_bit(tmp_path, micro, one_device, caplog):
    experiment = micro(run={"save_every": 3})
    assert train_here(experiment, tmp_path / "whole") == 0
    assert steps_of(tmp_path / "whole") == [3, 6, 8]
    with terminated_at(7):
        assert train_here(experiment, tmp_path / "parts") == 0
    assert steps_of(tmp_path / "parts") == [3, 6, 7]
    files = [p for p in (tmp_path / "parts" / "checkpoints" / "7" / "weights").rglob("*") if p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert train_here(experiment, tmp_path / "parts") == 0
    assert re.search(r"checkpoints/7 is damaged: .*weights.*; trying the step before it", caplog.text)
    assert (tmp_path / "parts" / "checkpoints" / "7.damaged").is_dir()
    assert_same_bits(*(leaves(tmp_path / name, 8, one_device) for name in ("whole", "parts")))
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


def test_what_is_saved_while_training_goes_on_is_the_state_of_that_step(tmp_path, micro, one_device, monkeypatch):
    """Steps donate their state; a save that read from it late would find the next one's numbers."""
    copies = {}
    save = Checkpointer.save

    def copying(self, step, state, meta, metrics=None):
        copies[step] = jax.tree.map(lambda leaf: np.array(leaf), state._replace(key=jax.random.key_data(state.key)))
        save(self, step, state, meta, metrics)

    monkeypatch.setattr(Checkpointer, "save", copying)
    assert train_here(micro(run={"save_every": 1, "keep_last": 9}), tmp_path) == 0
    assert steps_of(tmp_path) == list(copies) == list(range(1, 9))
    for step, state in copies.items():
        wanted = {
            field + jax.tree_util.keystr(path): leaf
            for field, tree in state._asdict().items()
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        assert_same_bits(leaves(tmp_path, step, one_device), wanted)
    kernel = "weights['stack']['groups']['layer_0']['mlp']['up']['kernel']"
    assert len({leaves(tmp_path, step, one_device)[kernel].tobytes() for step in (1, 4, 8)}) == 3


def test_a_finished_run_is_left_alone_until_it_is_given_more_steps(tmp_path, micro, capsys):
    assert train_here(micro(), tmp_path) == 0
    before = (tmp_path / "metrics.jsonl").read_text()
    assert train_here(micro(), tmp_path) == 0
    assert "already at step 8 of run.steps=8; raise --config.run.steps to go on" in capsys.readouterr().out
    assert (tmp_path / "metrics.jsonl").read_text() == before
    assert train_here(micro(run={"steps": 10}), tmp_path) == 0
    assert sorted(losses(tmp_path)) == list(range(1, 11))


def test_a_checkpoint_holds_what_tools_need(tmp_path, micro):
    experiment = micro(run={"eval_every": 5})
    assert train_here(experiment, tmp_path) == 0
    meta = read_meta(tmp_path / "checkpoints" / "8")
    assert meta["experiment"] == to_dict(experiment)
    assert (meta["tokenizer"], meta["data_position"]) == ({"kind": "bytes"}, 8)
    assert meta["versions"]["jax"] == jax.__version__
    assert meta["corpus"]["sources"][0]["source"] == experiment.data.sources[0]
    assert read_experiment(tmp_path) == experiment
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    held_out = [(line["step"], line["eval"]) for line in written if "eval" in line]
    assert [step for step, _ in held_out] == [5, 8]
    for _, figures in held_out:
        assert figures["perplexity"] == pytest.approx(np.exp(figures["loss"]))
        assert 0 < figures["bits_per_byte"] < 8.5


# Mistakes and misfortunes


def test_a_vocabulary_larger_than_the_embedding_can_be_corrected(tmp_path, micro):
    """Nothing was trained, so the same workdir takes the corrected experiment."""
    with pytest.raises(UserError, match=r"model\.vocab_size=256: smaller than the 257 tokens"):
        train_here(micro(model={"vocab_size": 256}, data={"bpe_vocab_size": 256}), tmp_path)
    assert train_here(micro(run={"steps": 3}), tmp_path) == 0


def test_another_model_or_optimizer_is_refused_by_name(tmp_path, micro):
    assert train_here(micro(run={"steps": 3}), tmp_path) == 0
    with pytest.raises(UserError, match=r"another model \(model\.embed_dim: 32, 48; .*use another --workdir"):
        train_here(micro(model={"embed_dim": 48, "mlp_dim": 128}), tmp_path)
    with pytest.raises(UserError, match=r"another model or optimizer: optimizer_state\S+ is "):
        train_here(micro(optimizer={"name": "lion"}), tmp_path)
    (tmp_path / "experiment.json").unlink()
    with pytest.raises(
        UserError, match=r"another model or optimizer: weights\S+ is float32\[\d.*\] there, float32\[\d"
    ):
        train_here(micro(model={"embed_dim": 48}), tmp_path)
    assert train_here(micro(run={"steps": 4}), tmp_path) == 0


def test_an_end_before_the_first_step_claims_no_checkpoint(tmp_path, micro, monkeypatch, capsys):
    load = next_token.OBJECTIVE.corpus

    def terminated(experiment, tokenizer):
        os.kill(os.getpid(), signal.SIGTERM)
        return load(experiment, tokenizer)

    monkeypatch.setitem(OBJECTIVES, "next_token", next_token.OBJECTIVE._replace(corpus=terminated))
    assert train_here(micro(), tmp_path) == 0
    assert ("is saved" in capsys.readouterr().out) == bool(steps_of(tmp_path))


def test_divergence_ends_with_a_checkpoint_and_status_1(tmp_path, micro, one_device, capsys):
    """A rate that overflows the weights: from then on every loss is not finite, and every update left out."""
    optimizer = {"name": "sgd", "learning_rate": 1e30, "schedule": "constant", "warmup_steps": 0, "clip_norm": 0.0}
    assert train_here(micro(optimizer=optimizer, run={"steps": 30, "max_bad_steps": 4}), tmp_path) == 1
    captured = capsys.readouterr()
    assert captured.out.count("not finite, update skipped") >= 4
    assert "error: 4 updates in a row had a loss or gradient that is not finite; stopped. step" in captured.err
    assert "lower optimizer.learning_rate" in captured.err
    (step,) = steps_of(tmp_path)
    found = leaves(tmp_path, step, one_device)
    assert found["skipped_in_a_row"] >= 4
    assert all(np.isfinite(value).all() for name, value in found.items() if name.startswith("weights"))


# As users run it


CONFIG = """
from train.config import Experiment
from train.tree import from_dict


def get_config():
    return from_dict(Experiment, {})
"""


def start(workdir: Path, experiment: Experiment, **environment: str) -> subprocess.Popen:
    """`python -m train.pretrain`, with the experiment in a file beside the workdir; all it says in one stream."""
    config = workdir.parent / "experiment.py"
    config.write_text(CONFIG.format(to_dict(experiment)))
    return subprocess.Popen(
        [sys.executable, "-m", "train.pretrain", f"--config={config}", f"--workdir={workdir}"],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def read_until(process: subprocess.Popen, pattern: str) -> bool:
    """Whether a line of its output matched before the output ended."""
    return any(re.search(pattern, line) for line in process.stdout)


def end(process: subprocess.Popen, status: int = 0) -> str:
    """Waits for the end of a process that leaves with this status; returns the rest of its output."""
    out, _ = process.communicate(timeout=300)
    assert process.returncode == status, out
    return out


@pytest.fixture(scope="module")
def drilled(micro) -> Experiment:
    return micro(run={"steps": 40, "save_every": 5, "eval_every": 20})


@pytest.fixture(scope="module")
def undisturbed(drilled, one_device, tmp_path_factory) -> tuple[dict[str, np.ndarray], dict[int, float]]:
    """The end of a run that nothing disturbs, and its losses."""
    path = tmp_path_factory.mktemp("undisturbed") / "run"
    assert re.search(r"finished after \d+ s; step 40 is saved in", end(start(path, drilled)))
    return leaves(path, 40, one_device), losses(path)


def assert_ends_like(path: Path, undisturbed: Any, mesh: jax.sharding.Mesh) -> None:
    assert_same_bits(leaves(path, 40, mesh), undisturbed[0])
    assert losses(path) == undisturbed[1]


@pytest.mark.parametrize(
    ("compiling", "last"), [pytest.param("step", 1, marks=pytest.mark.slow), ("evaluate", 20)], ids=["step", "evaluate"]
)
def test_sigterm_saves_whatever_the_run_is_doing(tmp_path, drilled, undisturbed, one_device, compiling, last):
    """It compiles its first step, or its first evaluation; then it goes on to its end."""
    path = tmp_path / "run"
    process = start(path, drilled, JAX_LOG_COMPILES="1")
    assert read_until(process, f"Compiling jit.{compiling}")
    process.send_signal(signal.SIGTERM)
    out = end(process)
    assert "SIGTERM: finishing the step in hand, saving, then leaving; once more stops at once\n" in out
    told = re.search(r"^SIGTERM: step (\d+) is saved in .*; the same command goes on from there", out, re.MULTILINE)
    assert steps_of(path)[-1] == max(losses(path)) == int(told[1]) == last
    assert '"eval"' not in (path / "metrics.jsonl").read_text()
    assert "finished after" in end(start(path, drilled))
    assert_ends_like(path, undisturbed, one_device)


def drill(folder: Path, experiment: Experiment, kills: list[tuple[int, float]]) -> list[Path]:
    """Kills runs so many seconds after so many of their steps, and resumes them; returns the workdirs of all runs."""
    runs = [folder / "0" / "run"]
    while True:
        runs[-1].parent.mkdir(exist_ok=True)
        process = start(runs[-1], experiment)
        if not kills:
            end(process)
            return runs
        steps, seconds = kills[0]
        alive = all(read_until(process, r"^step \d+/40") for _ in range(steps))
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        if alive:
            end(process, -signal.SIGKILL)
            kills = kills[1:]
        else:  # It came to its end before.
            process.communicate()
            runs.append(folder / str(len(runs)) / "run")


def test_killed_and_resumed_ends_like_the_undisturbed_run(tmp_path, drilled, undisturbed, one_device):
    (path,) = drill(tmp_path, drilled, [(13, 0.02)])
    assert_ends_like(path, undisturbed, one_device)


@pytest.mark.slow
def test_kill_nine_drill(tmp_path, drilled, undisturbed, one_device):
    """Twenty kills, a fifth of them while starting, the others while training or saving."""
    rng = random.Random(0)
    starting = [(0, rng.uniform(0, 5)) for _ in range(4)]
    training = [(rng.randint(1, 9), rng.uniform(0, 0.1)) for _ in range(16)]
    for path in drill(tmp_path, drilled, rng.sample(starting + training, 20)):
        assert_ends_like(path, undisturbed, one_device)


def test_a_second_process_is_refused(tmp_path, drilled):
    path = tmp_path / "run"
    workdir = Workdir(path)
    out = end(start(path, drilled), 2)
    workdir.close()
    holder = f"process {os.getpid()} on {os.uname().nodename}"
    assert out == f"error: workdir={path}: in use by {holder}; stop it or give another --workdir\n"

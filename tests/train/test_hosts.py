"""Training on several hosts, each a process of this machine, disturbed on purpose: the loss curve stays what it is.

The processes run the command as users do, by way of a script that lets an accident happen to one of them at a step.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tpu.launch import gang
from train.checkpoint import checkpoint
from train.config import Experiment
from train.program import make_program
from train.tree import to_dict
from train.workdir import Workdir

ROOT = Path(__file__).resolve().parents[2]
STEPS = 24

CONFIG = """
from train.config import Experiment
from train.tree import from_dict


def get_config():
    return from_dict(Experiment, {})
"""

# ACCIDENT is "kind process step": it happens when that process fetches the batch of that step, once.
COMMAND = """
    import os, pathlib, runpy, signal, sys, time
    from tpu import host
    from train.data import pipeline
    from train.objectives.table import OBJECTIVES

    kind, process, step = os.environ.get("ACCIDENT", "none 0 0").split()
    here = process == os.environ.get("FOURSIGHT_PROCESS", "0")
    marker = pathlib.Path(os.environ["MARKER"])
    original, objective = pipeline.train_batches, OBJECTIVES["next_token"]

    def train_batches(corpus, data, seed, start_step, *more):
        for number, batch in enumerate(original(corpus, data, seed, start_step, *more), start_step + 1):
            if here and number == int(step) and not marker.exists():
                marker.touch()
                if kind == "hang":
                    time.sleep(1000)
                if kind == "raise":
                    raise OSError("the disk went away")
                if kind != "slow":
                    os.kill(os.getpid(), getattr(signal, kind))
            if here and kind == "slow" and number >= int(step):
                time.sleep(0.5)
            if kind in ("SIGTERM", "SIGINT") and number >= int(step):
                time.sleep(0.1)  # jax looks for signals once a second
            yield batch

    def load_other(experiment, tokenizer):
        corpus = objective.corpus(experiment, tokenizer)
        corpus.report["sources"][0]["digest"] = "another"
        return corpus

    pipeline.train_batches = train_batches
    if here and kind == "other":
        OBJECTIVES["next_token"] = objective._replace(corpus=load_other)
    host.measured_matmul_rate = lambda dtype: 0.0
    runpy.run_module("train.pretrain", run_name="__main__", alter_sys=True)
"""
SUPERVISE = (
    "import sys; from tpu.launch import gang; sys.exit(gang.run(sys.argv[3:], int(sys.argv[1]), int(sys.argv[2])))"
)


@pytest.fixture(scope="module")
def experiment(micro) -> Experiment:
    return micro(
        model={"compute_dtype": "float32", "context_parallel": "ulysses"},
        data={"batch_size": 8},
        run={"steps": STEPS, "save_every": 8, "eval_every": 12, "log_every": 4},
    )


def start(
    workdir: Path,
    experiment: Experiment,
    processes: int = 1,
    devices: int = 1,
    restarts: int = 0,
    accident: str = "none 0 0",
    **mesh: int,
) -> subprocess.Popen[str]:
    """Starts so many processes, of so many simulated devices each, on a mesh; all they say in one stream."""
    workdir.parent.mkdir(exist_ok=True)
    config = workdir.parent / "experiment.py"
    config.write_text(CONFIG.format(to_dict(experiment)))
    flags = [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
    command = [sys.executable, "-c", textwrap.dedent(COMMAND), f"--config={config}", f"--workdir={workdir}", *flags]
    if processes > 1:
        command = [sys.executable, "-c", SUPERVISE, str(processes), str(restarts), *command]
    variables = {"ACCIDENT": accident, "MARKER": str(workdir.parent / "marker"), "JAX_NUM_CPU_DEVICES": str(devices)}
    return subprocess.Popen(
        command, cwd=ROOT, env=os.environ | variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def train(workdir: Path, experiment: Experiment, status: int = 0, **how: Any) -> str:
    """Runs it to its end, which has this exit status; returns all it said."""
    process = start(workdir, experiment, **how)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == status, out
    return out


def losses(workdir: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    found = [(line["step"], line["loss"]) for line in lines if "eval" not in line]
    assert len(dict(found)) == len(found)
    return dict(found)


def held_out(workdir: Path) -> list[float]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line["eval"]["loss"] for line in lines if "eval" in line]


def steps_of(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def weights(workdir: Path, experiment: Experiment, mesh: jax.sharding.Mesh) -> list[bytes]:
    """The bits of the weights and of the optimizer's state at the end."""
    with jax.set_mesh(mesh):
        abstract = make_program(experiment, mesh).abstract_state
    step_dir = workdir / "checkpoints" / str(STEPS)
    fields = {field: getattr(abstract, field) for field in ("weights", "optimizer_state")}
    trees = [checkpoint.load_weights(step_dir, tree, field) for field, tree in fields.items()]
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(trees)]


def assert_same_curve(workdir: Path, other: Path) -> None:
    a, b = losses(workdir), losses(other)
    assert list(a) == list(b) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-5)
    np.testing.assert_allclose(held_out(workdir), held_out(other), rtol=1e-5)


@pytest.fixture(scope="module")
def alone(experiment, tmp_path_factory) -> Path:
    """The workdir of one process on one device."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    train(workdir, experiment)
    return workdir


def test_two_hosts_learn_what_one_does_though_one_of_them_is_killed(tmp_path, experiment, alone):
    """Killed in step 13: the supervisor ends the other and starts both again, from step 8."""
    workdir = tmp_path / "run"
    out = train(workdir, experiment, processes=2, restarts=1, accident="SIGKILL 1 13", fsdp=2)
    assert "gang: process 1 ended with SIGKILL; ending the others\n" in out
    assert "gang: starting again (1 of 1 times)\n" in out
    assert re.search(r"resuming from step 8 in", out)
    assert out.count("held out: ") == 3  # in step 12, which was lost, too
    assert out.count("finished after") == 1
    assert_same_curve(workdir, alone)
    assert steps_of(workdir) == steps_of(alone) == [8, 16, 24]
    assert json.loads((workdir / "experiment.json").read_text())["experiment"]["mesh"]["fsdp"] == 2


@pytest.mark.slow
def test_a_killed_host_costs_its_steps_and_no_bit(tmp_path, experiment, one_device):
    train(tmp_path / "whole" / "run", experiment, processes=2, fsdp=2)
    train(tmp_path / "killed" / "run", experiment, processes=2, restarts=1, accident="SIGKILL 1 13", fsdp=2)
    found, wanted = (tmp_path / name / "run" for name in ("killed", "whole"))
    assert weights(found, experiment, one_device) == weights(wanted, experiment, one_device)
    assert losses(found) == losses(wanted)


@pytest.mark.slow
def test_sigterm_to_one_host_saves_everywhere_and_another_mesh_goes_on(tmp_path, experiment, alone):
    workdir = tmp_path / "run"
    out = train(workdir, experiment, processes=2, accident="SIGTERM 1 3", fsdp=2)
    (last,) = re.findall(r"^SIGTERM: step (\d+) is saved in .*; the same command goes on", out, re.MULTILINE)
    assert 3 <= int(last) < STEPS
    assert steps_of(workdir)[-1] == max(losses(workdir)) == int(last)
    out = train(workdir, experiment, devices=2, tensor=2)
    assert f"resuming from step {last} in" in out
    assert "changed since this workdir was last used: mesh.fsdp: 2, 1\n" in out
    assert_same_curve(workdir, alone)


def test_a_second_gang_is_refused(tmp_path, experiment):
    workdir = Workdir(tmp_path / "run")
    out = train(workdir.path, experiment, status=2, processes=2, fsdp=2)
    workdir.close()
    told = f"error: workdir={workdir.path}: in use by process {os.getpid()} on {os.uname().nodename}; stop it"
    assert out.count(told) == 2
    assert not (workdir.path / "experiment.json").exists()


@pytest.mark.slow
def test_hosts_that_read_other_documents_are_refused(tmp_path, experiment):
    out = train(tmp_path / "run", experiment, status=2, processes=2, accident="other 1 0", fsdp=2)
    assert "error: data.sources: process 1 finds other documents there than process 0\n" in out


MESHES = [
    (4, 1, {"data": 2, "fsdp": 2}),
    (2, 2, {"data": 2, "tensor": 2}),
    (2, 1, {"tensor": 2}),  # both have all rows
    (4, 1, {"data": 2, "tensor": 2}),
    (4, 1, {"fsdp": 2, "sequence": 2}),  # two have half of each row
    (2, 2, {"stage": 2, "data": 2}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices", "mesh"), MESHES, ids=str)
def test_every_mesh_learns_what_one_device_does(tmp_path, experiment, alone, processes, devices, mesh):
    workdir = tmp_path / "run"
    train(workdir, experiment, processes=processes, devices=devices, **mesh)
    assert_same_curve(workdir, alone)


@pytest.mark.slow
def test_more_and_fewer_hosts_go_on(tmp_path, experiment, alone):
    workdir = tmp_path / "run"
    train(workdir, experiment, accident="SIGTERM 0 5")
    (tmp_path / "marker").unlink()
    train(workdir, experiment, processes=4, accident="SIGTERM 3 8", fsdp=2, data=2)
    (tmp_path / "marker").unlink()
    last = max(losses(workdir))
    assert 8 <= last < STEPS
    train(workdir, experiment, processes=2, devices=2, tensor=2, fsdp=2)
    assert_same_curve(workdir, alone)


@pytest.mark.slow
def test_ctrl_c_to_one_host_saves_everywhere(tmp_path, experiment):
    out = train(tmp_path / "run", experiment, processes=2, accident="SIGINT 0 3", data=2)
    assert re.search(r"^SIGTERM: step \d+ is saved in", out, re.MULTILINE)


@pytest.mark.slow
def test_a_straggler_is_named(tmp_path, experiment):
    out = train(tmp_path / "run", experiment, processes=2, accident="slow 1 9", data=2)
    (found,) = re.findall(r"^step (\d+): straggler: process 1 on \S+ needs 0\.5\d\d s of its own", out, re.MULTILINE)
    assert int(found) in (12, 16, 20)


def by_hand(workdir: Path, experiment: Experiment, accident: str, **mesh: int) -> list[subprocess.Popen[str]]:
    """Two processes that nobody supervises."""
    gangs = []
    variables = {"FOURSIGHT_COORDINATOR": f"127.0.0.1:{gang._free_port()}", "FOURSIGHT_PROCESSES": "2"}
    for process in range(2):
        os.environ.update(variables | {"FOURSIGHT_HOSTS": "1", "FOURSIGHT_PROCESS": str(process)})
        gangs.append(start(workdir, experiment, accident=accident, **mesh))
    for name in [*variables, "FOURSIGHT_HOSTS", "FOURSIGHT_PROCESS"]:
        del os.environ[name]
    return gangs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("accident", "cause"),
    [
        ("SIGKILL", "Connection"),  # over gloo the survivor hears of it; over an ICI it would hang
        ("raise", "OSError: the disk went away"),
        ("hang", "error: no step in 15 s (run.watchdog_seconds=15); the threads:\n"),
    ],
)
def test_an_unsupervised_gang_ends_of_itself(tmp_path, micro, accident, cause):
    run = {"steps": STEPS, "save_every": 8, "log_every": 1, "watchdog_seconds": 15}
    watched = micro(model={"compute_dtype": "float32"}, data={"batch_size": 8}, run=run)
    processes = by_hand(tmp_path / "run", watched, f"{accident} 1 10", data=2)
    marker, began = tmp_path / "marker", time.monotonic()
    while not marker.exists():
        assert time.monotonic() < began + 200
        time.sleep(0.1)
    said = "".join(process.communicate(timeout=200)[0] for process in processes)
    assert all(process.returncode for process in processes), said
    assert cause in said
    assert steps_of(tmp_path / "run") == [8]

"""Sweeps: what a space may say, which trials run and how often, pruning, and how far two Optuna samplers get.

Most trials here are those of a stand-in for `train.pretrain` that takes the same flags, writes the same metrics.jsonl
and obeys SIGTERM, without a model: its loss is a parabola in the logarithm of the learning rate, falling with the step.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpu.distributed import cluster
from tpu.errors import UserError
from train.config import Experiment, RunConfig
from train.signals import Stop
from train.sweep import report as sweep_report
from train.sweep import space as sweep_space
from train.sweep.run import Sweep, run_sweep
from train.sweep.space import Choice, Integers, Log, Uniform, parse_space, trial_name
from train.sweep.study import Study
from train.sweep.trial import Figures, Trial
from train.tree import to_dict

ROOT = Path(__file__).resolve().parents[3]

TRAINER = """
import json, math, os, pathlib, signal, sys, time
flags = dict(argument[2:].split("=", 1) for argument in sys.argv[1:])
workdir, steps, pause = pathlib.Path(flags["workdir"]), int(flags["steps"]), float(flags["pause"])
rate = float(flags.get("config.optimizer.learning_rate", 1e-3))
seed = int(flags.get("config.run.seed", 0))
metrics, stopped = workdir / "metrics.jsonl", []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
done = len(metrics.read_text().splitlines()) // 2 if metrics.exists() else 0
with (workdir.parent / "starts.txt").open("a") as starts:
    starts.write(f"{time.time()} {workdir.name} {done}\\n")
print("hello")
if seed == 13 and len((workdir.parent / "starts.txt").read_text().split(workdir.name)) <= 1 + int(flags["unlucky"]):
    print("error: an unlucky number", file=sys.stderr)
    sys.exit(1)
with metrics.open("a", buffering=1) as file:
    for step in range(done + 1, steps + 1):
        loss = (math.log10(rate) + 3) ** 2 + seed + 1 / step
        diverges = seed == 99
        time.sleep(pause)
        line = {"step": step, "loss": "nan" if diverges else loss, "skipped_in_a_row": int(diverges)}
        file.write(json.dumps(line) + "\\n")
        if diverges:
            sys.exit(1)
        file.write(json.dumps({"step": step, "eval": {"loss": loss}}) + "\\n")
        if stopped:
            break
"""


@pytest.fixture
def sweep(tmp_path):
    """A function that gives a sweep by the stand-in, of runs of 4 steps unless told otherwise."""
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)

    def made(space: str, steps: int = 4, pause: float = 0.0, unlucky: int = 0, **options) -> Sweep:
        experiment = Experiment(run=RunConfig(steps=steps, eval_every=1))
        experiment.optimizer.warmup_steps = 0
        parsed = parse_space(space)
        if options.get("method", "grid") == "grid":
            options.setdefault("points", sweep_space.grid_points(parsed))
        trainer = (sys.executable, str(script), f"--steps={steps}", f"--pause={pause}", f"--unlucky={unlucky}")
        return Sweep(tmp_path / "sweep", experiment, parsed, trainer, **options)

    return made


def run(sweep: Sweep) -> list[Trial]:
    """Runs the sweep to its end and ranks the trials."""
    with Stop() as stop:
        run_sweep(sweep, stop)
    return sweep_report.ranked(sweep.trials())


def starts(sweep: Sweep) -> list[tuple[str, int]]:
    """The name of each trial that was started, and the steps it had behind it, in order of time."""
    lines = [line.split() for line in (sweep.directory / "starts.txt").read_text().splitlines()]
    return [(name, int(done)) for _, name, done in sorted(lines)]


def states(trials: list[Trial]) -> list[str]:
    return [trial.record.state for trial in trials]


# Spaces and points

numbers = st.floats(1e-6, 1e6)
ranges = st.one_of(
    st.lists(st.one_of(st.integers(), st.text(max_size=5)), min_size=1, max_size=5, unique=True).map(
        lambda values: Choice(tuple(values))
    ),
    st.tuples(st.integers(-9, 9), st.integers(10, 99)).map(lambda bounds: Integers(*bounds)),
    st.tuples(numbers, st.floats(1.001, 100)).map(lambda pair: Log(pair[0], pair[0] * pair[1])),
    st.tuples(numbers, st.floats(0.001, 100)).map(lambda pair: Uniform(-pair[0], pair[1])),
)
spaces = st.dictionaries(
    st.sampled_from(["model.layers", "data.context", "run.seed", "loss.z_loss"]), ranges, min_size=1
)


@given(spaces)
def test_a_space_reads_as_it_is_described(space):
    assert parse_space(sweep_space.describe(space)) == space


def test_a_space_as_people_write_it():
    text = """optimizer.learning_rate = log(1e-4,1e-2); model.layers=[4,6,8]; model.activation=["re;lu", 'gelu']
    optimizer.beta2=uniform(0.9,0.99); run.seed=int(-1,9); model.pattern=[('local', 'global'), ["global"]]"""
    space = parse_space(text)
    assert space == {
        "optimizer.learning_rate": Log(1e-4, 1e-2),
        "model.layers": Choice((4, 6, 8)),
        "model.activation": Choice(("re;lu", "gelu")),
        "optimizer.beta2": Uniform(0.9, 0.99),
        "run.seed": Integers(-1, 9),
        "model.pattern": Choice((("local", "global"), ("global",))),
    }
    fields = {"optimizer.learning_rate": "log(1e-4, 1e-2)", "model.layers": [4, 6, 8]}
    assert sweep_space.space_of(fields) == {field: space[field] for field in fields}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no field"),
        ("model.layers", "not FIELD=VALUES"),
        ("model.layers=", "cannot be read"),
        ("model.layers=[]", "an empty list"),
        ("model.layers=4", "must be a list"),
        ("model.layers=(4, 6)", "must be a list"),
        ("model.layers=[4, 4]", "holds 4 twice"),
        ("model.layers=[4]; model.layers=[6]", "given twice"),
        ("model.layers=[4, exit()]", "must be a list"),
        ("model.layers=__import__('os').getcwd()", "must be a list"),
        ("model.layers=[x for x in (1, 2)]", "must be a list"),
        ("optimizer.eps=log(0, 1)", "must lie above zero"),
        ("optimizer.eps=log(1e-8)", "needs two numbers"),
        ("optimizer.eps=uniform(1, 0)", "must be below the second"),
        ("optimizer.eps=uniform(0, 1e999)", "both finite"),
        ("optimizer.eps=uniform(low=0, high=1)", "must be a list"),
        ("run.seed=int(0, 1.5)", "needs two integers"),
        ("run.seed=int(False, True)", "needs two integers"),
    ],
)
def test_a_space_that_cannot_be(text, message):
    with pytest.raises(UserError, match=message):
        parse_space(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model.layrs=[4]", "model.layrs: no such field; did you mean layers"),
        ("model=[4]", "model: name one of its fields"),
        ("model.layers.x=[4]", "model.layers has no fields"),
        ("model.layers=[4, 'six']", "model.layers='six': must be an integer"),
        ("model.layers=log(2, 8)", "must be an integer"),
        ("model.tied_head=[1]", "must be true or false"),
        ("data.sources=['python_docs']", "must be a tuple of str"),
        ("optimizer.eps=[1e999]", "must be a finite number"),
    ],
)
def test_a_space_that_does_not_fit_the_experiment(text, message):
    sweep_space.check_space(
        parse_space("model.layers=int(2, 8); optimizer.eps=[1]; data.weights=[(1.0,)]"), Experiment()
    )
    with pytest.raises(UserError, match=message):
        sweep_space.check_space(parse_space(text), Experiment())


def test_a_grid_is_every_combination_in_order():
    points = sweep_space.grid_points(parse_space("model.layers=[4, 6]; run.seed=int(0, 2)"))
    assert [tuple(point.values()) for point in points] == [(4, 0), (4, 1), (4, 2), (6, 0), (6, 1), (6, 2)]
    with pytest.raises(UserError, match="a grid needs a list"):
        sweep_space.grid_points(parse_space("model.layers=[4, 6]; optimizer.eps=log(1e-9, 1e-7)"))
    with pytest.raises(UserError, match="the grid has 1,000,002 points"):
        sweep_space.grid_points(parse_space("model.layers=[4, 6]; run.seed=int(0, 500_000)"))


@given(spaces, st.integers(0, 9), st.integers(1, 30))
def test_random_points_are_different_within_bounds_and_begin_alike(space, seed, count):
    points = sweep_space.random_points(space, seed, count)
    assert len(points) == min(count, sweep_space.size(space))
    assert sweep_space.random_points(space, seed, count // 2) == points[: count // 2]
    assert len({trial_name(point) for point in points}) == len(points)
    for point in points:
        for field, values in space.items():
            if isinstance(values, (Choice, Integers)):
                assert point[field] in values.values
            else:
                assert values.low <= point[field] <= values.high


def test_random_points_fill_their_ranges_evenly():
    space = parse_space("optimizer.learning_rate=log(1e-6, 1); optimizer.beta2=uniform(-1, 3); run.seed=int(0, 9)")
    points = sweep_space.random_points(space, 0, 2000)
    assert points != sweep_space.random_points(space, 1, 2000)
    assert sum(point["optimizer.learning_rate"] < 1e-3 for point in points) == pytest.approx(1000, abs=100)
    assert sum(point["optimizer.beta2"] < 0 for point in points) == pytest.approx(500, abs=100)
    assert all(sum(p["run.seed"] == seed for p in points) == pytest.approx(200, abs=60) for seed in range(10))


points = st.dictionaries(
    st.sampled_from(["model.layers", "optimizer.name", "data.name", "run.seed"]),
    st.one_of(st.text(max_size=300), st.integers(), st.floats(allow_nan=False), st.tuples(st.text(max_size=9))),
    min_size=1,
)


@given(st.lists(points, min_size=2, max_size=2))
def test_names_are_safe_and_one_for_each_point(pair):
    a, b = pair
    assert (trial_name(a) == trial_name(b)) == (repr(sorted(a.items())) == repr(sorted(b.items())))
    assert trial_name(dict(reversed(a.items()))) == trial_name(a)
    assert len(trial_name(a)) <= 100
    assert set(trial_name(a)) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._=,+-")


def test_names_say_the_values():
    point = {"optimizer.learning_rate": 1e-05, "model.layers": 4, "model.activation": "relu"}
    assert trial_name(point) == "activation=relu,layers=4,learning_rate=1e-05"
    assert trial_name({"optimizer.name": "lion", "name": "x"}) == "name=x,optimizer.name=lion"


# Which trials run


def test_every_trial_runs_once_and_the_best_comes_first(sweep, capsys):
    made = sweep("optimizer.learning_rate=[1e-1, 1e-4, 1e-3]; run.seed=[0, 1]", pause=0.05, workers=2)
    trials = run(made)
    assert states(trials) == ["finished"] * 6
    assert sorted(name for name, _ in starts(made)) == sorted(trial.name for trial in trials)
    assert trials[0].name == "learning_rate=0.001,seed=0"
    losses = [row["objective"] for row in sweep_report.rows(trials)]
    assert losses == pytest.approx([0.25, 1.25, 1.25, 2.25, 4.25, 5.25])
    assert all(json.loads((trial.path / "trial.json").read_text())["state"] == "finished" for trial in trials)
    capsys.readouterr()
    assert states(run(made)) == ["finished"] * 6
    assert len(starts(made)) == 6
    assert capsys.readouterr().out.count("finished, eval.loss") == 6


def test_two_run_at_a_time_and_no_more(sweep, monkeypatch):
    alive, most = set(), [0]
    start, conclude = Trial.start, Trial.conclude

    def counted_start(trial, trainer):
        start(trial, trainer)
        alive.add(trial.name)
        most[0] = max(most[0], len(alive))

    def counted_conclude(trial):
        conclude(trial)
        alive.remove(trial.name)

    monkeypatch.setattr(Trial, "start", counted_start)
    monkeypatch.setattr(Trial, "conclude", counted_conclude)
    run(sweep("run.seed=int(1, 5)", workers=2))
    assert most == [2]
    assert not alive


def test_an_invalid_combination_is_reported_and_costs_nothing(sweep, capsys):
    made = sweep("model.heads=[6, 5]; run.seed=[0, 1]")
    trials = run(made)
    assert states(trials) == ["finished", "finished", "invalid", "invalid"]
    assert {name for name, _ in starts(made)} == {trial.name for trial in trials[:2]}
    assert "heads=5,seed=0: invalid (model.heads=5: does not divide model.embed_dim=384" in capsys.readouterr().out
    sweep_report.print_table(trials, made.space, made.objective, 1)
    assert "2 invalid: model.heads=5" in capsys.readouterr().out


def test_a_trial_of_a_task_does_not_look_for_the_other_tasks(sweep, monkeypatch):
    """Each task of a SLURM step, as each pod of a job, may run a sweep of its own."""
    variables = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    for name in variables:
        monkeypatch.setenv(name, "4")
    assert cluster(os.environ) == {}  # jax would wait for the other three
    script = "import json, os, sys; print(json.dumps(dict(os.environ)))"
    made = dataclasses.replace(sweep("run.seed=[0]"), trainer=(sys.executable, "-c", script))
    (trial,) = made.trials()
    assert trial.claim()
    trial.start(made.trainer)
    trial.conclude()
    environment = json.loads((trial.path / "output.txt").read_text())
    assert set(variables) <= set(environment)
    assert cluster(environment) is None


def test_failures_are_reported_and_tried_again_as_often_as_asked(sweep, capsys):
    trials = run(sweep("run.seed=[0, 13, 99]", unlucky=3))
    assert states(trials) == ["finished", "diverged", "failed"]
    assert trials[2].record.reason == "error: an unlucky number"
    assert len(starts(sweep("run.seed=[0]"))) == 3
    made = sweep("run.seed=[0, 13, 99]", unlucky=3, retries=2)  # Two more, of which the second is still unlucky.
    assert states(run(made)) == ["finished", "diverged", "failed"]
    assert [name for name, _ in starts(made)[3:]] == ["seed=13"] * 2
    assert states(run(sweep("run.seed=[0, 13, 99]", unlucky=3, retries=3))) == ["finished", "finished", "diverged"]
    assert capsys.readouterr().out.count("trying again") == 1


def test_a_trial_without_the_objective_has_failed(sweep):
    made = sweep("run.seed=[0]", objective="eval.bits_per_byte")
    (trial,) = run(made)
    assert (trial.record.state, trial.record.reason) == ("failed", "metrics.jsonl has no eval.bits_per_byte")
    experiment = Experiment()
    experiment.data.holdout = 0.0
    assert "no held-out documents" in Trial(made.directory, experiment, {}, "eval.loss").record.reason
    assert "no average" in Trial(made.directory, Experiment(), {}, "eval.ema_loss").record.reason


def test_a_trial_that_is_killed_says_so(sweep):
    made = sweep("run.seed=[0]")
    killed = dataclasses.replace(made, trainer=(sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"))
    assert run(killed)[0].record.reason == "ended by SIGKILL"


RUN = """
import pickle, sys
from train.signals import Stop
from train.sweep.run import run_sweep
with Stop() as stop:
    run_sweep(pickle.load(open(sys.argv[1], "rb")), stop)
"""


def start(sweep: Sweep) -> subprocess.Popen:
    """`run_sweep` in a process of its own."""
    file = sweep.directory.parent / f"{time.monotonic_ns()}.pickle"
    file.write_bytes(pickle.dumps(sweep))
    return subprocess.Popen([sys.executable, "-c", RUN, str(file)], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_a_signal_stops_the_trials_and_the_next_call_goes_on(sweep):
    made = sweep("run.seed=int(0, 3)", steps=50, pause=0.1, workers=2)
    process = start(made)
    while len([file for file in made.directory.glob("*/metrics.jsonl") if len(file.read_text()) > 200]) < 2:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 0
    trials = made.trials()
    assert states(trials) == ["interrupted", "interrupted", "waiting", "waiting"]
    assert all(trial.value() for trial in trials[:2])
    done = {trial.name: trial.figures.step for trial in trials[:2]}
    assert all(2 <= steps < 50 for steps in done.values())
    quick = sweep("run.seed=int(0, 3)", steps=50)
    finished = run(quick)
    assert states(finished) == ["finished"] * 4
    assert dict(starts(quick)[2:4]) == done  # They went on from where they were.
    assert [len(trial.figures.curve) for trial in finished] == [50] * 4


@pytest.mark.parametrize("method", ["grid", "tpe"])
def test_several_sweeps_of_one_directory_share_its_trials(sweep, method):
    made = sweep("run.seed=int(1, 9)", pause=0.02, method=method, count=9)
    processes = [start(made) for _ in range(3)]
    outs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    names = [name for name, _ in starts(made)]
    assert len(names) == len(set(names))
    assert states(made.trials()) == ["finished"] * len(names)
    assert method == "tpe" or len(names) == 9
    assert sum("started" in out for out in outs) >= 2


def test_a_killed_sweep_keeps_its_trials_to_itself_while_they_live(sweep, capsys):
    made = sweep("run.seed=[0, 1]", steps=10, pause=0.2)
    process = start(made)
    while not list(made.directory.glob("*/metrics.jsonl")):
        time.sleep(0.02)
    process.kill()
    process.communicate()
    trials = run(made)
    assert "seed=0: runs elsewhere" in capsys.readouterr().out
    assert states(trials) == ["finished", "running"]
    assert states(run(made)) == ["finished", "finished"]
    assert sorted(name for name, _ in starts(made)) == ["seed=0", "seed=0", "seed=1"]
    assert starts(made)[-1] == ("seed=0", 10)  # Only to find that it had ended meanwhile.


def test_another_sweep_in_the_directory_is_refused(sweep):
    run(sweep("run.seed=[0]"))
    assert len(run(sweep("run.seed=[0, 1]"))) == 2  # A grid may grow.
    with pytest.raises(UserError, match=r"holds another sweep \(run.steps: 4, 5: there, here\); use another --workdir"):
        run(sweep("run.seed=[0]", steps=5))
    with pytest.raises(UserError, match="method: 'none', 'tpe'"):
        run(sweep("run.seed=[0]", method="tpe", count=1))


def test_figures_follow_a_file_that_grows_and_is_written_anew(tmp_path):
    file = tmp_path / "metrics.jsonl"
    figures = Figures(file, "eval.loss")
    figures.read()
    assert (figures.value, figures.step) == (None, 0)
    file.write_text('{"step": 1, "loss": 5}\n{"step": 1, "eval": {"loss": 3}}\n{"step": 2, "ev')
    figures.read()
    assert (figures.curve, figures.step) == ({1: 3.0}, 1)
    with file.open("a") as opened:
        opened.write('al": {"loss": "nan"}}\n{"cut\n')
    figures.read()
    assert figures.curve[1] == 3.0
    assert math.isnan(figures.curve[2])
    (tmp_path / "new").write_text(
        '{"step": 1, "eval": {"loss": 3}}\n{"step": 2, "loss": "nan", "skipped_in_a_row": 1.0}\n'
    )
    (tmp_path / "new").replace(file)
    figures.read()
    assert (figures.curve, figures.step, figures.skipping) == ({1: 3.0}, 2, True)


# Optuna


def best_of(study: Study, count: int) -> float:
    """The lowest value of a parabola in two fields over the points that a study asks for."""
    values = []
    while asked := study.ask(count):
        number, point = asked
        values.append(parabola(point))
        study.tell(number, "finished", values[-1])
    return min(values)


def parabola(point: dict) -> float:
    return (math.log10(point["optimizer.learning_rate"]) + 3.3) ** 2 + 10 * (point["optimizer.beta2"] - 0.95) ** 2


PLANE = parse_space("optimizer.learning_rate=log(1e-6, 1); optimizer.beta2=uniform(0, 0.999)")


def test_tpe_beats_random_search_on_a_parabola(tmp_path):
    tpe, rand = [], []
    for seed in range(3):
        (tmp_path / str(seed)).mkdir()
        tpe.append(best_of(Study(tmp_path / str(seed), PLANE, "tpe", "none", seed, 1, 1), 40))
        rand.append(min(map(parabola, sweep_space.random_points(PLANE, seed, 40))))
    assert sorted(tpe)[1] < 0.5 * sorted(rand)[1]
    assert sum(tpe) < sum(rand)


def test_an_interrupted_search_goes_on_as_it_would_have(tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = best_of(Study(tmp_path / "whole", PLANE, "tpe", "none", 0, 1, 1), 25)
    first = best_of(Study(tmp_path / "parts", PLANE, "tpe", "none", 0, 1, 1), 13)
    assert min(first, best_of(Study(tmp_path / "parts", PLANE, "tpe", "none", 0, 1, 1), 25)) == whole


def test_a_search_runs_as_many_trials_as_asked_and_can_be_given_more(sweep):
    space = (
        "optimizer.learning_rate=log(1e-5, 1e-1); model.heads=[5, 6]; model.pattern=[('global',), ('global', 'global')]"
    )
    made = sweep(space, method="tpe", count=6, workers=2)
    trials = run(made)
    assert len(trials) == 6
    assert set(states(trials)) == {"finished", "invalid"}
    more = run(sweep(space, method="tpe", count=9))
    assert len(more) == 9
    assert len(starts(made)) == states(more).count("finished")
    assert {trial.name for trial in trials} < {trial.name for trial in more}


def test_a_search_that_comes_back_to_a_point_does_not_train_it_twice(sweep):
    made = sweep("run.seed=[1, 2]", method="tpe", count=6)
    assert states(run(made)) == ["finished"] * 2
    assert len(starts(made)) == 2


def test_the_median_rule_stops_bad_trials_and_they_stay_stopped(sweep, capsys):
    quick = sweep("run.seed=[1, 2, 3, 4, 5, 1000, 1001]", steps=9, pruner="median")
    assert states(run(dataclasses.replace(quick, points=quick.points[:5]))) == ["finished"] * 5
    slow = sweep("run.seed=[1, 2, 3, 4, 5, 1000, 1001]", steps=9, pause=0.4, pruner="median", workers=2)
    trials = run(slow)
    assert states(trials) == ["finished"] * 5 + ["pruned"] * 2
    assert all(1 <= trial.figures.step < 5 for trial in trials[5:])
    assert states(run(quick)) == states(trials)
    assert len(starts(quick)) == 7
    assert "seed=1000: pruned, eval.loss" in capsys.readouterr().out


def test_hyperband_spends_less_and_keeps_the_best(sweep):
    made = sweep("run.seed=[1, 2, 3, 4, 1000, 1001, 1002, 1003]", steps=9, pause=0.1, pruner="hyperband", workers=4)
    trials = run(made)
    assert (trials[0].name, trials[0].record.state) == ("seed=1", "finished")
    assert set(states(trials)) == {"finished", "pruned"}
    assert sum(trial.figures.step for trial in trials) < 8 * 9


def test_a_pruned_sweep_that_was_killed_goes_on_under_its_numbers(sweep):
    made = sweep("run.seed=[0, 1]", steps=8, pause=0.1, pruner="median")
    process = start(made)
    while not list(made.directory.glob("*/metrics.jsonl")):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    trials = run(made)
    assert states(trials) == ["finished", "finished"]
    assert [trial.record.number for trial in trials] == [0, 1]


def test_missing_packages_are_named(sweep, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("optuna", "torch") else find(name))
    assert states(run(sweep("run.seed=[0]"))) == ["finished"]
    with pytest.raises(UserError, match=r"--method=tpe: the package optuna is not installed; pip install"):
        Study(tmp_path, PLANE, "tpe", "none", 0, 1, 1)
    with pytest.raises(UserError, match=r"--pruner=median: the package optuna is not installed; pip install"):
        Study(tmp_path, PLANE, "grid", "median", 0, 1, 1)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find(name))
    with pytest.raises(UserError, match="needs the package torch; pip install torch, or take --method=tpe"):
        Study(tmp_path, PLANE, "gp", "none", 0, 1, 1)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    trials = sweep("run.seed=[0]").trials()
    assert "matplotlib is not installed; pip install" in sweep_report.plot(trials, {}, "eval.loss", tmp_path / "a.png")


def test_the_plot_shows_every_field_and_what_was_not_finished_does_not_break_it(sweep, tmp_path):
    made = sweep("optimizer.learning_rate=[1e-2, 1e-3]; run.seed=[0, 99]; model.layers=[1]")
    trials = run(made)
    assert sweep_report.plot(trials, made.space, "eval.loss", tmp_path / "a.png") == f"plot: {tmp_path / 'a.png'}"
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "no trial has ended" in sweep_report.plot(trials[2:], made.space, "eval.loss", tmp_path / "b.png")


# The command

CONFIG = """
from train.config import Experiment
from train.tree import from_dict


def get_config():
    return from_dict(Experiment, {})
"""


def call(*arguments: str, **options) -> subprocess.CompletedProcess:
    """`python -m train.sweep`."""
    command = [sys.executable, "-m", "train.sweep", *arguments]
    return subprocess.run(command, **{"cwd": ROOT, "capture_output": True, "text": True, "timeout": 300} | options)


@pytest.fixture
def config(tmp_path, micro) -> Path:
    """A file with the micro experiment, of two steps."""
    path = tmp_path / "micro.py"
    path.write_text(CONFIG.format(to_dict(micro(run={"steps": 2}, optimizer={"warmup_steps": 1}))))
    return path


def test_real_trials_of_the_command(tmp_path, config):
    """A grid of two, of which one alone by its index, and then the whole: one more."""
    space = "--space=optimizer.learning_rate=[1e-3, 1e-30]"
    common = (f"--config={config}", f"--workdir={tmp_path / 'sweep'}", space, "--config.model.embed_dim=16")
    for flags in (("--dry_run", f"--json={tmp_path / 'sweep' / 'table.json'}"), (f"--json={tmp_path / 'no' / 'x'}",)):
        refused = call(*common, *flags)
        assert (refused.returncode, "its directory does not exist" in refused.stderr) == (2, True)
    assert not (tmp_path / "sweep").exists()
    one = call(*common, "--sweep_index=1", f"--json={tmp_path / 'sweep' / 'one.json'}")
    assert one.returncode == 0, one.stdout + one.stderr
    assert len(json.loads((tmp_path / "sweep" / "one.json").read_text())["trials"]) == 1
    assert "learning_rate=1e-30: finished, eval.loss 5." in one.stdout
    assert [p.parent.name for p in tmp_path.glob("sweep/*/trial.json")] == ["learning_rate=1e-30"]
    assert not list(tmp_path.glob("sweep/*.png"))
    done = call(*common, f"--json={tmp_path / 'report.json'}", "--workers=2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"learning_rate=1e-30: finished, eval.loss .*, skipped", done.stdout)
    assert "learning_rate=1e-30: started" not in done.stdout
    assert (tmp_path / "sweep" / "sweep.png").exists()
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["state"] for row in report["trials"]] == ["finished"] * 2
    assert sorted(row["objective"] for row in report["trials"]) == [row["objective"] for row in report["trials"]]
    for row in report["trials"]:
        trial = tmp_path / "sweep" / row["trial"]
        written = json.loads((trial / "experiment.json").read_text())["experiment"]
        assert written["optimizer"]["learning_rate"] == row["overrides"]["optimizer.learning_rate"]
        assert written["model"]["embed_dim"] == 16
        assert (trial / "checkpoints" / "2").is_dir()
    listed = call(*common, "--dry_run")
    assert listed.stdout.count("finished") == 2


def test_a_sweep_beside_get_config(tmp_path, config):
    config.write_text(
        config.read_text() + "\n\ndef sweep():\n    return {'model.layers': [1, 2], 'run.seed': 'int(0, 1)'}\n"
    )
    done = call(f"--config={config}", "--dry_run", f"--json={tmp_path / 'report.json'}")
    assert done.returncode == 0
    rows = json.loads((tmp_path / "report.json").read_text())["trials"]
    assert [tuple(row["overrides"].values()) for row in rows] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert not list(tmp_path.glob("*/trial.json"))
    both = call(f"--config={config}", "--space=model.layers=[1]", "--dry_run")
    assert (both.returncode, "give one of them" in both.stderr) == (2, True)


SPACE = "--space=model.layers=[1,2]"
RATES = "--space=optimizer.learning_rate=log(1e-4,1e-2)"
MISTAKES = [
    ((), "--space is missing, and "),
    ((SPACE,), "--workdir is missing"),
    (("--space=model.layers=[]",), "an empty list"),
    (
        ("--space=model.heads=[3,5]",),
        "no point of the space is a valid experiment; the first: model.kv_heads=2: does not",
    ),
    ((SPACE, "--config.model.layers=4"), "--config.model.layers=4: the sweep gives model.layers its values"),
    ((SPACE, "--trials=3"), "--trials=3: a grid has all its points"),
    ((SPACE, "--method=best"), "<grid|random|tpe|gp>"),
    ((RATES, "--method=grid"), "a grid needs a list"),
    ((SPACE, "--sweep_index=2"), "--sweep_index=2: there are 2 points, 0 to 1"),
    ((SPACE, "--sweep_index=1", "--workers=2"), "--workers=2: --sweep_index runs a single trial"),
    ((RATES, "--sweep_index=1", "--method=tpe"), "--sweep_index: the points of --method=tpe depend on results"),
    ((RATES, "--pruner=median"), "no evaluation before the end"),
    ((RATES, "--pruner=median", "--objective=loss"), "judges by evaluations"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_a_mistake_is_one_line(config, arguments, message):
    done = call(f"--config={config}", *arguments)
    assert message in done.stderr
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_ctrl_c_saves_real_trials_and_says_how_to_go_on(tmp_path, config):
    common = [f"--config={config}", f"--workdir={tmp_path / 'sweep'}", SPACE, "--config.run.steps=400"]
    command = [sys.executable, "-m", "train.sweep", *common]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics = tmp_path / "sweep" / "layers=1" / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size) and process.poll() is None:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    assert "SIGINT: running trials were saved; the same command goes on from there" in out
    record = json.loads((metrics.parent / "trial.json").read_text())
    assert (record["state"], record["failures"]) == ("interrupted", 0)
    assert len([p for p in (metrics.parent / "checkpoints").iterdir() if p.name.isdecimal()]) == 1
    assert not (tmp_path / "sweep" / "layers=2").exists()

"""Runs the trials of a sweep: which one next, so many at a time, pruned, tried again, stopped by a signal.

One process watches its trials; everything that must outlive it is in the directory of the sweep, so that any number
of such processes may share that, also on several hosts with one file system.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from tpu.errors import UserError
from train.config import Experiment
from train.signals import Stop
from train.sweep.space import Point, Space, describe
from train.sweep.study import Study
from train.sweep.trial import Trial, alone, read_record
from train.tree import differences, from_dict, to_dict
from train.workdir import write_json

POLL_SECONDS = 0.2


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What is swept and how. `points` are None where an Optuna sampler chooses `count` of them."""

    directory: Path
    experiment: Experiment  # not resolved; a trial overrides it
    space: Space
    trainer: tuple[str, ...]  # the command of a trial, without its overrides and --workdir
    points: list[Point] | None = None
    method: str = "grid"
    pruner: str = "none"
    objective: str = "eval.loss"
    count: int = 0
    seed: int = 0
    workers: int = 1
    retries: int = 0

    def trial(self, point: Point) -> Trial:
        """The trial of a point, as far as it is."""
        return Trial(self.directory, self.experiment, point, self.objective)

    def trials(self) -> list[Trial]:
        """The trials of all points; where a sampler chooses, those that have a record."""
        if self.points is not None:
            return [self.trial(point) for point in self.points]
        return [self.trial(read_record(file).overrides) for file in sorted(self.directory.glob("*/trial.json"))]


def run_sweep(sweep: Sweep, stop: Stop) -> None:
    """Runs every trial that is due, until there are none or a signal comes; then the running ones save and leave.

    Raises UserError where the directory cannot be used or belongs to another sweep.
    """
    study = _prepare(sweep)
    if sweep.points is None:
        waiting = _chosen(sweep, study)
    else:
        waiting = _due(sweep, sweep.trials())
    running: list[Trial] = []
    try:
        while True:
            while len(running) < sweep.workers and not stop.requested and (trial := next(waiting, None)):
                if study:
                    with alone(sweep.directory):
                        trial.record.number = study.open(trial.record.overrides, trial.record.number)
                trial.start(sweep.trainer)
                running.append(trial)
                print(f"{trial.name}: started", flush=True)
            if not running:
                return
            time.sleep(POLL_SECONDS)
            for trial in list(running):
                if stop.requested:
                    trial.stop("interrupted")
                elif sweep.pruner != "none" and study.report(trial.record.number, trial.new_values()):
                    trial.stop("pruned")
                if trial.ended():
                    running.remove(trial)
                    trial.conclude()
                    if trial.record.state == "failed" and trial.due(sweep.retries) and not stop.requested:
                        print(f"{trial.name}: {trial.outcome()}; trying again", flush=True)
                        trial.start(sweep.trainer)
                        running.append(trial)
                    else:
                        _close(trial, study)
    finally:  # An error of ours leaves no process behind.
        for trial in running:
            trial.stop("interrupted")
        for trial in running:
            trial.conclude()


def _prepare(sweep: Sweep) -> Study | None:
    """Makes the directory, or checks that it is of this sweep; opens the study where one is needed."""
    with_study = sweep.points is None or sweep.pruner != "none"
    # What a study has learnt holds for one space and one objective; the trials of a grid stand each for itself.
    settings = {"method": sweep.method, "pruner": sweep.pruner, "objective": sweep.objective, "seed": sweep.seed}
    settings = settings | {"space": describe(sweep.space)} if with_study else {}
    file = sweep.directory / "sweep.json"
    try:
        sweep.directory.mkdir(parents=True, exist_ok=True)
        with alone(sweep.directory):
            if file.exists():
                _check_same(sweep, json.loads(file.read_bytes()), settings)
            else:
                write_json(file, {"experiment": to_dict(sweep.experiment), "settings": settings})
            if not with_study:
                return None
            run = sweep.experiment.run
            return Study(
                sweep.directory, sweep.space, sweep.method, sweep.pruner, sweep.seed, run.eval_every, run.steps
            )
    except OSError as error:
        raise UserError(
            f"workdir={sweep.directory}: {error.strerror}; give --workdir a directory that can be created and written"
        ) from error


def _check_same(sweep: Sweep, there: dict, settings: dict) -> None:
    changed = differences(from_dict(Experiment, there["experiment"]), sweep.experiment)
    for name in sorted(there["settings"].keys() | settings):
        was, now = (tree.get(name, "none") for tree in (there["settings"], settings))
        if was != now:
            changed.append(f"{name}: {was!r}, {now!r}")
    if changed:
        raise UserError(
            f"workdir={sweep.directory}: holds another sweep ({'; '.join(changed)}: there, here); use another --workdir"
        )


def _due(sweep: Sweep, trials: Iterable[Trial]) -> Iterator[Trial]:
    """Those trials that are to run, claimed; a line for each of the others."""
    for trial in trials:
        if trial.due(sweep.retries):
            if not trial.claim():
                print(f"{trial.name}: runs elsewhere")
                continue
            if trial.due(sweep.retries):
                yield trial
                continue
            trial.release()  # Another process has just ended it.
        print(f"{trial.name}: {trial.outcome()}, skipped", flush=True)


def _chosen(sweep: Sweep, study: Study) -> Iterator[Trial]:
    """Trials that were interrupted, then points of the sampler until there are enough, claimed."""
    yield from _due(sweep, sweep.trials())
    while True:
        with alone(sweep.directory):
            asked = study.ask(sweep.count)
            if asked is None:
                return
            number, point = asked
            trial = sweep.trial(point)
            if not trial.claim():
                study.tell(number, "failed", None)
                continue
            if trial.due(sweep.retries):
                trial.record.number = number
                trial.save()
        if trial.record.number == number:
            yield trial
            continue
        # The sampler came back to a point, or chose one that is no experiment.
        trial.record.number = number
        if trial.record.state == "invalid":
            trial.save()
        _close(trial, study)


def _close(trial: Trial, study: Study | None) -> None:
    """Tells the study and people how a trial ended, and lets go of it. One that was interrupted stays open."""
    if study and trial.record.state != "interrupted":
        study.tell(trial.record.number, trial.record.state, trial.value())
    trial.release()
    print(f"{trial.name}: {trial.outcome()}", flush=True)

"""Trains many variants of an experiment and ranks them: a grid, a random sequence or a Bayesian search.

    python -m train.sweep --config=configs/gpt_mini.py --workdir=runs/sweep \\
        --space='optimizer.learning_rate=log(1e-4, 1e-2); model.layers=[4, 6, 8]' --method=tpe --trials=30 --workers=2

Fields take values from a list, log(LOW, HIGH), uniform(LOW, HIGH) or int(LOW, HIGH), both bounds included. In place of
--space the config file may hold a function sweep() that returns {"model.layers": [4, 6, 8], ...}, ranges as strings.
Each trial is one `train.pretrain` in a directory of its own under --workdir. The same command again skips trials that
have ended and goes on with those that were interrupted; several such commands may run side by side.
"""

from __future__ import annotations

import math
import pathlib
import runpy
import shlex
import sys

from absl import flags

from tpu.errors import UserError
from train import entry
from train.signals import Stop
from train.sweep import report as sweep_report
from train.sweep import space as sweep_space
from train.sweep import study as sweep_study
from train.sweep.run import Sweep, run_sweep
from train.sweep.trial import Trial, override_flags

METHODS = ("grid", "random", "tpe", "gp")
PRUNERS = ("none", "median", "hyperband")
OBJECTIVES = ("eval.loss", "eval.perplexity", "eval.bits_per_byte", "eval.ema_loss", "eval.ema_bits_per_byte", "loss")
DEFAULT_TRIALS = 20

if __name__ == "__main__":
    entry.define_config()
    flags.DEFINE(entry.PATH, "workdir", None, "directory of the sweep; the trials' workdirs lie in it")
    flags.DEFINE_string("space", None, "what varies: 'FIELD=VALUES; ...'; default: sweep() of the config file")
    flags.DEFINE_enum(
        "method", None, METHODS, "how points are chosen; default: grid, or random where a field has a continuous range"
    )
    flags.DEFINE_enum("pruner", "none", PRUNERS, "which trials end early, judged by their held-out losses on the way")
    flags.DEFINE_enum("objective", "eval.loss", OBJECTIVES, "the figure of metrics.jsonl to minimise: its last value")
    flags.DEFINE_integer("trials", None, f"of random, tpe and gp: how many; default: {DEFAULT_TRIALS}", lower_bound=1)
    flags.DEFINE_integer("seed", None, "of random, tpe and gp; default: 0", lower_bound=0)
    flags.DEFINE_integer("workers", 1, "trials that run at the same time, each a process of its own", lower_bound=1)
    flags.DEFINE_integer("retries", 0, "times that a failed trial is tried again", lower_bound=0)
    flags.DEFINE_integer("sweep_index", None, "run only this point, counted from 0, of a grid or random sequence", 0)
    flags.DEFINE_boolean("dry_run", False, "list the trials and how far they are, and stop")
    flags.DEFINE(entry.PATH, "json", None, "also write the table to this file")


def main() -> int:
    """Runs or lists the sweep of --config."""
    asked = entry.FLAGS
    if asked.dry_run or not _lies_in(asked.json, asked.workdir):
        entry.need_writable(json=asked.json)
    sweep = _sweep_from_flags()
    if asked.dry_run:
        trials = _list(sweep)
    else:
        entry.need(workdir=asked.workdir)
        with Stop() as stop:
            run_sweep(sweep, stop)
            trials = _conclude(sweep, stop)
    if asked.json:
        report = {"method": sweep.method, "objective": sweep.objective, "space": sweep_space.describe(sweep.space)}
        report["trials"] = sweep_report.rows(trials)
        entry.write_json(report)
    return int(not asked.dry_run and any(trial.record.state == "failed" for trial in trials))


def _lies_in(file: str | None, workdir: str | None) -> bool:
    """Whether a file is to be written into the workdir itself, which the sweep makes."""
    return bool(file and workdir) and pathlib.Path(file).absolute().parent == pathlib.Path(workdir).absolute()


def _sweep_from_flags() -> Sweep:
    """Everything that can be wrong with the flags is found here, before anything starts. Raises UserError."""
    from ml_collections import config_flags

    asked = entry.FLAGS
    entry.need(config=asked.config)
    config = config_flags.get_config_filename(asked["config"])
    overrides = config_flags.get_override_values(asked["config"])
    space = _space(asked.space, config.partition(":")[0])
    sweep_space.check_space(space, asked.config)
    for field in space:
        if field in overrides:
            raise UserError(f"--config.{field}={overrides[field]}: the sweep gives {field} its values; remove the flag")
    method = asked.method or ("random" if sweep_space.size(space) == math.inf else "grid")
    _check_flags(method)
    seed, count = asked.seed or 0, asked.trials or DEFAULT_TRIALS
    points = None
    if method == "grid":
        points = sweep_space.grid_points(space)
    elif method == "random":
        points = sweep_space.random_points(space, seed, count)
    if asked.sweep_index is not None:
        if asked.sweep_index >= len(points):
            raise UserError(
                f"--sweep_index={asked.sweep_index}: there are {len(points)} points, 0 to {len(points) - 1}"
            )
        points = [points[asked.sweep_index]]
    sweep = Sweep(
        directory=pathlib.Path(asked.workdir or "."),
        experiment=asked.config,
        space=space,
        trainer=(sys.executable, "-m", "train.pretrain", f"--config={config}", *override_flags(overrides)),
        method=method,
        points=points,
        pruner=asked.pruner,
        objective=asked.objective,
        count=count,
        seed=seed,
        workers=asked.workers,
        retries=asked.retries,
    )
    tried = [sweep.trial(p).record for p in points or sweep_space.random_points(space, seed, DEFAULT_TRIALS)]
    if asked.sweep_index is None and all(record.state == "invalid" for record in tried):
        raise UserError(f"no point of the space is a valid experiment; the first: {tried[0].reason}")
    return sweep


def _space(text: str | None, config_file: str) -> sweep_space.Space:
    """The space of --space or of `sweep()` in the config file."""
    function = runpy.run_path(config_file).get("sweep")
    if text is not None and function is not None:
        raise UserError(f"--space and sweep() of {config_file}: give one of them")
    if text is not None:
        return sweep_space.parse_space(text)
    if function is None:
        raise UserError(f"--space is missing, and {config_file} has no function sweep()")
    try:
        fields = function()
    except Exception as error:
        raise UserError(f"--config: sweep(): {type(error).__name__}: {error}") from error
    return sweep_space.space_of(fields)


def _check_flags(method: str) -> None:
    """Raises UserError for flags that do not go together, and for packages that are not there."""
    asked = entry.FLAGS
    if method == "grid":
        for name in ("trials", "seed"):
            if asked[name].present:
                raise UserError(
                    f"--{name}={asked[name].value}: a grid has all its points; or take --method=random or tpe"
                )
    if asked.sweep_index is not None:
        if method not in ("grid", "random"):
            raise UserError(f"--sweep_index: the points of --method={method} depend on results; take grid or random")
        if asked.workers > 1:
            raise UserError(f"--workers={asked.workers}: --sweep_index runs a single trial; remove one of the two")
    if asked.pruner != "none":
        run = asked.config.run
        if not asked.objective.startswith("eval."):
            raise UserError(f"--pruner={asked.pruner}: judges by evaluations; take an --objective such as eval.loss")
        if not 0 < run.eval_every < run.steps:
            raise UserError(
                f"--pruner={asked.pruner}: run.eval_every={run.eval_every}: no evaluation before the end at run.steps="
                f"{run.steps}; give a --config.run.eval_every between"
            )
    if method in ("tpe", "gp") or asked.pruner != "none":
        sweep_study.check_packages(method, asked.pruner)


def _list(sweep: Sweep) -> list[Trial]:
    """Prints what would run, counted as --sweep_index counts; returns the trials."""
    trials = sweep.trials()
    if sweep.points is None:
        print(f"{sweep.count} trials, chosen by {sweep.method} from {sweep_space.describe(sweep.space)}; so far:")
    else:
        print(f"the first of {len(trials)} trials: {shlex.join(trials[0].command(sweep.trainer))}")
    sweep_report.print_table(trials, sweep.space, sweep.objective, count_from=entry.FLAGS.sweep_index or 0)
    return trials


def _conclude(sweep: Sweep, stop: Stop) -> list[Trial]:
    """Prints how the sweep ended, what is best and how to go on; returns the trials, best first."""
    trials = sweep_report.ranked(sweep.trials())
    sweep_report.print_table(trials, sweep.space, sweep.objective, count_from=1)
    if entry.FLAGS.sweep_index is None:
        print(sweep_report.plot(trials, sweep.space, sweep.objective, sweep.directory / "sweep.png"))
        if trials and trials[0].record.state == "finished":
            print(f"best: {trials[0].path}: {shlex.join(override_flags(trials[0].record.overrides))}")
    if stop.requested:
        print(f"{stop.requested}: running trials were saved; the same command goes on from there (exit status 0)")
    return trials


if __name__ == "__main__":
    entry.run(main)

"""Optuna behind a sweep: which point to try next, and which trial to end early.

Samplers: TPE (Bergstra et al., NeurIPS 2011) and a Gaussian process. Pruners: Hyperband (arXiv:1603.06560) and the
median rule. The study lies in `journal.log` in the directory of the sweep, which any number of processes share.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from pathlib import Path
from typing import Any

from tpu.errors import UserError
from train.sweep.space import Choice, Integers, Log, Point, Space

NAME = "sweep"


class Study:
    """The trials of a sweep as Optuna sees them, each by its number. Lower is better.

    Args:
      sweep_dir: an existing directory.
      method: "tpe" or "gp" choose points; others leave that to the caller.
      pruner: "median", "hyperband" or "none".
      seed: with the number of a point, decides what is random in choosing it: an interrupted sweep goes on as it would
        have gone.
      first_step: the training step of the first report.
      last_step: the training step of the last one.
    """

    def __init__(
        self, sweep_dir: Path, space: Space, method: str, pruner: str, seed: int, first_step: int, last_step: int
    ):
        check_packages(method, pruner)
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space, self._method, self._seed = space, method, seed
        self._distributions = {field: _distribution(values) for field, values in space.items()}
        self._storage = JournalStorage(JournalFileBackend(str(sweep_dir / "journal.log")))
        pruners = {
            "none": optuna.pruners.NopPruner,
            "median": optuna.pruners.MedianPruner,
            "hyperband": lambda: optuna.pruners.HyperbandPruner(min_resource=first_step, max_resource=last_step),
        }
        self._study = optuna.create_study(
            storage=self._storage, study_name=NAME, load_if_exists=True, pruner=pruners[pruner]()
        )

    def ask(self, count: int) -> tuple[int, Point] | None:
        """The number of the next trial and its point; None where there are `count` trials already.

        Not to be called by two processes at a time (train.sweep.trial.alone).
        """
        import optuna

        number = len(self._study.get_trials(deepcopy=False))
        if number >= count:
            return None
        samplers = {"tpe": optuna.samplers.TPESampler, "gp": optuna.samplers.GPSampler}
        self._study.sampler = samplers[self._method](seed=self._seed * 1_000_003 + number)
        with warnings.catch_warnings():
            # The Gaussian process takes a trial that diverged for as bad as the worst that did not, as it should.
            warnings.filterwarnings("ignore", "Clip non-finite values")
            trial = self._study.ask(self._distributions)
        return trial.number, {field: _value(values, trial.params[field]) for field, values in self._space.items()}

    def open(self, point: Point, number: int | None) -> int:
        """The number of a trial that is about to be started: `number` if it is still open, else a new one.

        Not to be called by two processes at a time (train.sweep.trial.alone).
        """
        from optuna.trial import TrialState, create_trial

        if number is not None and not self._storage.get_trial(self._id(number)).state.is_finished():
            return number
        params = {
            field: repr(point[field]) if isinstance(values, Choice) else point[field]
            for field, values in self._space.items()
        }
        self._study.add_trial(create_trial(state=TrialState.RUNNING, params=params, distributions=self._distributions))
        return len(self._study.get_trials(deepcopy=False)) - 1

    def report(self, number: int, curve: dict[int, float]) -> bool:
        """Takes in the values of a running trial by step; returns whether to end it now."""
        trial_id = self._id(number)
        for step, value in curve.items():
            if step not in self._storage.get_trial(trial_id).intermediate_values:
                self._storage.set_trial_intermediate_value(trial_id, step, value)
                if self._study.pruner.prune(self._study, self._storage.get_trial(trial_id)):
                    return True
        return False

    def tell(self, number: int, state: str, value: float | None) -> None:
        """Closes a trial. One that diverged counts as infinitely bad; a failed or invalid one says nothing."""
        from optuna.trial import TrialState

        if state in ("finished", "diverged"):
            self._study.tell(number, value if state == "finished" else math.inf)
        elif state == "pruned":
            self._study.tell(number, state=TrialState.PRUNED)
        else:
            self._study.tell(number, state=TrialState.FAIL)

    def _id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._storage.get_study_id_from_name(NAME), number)


def check_packages(method: str, pruner: str) -> None:
    """Raises UserError where the method or the pruner needs a package that is not installed."""
    asked = f"--pruner={pruner}" if method in ("grid", "random") else f"--method={method}"
    if importlib.util.find_spec("optuna") is None:
        raise UserError(f"{asked}: the package optuna is not installed; pip install -e '.[tune]'")
    if method == "gp" and importlib.util.find_spec("torch") is None:
        raise UserError(
            "--method=gp: Optuna's Gaussian process needs the package torch; pip install torch, or take --method=tpe"
        )


def _distribution(values: Any) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(values, Choice):
        return CategoricalDistribution([repr(value) for value in values.values])  # The journal holds no tuples.
    if isinstance(values, Integers):
        return IntDistribution(values.low, values.high)
    return FloatDistribution(values.low, values.high, log=isinstance(values, Log))


def _value(values: Any, parameter: Any) -> Any:
    """The value of a field for what Optuna chose."""
    if isinstance(values, Choice):
        return next(value for value in values.values if repr(value) == parameter)
    return parameter if isinstance(values, Integers) else values.rounded(parameter)

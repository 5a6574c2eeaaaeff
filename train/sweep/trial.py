"""One trial of a sweep: its directory, who holds it, the process that trains, and how that ended.

A directory is held by a lock on `trial.lock`, which the training process inherits: as long as either that process or
the sweep that started it lives, no other sweep starts the trial. What is known of it is in `trial.json`, figures in
`metrics.jsonl`, and what the process printed in `output.txt`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tpu.distributed import PROCESSES
from tpu.errors import UserError
from train.config import Experiment
from train.resolve import resolve
from train.sweep.space import Point, overridden, trial_name
from train.workdir import write_json

# In the order of the final table.
STATES = ("finished", "pruned", "running", "interrupted", "waiting", "diverged", "failed", "invalid")


@dataclasses.dataclass
class Record:
    """What `trial.json` holds."""

    overrides: Point
    state: str = "waiting"  # one of STATES; "running" also where the sweep was killed
    failures: int = 0
    seconds: float = 0.0  # of training processes, all attempts together
    reason: str = ""  # why it failed or is invalid
    number: int | None = None  # in the Optuna study


class Figures:
    """Follows a `metrics.jsonl`: the values of one figure, the last step, whether that step's update was skipped.

    Args:
      objective: dotted path into a line, such as "eval.loss".
    """

    def __init__(self, path: Path, objective: str):
        self._path, self._keys = path, objective.split(".")
        self._restart(None)

    def _restart(self, inode: int | None) -> None:
        self._inode, self._offset = inode, 0
        self.curve: dict[int, float] = {}  # step to value
        self.step, self.skipping = 0, False

    def read(self) -> None:
        """Takes in the lines that were added; all of them where a resumed run wrote the file anew."""
        try:
            with self._path.open("rb") as file:
                stat = os.fstat(file.fileno())
                if stat.st_ino != self._inode or stat.st_size < self._offset:
                    self._restart(stat.st_ino)
                file.seek(self._offset)
                text = file.read()
        except FileNotFoundError:
            return
        whole = text[: text.rfind(b"\n") + 1]  # The last line may be half written.
        self._offset += len(whole)
        for line in whole.splitlines():
            with contextlib.suppress(ValueError):  # a line cut by a kill
                self._take(json.loads(line))

    def _take(self, line: dict[str, Any]) -> None:
        self.step = line["step"]
        if "skipped_in_a_row" in line:
            self.skipping = bool(line["skipped_in_a_row"])
        value: Any = line
        for key in self._keys:
            value = value.get(key) if isinstance(value, dict) else None
        with contextlib.suppress(TypeError, ValueError):
            self.curve[self.step] = float(value)  # metrics.jsonl writes what is not finite as "nan" and "inf"

    @property
    def value(self) -> float | None:
        """The newest value; None where there is none."""
        return next(reversed(self.curve.values()), None)


class Trial:
    """A point of the space in its directory.

    Args:
      sweep_dir: the directory of the sweep.
      base: the experiment, not resolved, that the point overrides. Where the result cannot be resolved, the state of
        the trial is "invalid" and it is never started.
      objective: see `Figures`.
    """

    def __init__(self, sweep_dir: Path, base: Experiment, point: Point, objective: str):
        self.name = trial_name(point)
        self.path = sweep_dir / self.name
        self.figures = Figures(self.path / "metrics.jsonl", objective)
        self._base, self._point, self._objective = base, point, objective
        self._lock: int | None = None
        self._stopping = ""
        self._read_record()

    def _read_record(self) -> None:
        file = self.path / "trial.json"
        self.record = read_record(file) if file.exists() else Record(self._point)
        if self.record.state == "invalid":
            self.record.state, self.record.reason = "waiting", ""
        try:
            experiment = resolve(overridden(self._base, self._point))
            if self._objective.startswith("eval.") and not experiment.data.holdout:
                raise UserError(f"data.holdout=0.0: no held-out documents, and so no {self._objective}")
            if "ema_" in self._objective and not experiment.optimizer.ema_decay:
                raise UserError(f"optimizer.ema_decay=0.0: no average of the weights, and so no {self._objective}")
        except UserError as error:
            self.record.state, self.record.reason = "invalid", str(error)
        else:
            self._steps = experiment.run.steps

    def claim(self) -> bool:
        """Takes the directory, made where it does not exist; False where another process holds it."""
        self.path.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.path / "trial.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return False
        self._lock = lock
        self._read_record()  # Another process may have ended it since.
        return True

    def release(self) -> None:
        """Lets others have the directory."""
        os.close(self._lock)
        self._lock = None

    def due(self, retries: int) -> bool:
        """Whether there is something to run: never run, interrupted, or failed no more than `retries` times."""
        if self.record.state == "failed":
            return self.record.failures <= retries
        return self.record.state in ("waiting", "running", "interrupted")

    def save(self) -> None:
        """Writes `trial.json`."""
        write_json(self.path / "trial.json", dataclasses.asdict(self.record))

    def command(self, trainer: Sequence[str]) -> list[str]:
        """The command that trains it: `trainer`, the overrides, the workdir."""
        return [*trainer, *override_flags(self._point), f"--workdir={self.path}"]

    def start(self, trainer: Sequence[str]) -> None:
        """Starts the training process, in a session of its own: a Ctrl-C at the terminal is for the sweep alone.

        It trains alone, even where the sweep is one task of several: they are trials of their own.
        """
        self.record.state, self.record.reason, self._stopping = "running", "", ""
        self.save()
        with (self.path / "output.txt").open("ab") as output:
            self._output_start, self._started = output.tell(), time.monotonic()
            self._process = subprocess.Popen(
                self.command(trainer),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(self._lock,),
                env=os.environ | {PROCESSES: "1"},
            )

    def stop(self, state: str) -> None:
        """Asks the process, once, to save and leave; "pruned" or "interrupted" is the trial's state then."""
        if not self._stopping and self._process.poll() is None:
            self._stopping = state
            self._process.send_signal(signal.SIGTERM)

    def ended(self) -> bool:
        """Whether the process has ended."""
        return self._process.poll() is not None

    def new_values(self) -> dict[int, float]:
        """The values of the objective, by step, that have come since the last call."""
        before = set(self.figures.curve)
        self.figures.read()
        return {step: value for step, value in self.figures.curve.items() if step not in before}

    def value(self) -> float | None:
        """The newest value of the objective; None where there is none."""
        self.figures.read()
        return self.figures.value

    def outcome(self) -> str:
        """The state in a few words."""
        value = self.value()
        found = f", {self._objective} {value:.5g} at step {self.figures.step}" if value is not None else ""
        reason = f" ({self.record.reason})" if self.record.reason else ""
        return f"{self.record.state}{found}{reason}"

    def conclude(self) -> None:
        """Waits for the process, decides the state that it left the trial in, and writes that down."""
        status = self._process.wait()
        self.record.seconds += time.monotonic() - self._started
        self.figures.read()
        self.record.state, self.record.reason = self._outcome(status)
        self.record.failures += self.record.state == "failed"
        self.save()

    def _outcome(self, status: int) -> tuple[str, str]:
        if status == 0 and self.figures.step >= self._steps:
            if self.figures.value is None:
                return "failed", f"metrics.jsonl has no {self._objective}"
            return ("finished", "") if math.isfinite(self.figures.value) else ("diverged", "")
        if self._stopping or status == 0:  # Status 0 before the last step: somebody else asked it to stop.
            return self._stopping or "interrupted", ""
        if self.figures.skipping:
            return "diverged", ""
        if status < 0:
            return "failed", f"ended by {signal.Signals(-status).name}"
        return "failed", self._last_words() or f"exit status {status}"

    def _last_words(self) -> str:
        """The last error of this attempt, or else its last line."""
        with (self.path / "output.txt").open("rb") as output:
            output.seek(self._output_start)
            lines = [line.strip() for line in output.read().decode(errors="replace").splitlines() if line.strip()]
        return next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "")


def read_record(file: Path) -> Record:
    """A `trial.json` as it was written. Raises UserError where it is something else."""
    try:
        record = Record(**json.loads(file.read_bytes()))
        record.overrides = {f: tuple(v) if isinstance(v, list) else v for f, v in record.overrides.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: not the record of a trial; remove its directory to run it again") from error
    return record


def override_flags(overrides: Point) -> list[str]:
    """Overrides as flags of the entry points, such as "--config.model.layers=4"."""
    return [f"--config.{field}={value}" for field, value in overrides.items()]


@contextlib.contextmanager
def alone(sweep_dir: Path) -> Iterator[None]:
    """A context in which this process alone, of all that run the sweep, decides what comes next. Made to be short."""
    with (sweep_dir / "sweep.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

"""Where a run's figures go: `metrics.jsonl`, TensorBoard event files, the console."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import pathlib
import sys
import time
from typing import Any

from tpu.errors import UserError
from train.workdir import write_whole

FLUSH_SECONDS = 30  # between looks of TensorBoard that see something new

log = logging.getLogger(__name__)


class MetricsWriter:
    """Writes one JSON object per line to `metrics.jsonl` and the same numbers to `tensorboard/`.

    Args:
      workdir: the run's directory.
      step: the step the run starts from; later lines, left by a run that was killed, are cut off.
      tensorboard: whether to write event files. Raises UserError where the package tensorboardX is missing.
    """

    def __init__(self, workdir: pathlib.Path, step: int, tensorboard: bool):
        path = workdir / "metrics.jsonl"
        kept = [line for line in _lines(path) if line["step"] <= step]
        write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a", buffering=1, encoding="utf-8")
        self._failed = False
        self._board = _Board(workdir / "tensorboard", step) if tensorboard else None

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Records the numbers of one step; a nested dictionary becomes names with a slash in TensorBoard."""
        try:
            self._file.write(json.dumps({"step": step} | _finite(values)) + "\n")
            if self._board is not None:
                self._board.write(step, values)
        except OSError as error:  # Of the disk: what it did not take is tried again with the next line.
            if not self._failed:
                log.warning("%s: cannot be written at present (%s); training goes on", self._file.name, error.strerror)
            self._failed = True

    def close(self) -> None:
        """Flushes and closes the files."""
        for file in (self._file, self._board):
            with contextlib.suppress(OSError):
                if file is not None:
                    file.close()


class _Board:
    """TensorBoard's event files, of `tensorboardX`, written here and now.

    Its SummaryWriter has a thread that ends when the disk is full, and then waits for it for ever.
    """

    def __init__(self, directory: pathlib.Path, step: int):
        try:
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import Event, SessionLog
            from tensorboardX.summary import scalar
        except ImportError as error:
            raise UserError(
                "run.tensorboard=True: the package tensorboardX is not installed; pip install tensorboardX, "
                "or --config.run.tensorboard=false"
            ) from error
        directory.mkdir(parents=True, exist_ok=True)
        self._event, self._scalar = Event, scalar
        self._file = EventsWriter(str(directory / "events"))
        self._flushed = time.monotonic()
        if step:  # TensorBoard then leaves out what a run that was killed wrote of later steps.
            self._file.write_event(Event(step=step + 1, file_version="brain.Event:2"))
            self._file.write_event(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Adds the numbers of a step; raises OSError where the disk does not take them."""
        for name, value in values.items():
            for key, number in value.items() if isinstance(value, dict) else ((None, value),):
                summary = self._scalar(f"{name}/{key}" if key else name, number)
                self._file.write_event(self._event(wall_time=time.time(), step=step, summary=summary))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self._flushed = time.monotonic()
            self._file.flush()

    def close(self) -> None:
        """Flushes and closes the file."""
        self._file.close()


def _lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl. What a crash left there that is none, cut or no text, is passed over."""
    lines = []
    for text in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, RecursionError):
            match json.loads(text):
                case {"step": int()} as line:
                    lines.append(line)
    return lines


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN or infinity: they become their names."""
    return {
        k: _finite(v) if isinstance(v, dict) else v if not isinstance(v, float) or math.isfinite(v) else str(v)
        for k, v in values.items()
    }


class ConsoleProgress:
    """The progress line: redrawn in place on a terminal, a line every `every` steps elsewhere."""

    def __init__(self, steps: int, first: int, every: int):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self._steps, self._every, self._start, self._first = steps, every, time.monotonic(), first
        self._bar = None
        if sys.stdout.isatty():
            self._bar = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=24),
                TextColumn("{task.description}"),
                TextColumn("elapsed"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=Console(),
            )
            self._task = self._bar.add_task("starting", total=steps, completed=first)
            self._bar.start()

    def update(self, step: int, values: dict[str, float]) -> None:
        """Shows the figures of a step that has ended."""
        text = f"loss {values['loss']:.4f}  lr {values['learning_rate']:.2e}  grad {values['grad_norm']:.2f}  "
        if "tokens_per_second" in values:  # Not at the first step, which compiles.
            text += f"{values['tokens_per_second']:,.0f} tokens/s"
        if "mfu" in values:
            text += f"  MFU {values['mfu']:.0%}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        elif step % self._every == 0 or step == self._steps:
            left = (time.monotonic() - self._start) / max(1, step - self._first) * (self._steps - step)
            print(f"step {step}/{self._steps}  {text}  ETA {int(left) // 60}:{int(left) % 60:02d}", flush=True)

    def say(self, line: str) -> None:
        """Prints a line of its own, above the bar where there is one."""
        if self._bar is not None:
            self._bar.console.print(line, highlight=False, markup=False)
        else:
            print(line, flush=True)

    def close(self) -> None:
        """Leaves the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()

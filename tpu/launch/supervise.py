"""A slice of Cloud TPU and the job on it, seen through to the end: pre-empted spot slices are made anew.

Training saves as it goes and the same command goes on from what was saved, so a new slice needs nothing but the same
command; the workdir must outlive the slice. What there is decides what is done next: a launcher that died, or was left
with Ctrl-C, is started again with the same arguments and follows the job that still runs.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Sequence

from tpu.errors import UserError
from tpu.launch.cloud_tpu import Job, Request, refusal

READY = ("READY", "ACTIVE")
ENDED = ("FAILED", "SUSPENDED", "PREEMPTED", "TERMINATED", "STOPPED", "deleted")  # it will not come back by itself
PATIENCE = 5  # failures in a row of one gcloud command that worked before
NOTICE = 60  # seconds within which a slice whose processes were told to end has left the state READY


class _Lost(Exception):
    """The slice is gone, or as good as gone; the message says how that was seen."""


def supervise(request: Request, job: Job, restarts: int, poll_seconds: float, delete: bool) -> int:
    """Creates what is requested, runs the job on it, and returns the exit status of the job on worker 0.

    Args:
      restarts: how often a spot slice is made anew.
      poll_seconds: between two looks at the state.
      delete: give the slice back however this ends; otherwise say how to.
    Raises UserError where Cloud TPU refuses, where the installation fails, and where a slice is lost for good.
    """
    supervisor = _Supervisor(request, job, restarts, poll_seconds)
    try:
        return supervisor.run()
    finally:
        if supervisor.exists and delete:
            _show(request.delete())
            subprocess.run(request.delete())
        elif supervisor.exists:
            print(
                f"{request.name} is still there and paid for. The same command follows what runs on it; to delete it:\n"
                f"  {shlex.join(request.delete())}",
                flush=True,
            )


class _Supervisor:
    def __init__(self, request: Request, job: Job, restarts: int, poll_seconds: float) -> None:
        self.request, self.job, self.restarts, self.poll_seconds = request, job, restarts, poll_seconds
        self.exists = False
        self._seen_ready = False  # by this process; before that a refusal or a failure is the request's own fault

    def run(self) -> int:
        """Creates, works, and begins again after a loss, until the job has ended."""
        if found := self._found():
            self._say(f"exists already ({found}) and is used as it is")
        for attempt in range(self.restarts + 1):
            created = not self.exists
            try:
                if created:
                    self._create()
                return self._work()
            except _Lost as lost:
                if not self.request.spot or (created and not self._seen_ready):
                    raise UserError(f"{self.request.name}: {lost}") from None
                if attempt == self.restarts:
                    raise UserError(f"{self.request.name}: {lost}; --restarts={self.restarts} are used up") from None
                self._say(f"{lost}; making it anew ({attempt + 1} of {self.restarts} times)")
                self._delete()
        raise AssertionError("a loss beyond the last restart raises above")

    def _work(self) -> int:
        """Waits for the slice, starts the job where it does not run yet, and follows it to its end."""
        self._wait_until_ready()
        if self._status() == "running":
            self._say("a job runs already: following it, starting none")
        else:
            if pack := self.job.pack():
                self._step(pack)
                self._step(self.request.copy())
            self._step(self.request.ssh(self.job.install()))
            self._step(self.request.ssh(self.job.start()))
        while (status := self._follow()) == "running":
            self._say("the connection broke; following again")
        if not status:
            raise _Lost("the job is gone without an exit status; the machine may have been started anew")
        # A VM about to be taken ends its processes first, and training that saves when told to ends with status 0.
        end = time.monotonic() + min(NOTICE, 2 * self.poll_seconds)
        while self.request.spot and time.monotonic() < end:
            time.sleep(min(self.poll_seconds, 5))
            self._check_ready()
        return int(status)

    def _follow(self) -> str:
        """Prints worker 0's output until the job or the connection ends; returns the job's status."""
        command = self.request.ssh(self.job.follow(), worker="0")
        _show(command)
        subprocess.run(command)
        return self._status()

    def _status(self) -> str:
        """The job on worker 0: "running", an exit status, or "" where none was started."""
        for _ in range(PATIENCE):
            done = _captured(self.request.ssh(self.job.status(), worker="0"))
            if done.returncode == 0:
                return done.stdout.strip()
            self._check_ready()
            time.sleep(self.poll_seconds)
        raise _Lost(f"worker 0 does not answer: {refusal(done.stderr)}")

    def _step(self, command: Sequence[str]) -> None:
        """One command that must succeed. Raises UserError, or _Lost where the slice has gone meanwhile."""
        _show(command)
        if status := subprocess.run(command).returncode:
            self._check_ready()
            raise UserError(f"{self.request.name}: status {status} from: {shlex.join(command)}")

    def _create(self) -> None:
        command = self.request.create()
        _show(command)
        done = _captured(command)
        self.exists = done.returncode == 0
        if self.exists:
            return
        self._found()  # What failed half way may have left something that is paid for.
        if self._seen_ready:
            time.sleep(10 * self.poll_seconds)  # Where a slice was just taken away there seldom is another at once.
            raise _Lost(f"refused: {refusal(done.stderr)}")
        raise UserError(f"{self.request.name}: Cloud TPU refused: {refusal(done.stderr)}")

    def _delete(self) -> None:
        if self._found():
            _show(self.request.delete())
            _captured(self.request.delete())
            self._found()

    def _wait_until_ready(self) -> None:
        shown = ""
        while (state := self._found() or "deleted") not in READY:
            if state in ENDED:
                raise _Lost(self._how_it_ended(state))
            if state != shown:
                self._say(shown := state)
            time.sleep(self.poll_seconds)
        self._seen_ready = True
        self._say(state)

    def _check_ready(self) -> None:
        """Raises _Lost for a slice on its way out."""
        if (state := self._found() or "deleted") not in READY:
            raise _Lost(self._how_it_ended(state))

    def _how_it_ended(self, state: str) -> str:
        reason = _captured(self.request.failure()).stdout.strip() if self.request.queued and state == "FAILED" else ""
        return f"{state}: {reason}" if reason else state

    def _found(self) -> str:
        """Its state in Google's words, "" where there is none of that name; keeps `exists`. Raises UserError."""
        for _ in range(PATIENCE if self.exists else 1):
            done = _captured(self.request.describe())
            self.exists = done.returncode == 0 or (self.exists and "NOT_FOUND" not in done.stderr)
            if done.returncode == 0:
                return done.stdout.strip()
            if "NOT_FOUND" in done.stderr:
                return ""
            time.sleep(self.poll_seconds if self.exists else 0)
        raise UserError(f"{self.request.name}: its state is not to be had: {refusal(done.stderr)}")

    def _say(self, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {self.request.name}: {text}", flush=True)


def _show(command: Sequence[str]) -> None:
    print(f"$ {shlex.join(command)}", file=sys.stderr, flush=True)


def _captured(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)

"""Ends a process in which nothing goes on, and shows where it hangs.

Heartbeats between processes go on while a collective hangs, so only the lack of steps tells of it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import threading
import time
from collections.abc import Iterator

GRACE = 4  # times its patience that a compilation, a batch of an evaluation or a save may take


class Watchdog:
    """Ends this process with status 1, after the stacks of all its threads on stderr, where `beat` does not come.

    The first beat may take GRACE times as long, for the first step compiles. Use it as a context; 0 seconds never end
    anything.
    """

    def __init__(self, seconds: int) -> None:
        self._seconds, self._factor = seconds, 1
        self._beaten, self._limit = time.monotonic(), seconds * GRACE
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._beaten = time.monotonic()
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed.set()
        if self._seconds:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def beat(self) -> None:
        """Says that a step, or a batch of an evaluation, has come to its end."""
        self._beaten, self._limit = time.monotonic(), self._seconds * self._factor

    @contextlib.contextmanager
    def grace(self) -> Iterator[None]:
        """A context in which every beat may take GRACE times as long."""
        self._factor = GRACE
        self.beat()
        yield
        self._factor = 1
        self.beat()

    def _watch(self) -> None:
        while not self._closed.wait(self._seconds / 20):
            # This one needs no interpreter: it fires where something hangs that holds the interpreter's lock.
            faulthandler.dump_traceback_later(self._limit + self._seconds, exit=True, file=2)
            if time.monotonic() - self._beaten > self._limit:
                line = f"error: no step in {self._limit} s (run.watchdog_seconds={self._seconds}); the threads:\n"
                os.write(2, line.encode())
                faulthandler.dump_traceback(file=2, all_threads=True)
                os._exit(1)

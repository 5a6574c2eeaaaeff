"""Names the host that the others wait for.

All hosts of a gang take a step in the same time, that of the slowest. What tells them apart is the time that a host
needs for itself: waiting for data, and whatever else its processor does between two steps. Every process tells its own
through the coordinator, without waiting for anybody, and process 0 compares what has been told.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator

from tpu import distributed

FACTOR = 2.0  # times the median of the others that makes a straggler
SHARE = 0.5  # of a step that it must fill: less hides behind the devices' work


class HostTime:
    """Measures this host's own seconds per step, and finds the host that needs the most."""

    def __init__(self) -> None:
        self._began, self._elsewhere, self._steps = time.perf_counter(), 0.0, 0
        self._named: int | None = None

    @contextlib.contextmanager
    def elsewhere(self) -> Iterator[None]:
        """A context whose time is not this host's own: the devices' time, or that of an evaluation or a save."""
        start = time.perf_counter()
        yield
        self._elsewhere += time.perf_counter() - start

    def step(self) -> None:
        """Counts a step."""
        self._steps += 1

    def straggler(self) -> str | None:
        """Tells the other processes this one's seconds since the last call; the sentence to log where one is slow.

        Only process 0 names one, and each once, until another is the slowest or none is. The others' seconds are the
        last that they have told, which may be those of the call before.
        """
        whole = (time.perf_counter() - self._began) / max(1, self._steps)
        own = whole - self._elsewhere / max(1, self._steps)
        self._began, self._elsewhere, self._steps = time.perf_counter(), 0.0, 0
        distributed.tell("host_seconds", {"host": distributed.host_name(), "seconds": own})
        if not distributed.leads():
            return None
        told = distributed.told("host_seconds")
        slowest = find({process: found["seconds"] for process, found in told.items()}, whole)
        if slowest == self._named or slowest is None:
            self._named = slowest
            return None
        self._named = slowest
        others = statistics.median(found["seconds"] for process, found in told.items() if process != slowest)
        return (
            f"straggler: process {slowest} on {told[slowest]['host']} needs {told[slowest]['seconds']:.3f} s of its "
            f"own per step (data and Python), the others {others:.3f} s"
        )


def find(seconds: dict[int, float], step_seconds: float) -> int | None:
    """The process with the most own seconds per step, where they are FACTOR times the others' median and matter."""
    if len(seconds) < 2:
        return None
    slowest = max(seconds, key=seconds.__getitem__)
    others = statistics.median(value for process, value in seconds.items() if process != slowest)
    slow = seconds[slowest] > FACTOR * others and seconds[slowest] > SHARE * step_seconds
    return slowest if slow else None

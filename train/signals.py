"""SIGTERM and SIGINT turned into a flag that the training loop looks at between steps."""

from __future__ import annotations

import contextlib
import os
import signal
from types import FrameType


class Stop:
    """Context in which the first SIGTERM or SIGINT asks for a stop and the second one, of either kind, exits at once.

    `requested` is None, or the name of the signal that came ("SIGTERM", "SIGINT"). Python runs handlers between
    bytecodes of the main thread: a signal that comes during a compilation is noted as soon as that returns. Enter it
    before heavy imports, and on the main thread; the handlers found there are put back on leaving. The second signal
    exits with 128 + its number, the shell's convention, without running any clean-up.
    """

    def __init__(self) -> None:
        self.requested: str | None = None

    def __enter__(self) -> Stop:
        self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            os._exit(128 + number)
        self.requested = signal.Signals(number).name
        line = f"{self.requested}: finishing the step in hand, saving, then leaving; once more stops at once\n"
        # Not print(): it is not re-entrant. A reader that left with the same Ctrl-C must not cost us the save.
        with contextlib.suppress(OSError):
            os.write(2, line.encode())

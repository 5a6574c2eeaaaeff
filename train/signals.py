"""SIGTERM and SIGINT turned into a question that the training loop asks between steps."""

from __future__ import annotations

import contextlib
import os
import signal
from types import FrameType

from tpu import distributed


class Stop:
    """Context in which the first SIGTERM or SIGINT asks for a stop and the second one, of either kind, exits at once.

    `requested` is None, or the name of the signal that came ("SIGTERM", "SIGINT"). Python runs handlers between
    bytecodes of the main thread: a signal that comes during a compilation is noted as soon as that returns. Enter it
    before heavy imports, and on the main thread; the handlers found there are put back on leaving. The second signal
    exits with 128 + its number, the shell's convention, without running any clean-up.

    Of several processes (see `tpu.distributed`) all stop where one is signalled. SIGTERM is then caught by jax, whose
    synchronisation of pre-emptions tells the others in the background and fixes the question at which all learn of it,
    one that none has asked yet; to ask costs a microsecond and waits for nobody. SIGINT is turned into SIGTERM.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._asked = 0

    def __enter__(self) -> Stop:
        numbers = (signal.SIGINT,) if distributed.several() else (signal.SIGTERM, signal.SIGINT)
        handler = self._pass_on if distributed.several() else self._handle
        self._previous = {number: signal.signal(number, handler) for number in numbers}
        return self

    def asked(self) -> str | None:
        """The signal that asks for a stop, if one does. Several processes must ask equally often."""
        if distributed.several() and not self.requested:
            from jax.experimental import multihost_utils

            self._asked += 1
            if multihost_utils.reached_preemption_sync_point(self._asked):
                self.requested = "SIGTERM"
        return self.requested

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            os._exit(128 + number)
        self.requested = signal.Signals(number).name
        line = f"{self.requested}: finishing the step in hand, saving, then leaving; once more stops at once\n"
        # Not print(): it is not re-entrant. A reader that left with the same Ctrl-C must not cost us the save.
        with contextlib.suppress(OSError):
            os.write(2, line.encode())

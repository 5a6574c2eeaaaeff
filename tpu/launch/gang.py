"""A gang of processes on this host, watched: when one dies the others are ended and the gang is started again.

It rehearses several hosts on one machine, and drives machines whose devices want several processes. The command finds
its place in the gang through the environment (`tpu.distributed`) and goes on from its own last checkpoint.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO

from tpu.distributed import COORDINATOR, HOSTS, PROCESS, PROCESSES

USER_ERROR = 2  # the exit status of a command that was given bad input: it would fail again
_PATIENCE = 5.0  # seconds that the others have to end, and to say why, after one has failed


def run(command: Sequence[str], processes: int, restarts: int = 0, environment: Mapping[str, str] | None = None) -> int:
    """Runs `command` in `processes` processes until all have ended well; returns the exit status.

    Process 0 has this process's output streams; each line of the others appears on stderr with their number. Where one
    fails, the others are killed, and the gang is started again up to `restarts` times, but not after exit status 2.
    SIGTERM and SIGINT are passed on as SIGTERM, after which nothing is started again; a second one kills.

    Args:
      environment: variables beside those of this process.

    Returns: 0, or the status of the process that failed first; 128 + the signal's number where one ended it.
    """
    watch = _Watch()
    previous = {number: signal.signal(number, watch.stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for attempt in range(restarts + 1):
            gang, readers = _start(command, processes, os.environ | (environment or {}))
            status = watch.see_through(gang)
            for reader in readers:
                reader.join(timeout=1)
            if status in (0, USER_ERROR) or watch.stopping:
                break
            if attempt < restarts:
                print(f"gang: starting again ({attempt + 1} of {restarts} times)", file=sys.stderr, flush=True)
        return status
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Watch:
    """Sees a gang to its end, and hands on the signals that come meanwhile."""

    def __init__(self) -> None:
        self.stopping = False
        self._gang: list[subprocess.Popen] = []

    def stop(self, number: int, frame: object) -> None:
        """The handler of SIGTERM and SIGINT."""
        for process in self._gang:
            process.send_signal(signal.SIGKILL if self.stopping else signal.SIGTERM)
        self.stopping = True

    def see_through(self, gang: list[subprocess.Popen]) -> int:
        """Waits for the end of all; returns 0, or the status of the first that failed, after ending the others."""
        self._gang = gang
        if self.stopping:  # The signal came between two gangs.
            for process in gang:
                process.terminate()
        while True:
            statuses = [process.poll() for process in gang]
            failed = [index for index, status in enumerate(statuses) if status]
            if failed:
                break
            if None not in statuses:
                return 0
            time.sleep(0.05)
        # Of several at once, one ended by a signal: its end is what made the others fail.
        first = min(failed, key=statuses.__getitem__)
        status = statuses[first]
        how = f"status {status}" if status > 0 else signal.Signals(-status).name
        print(f"gang: process {first} ended with {how}; ending the others", file=sys.stderr, flush=True)
        end = time.monotonic() + _PATIENCE
        while time.monotonic() < end and any(process.poll() is None for process in gang):
            time.sleep(0.05)
        for process in gang:
            process.kill()
            process.wait()
        return status if status > 0 else 128 - status


def _start(
    command: Sequence[str], processes: int, environment: Mapping[str, str]
) -> tuple[list[subprocess.Popen], list[threading.Thread]]:
    """Starts a gang with a coordinator of its own, and the threads that show what all but process 0 print."""
    gang, readers = [], []
    described = {COORDINATOR: f"127.0.0.1:{_free_port()}", PROCESSES: str(processes), HOSTS: "1"}
    for index in range(processes):
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if index else {}
        process = subprocess.Popen(
            command,
            env=dict(environment) | described | {PROCESS: str(index)},
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # A terminal's Ctrl-C reaches this process, which hands it on once.
            **output,
        )
        gang.append(process)
        if index:
            readers.append(threading.Thread(target=_show, args=(process.stdout, index), daemon=True))
            readers[-1].start()
    return gang, readers


def _show(stream: IO[bytes], index: int) -> None:
    with stream:
        for line in stream:
            sys.stderr.write(f"[process {index}] {line.decode(errors='replace')}")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]

"""What hangs is ended and shown, what goes on is left alone."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


WATCHED = """
    import ctypes, sys, threading, time
    from tpu.watchdog import Watchdog
    def the_place_that_hangs():
        time.sleep(60)
    with Watchdog(1) as watchdog:
        {}
    print("ended well")
"""


@pytest.mark.parametrize(
    ("body", "seconds"),
    [
        ("watchdog.beat(); the_place_that_hangs()", 1),
        ("the_place_that_hangs()", 4),  # the first step has more time
        ("watchdog.beat(); watchdog.grace().__enter__(); watchdog.beat(); the_place_that_hangs()", 4),
        ("watchdog.beat(); threading.Thread(target=the_place_that_hangs).start(); time.sleep(60)", 1),
    ],
)
def test_what_hangs_is_ended_and_shown(body, seconds):
    start = time.monotonic()
    done = python(WATCHED.format(body))
    assert done.returncode == 1
    assert time.monotonic() - start >= seconds
    assert f"error: no step in {seconds} s (run.watchdog_seconds=1); the threads:\n" in done.stderr
    assert "in the_place_that_hangs\n" in done.stderr
    assert "ended well" not in done.stdout


def test_what_hangs_and_holds_the_interpreter_is_ended_too():
    """PyDLL calls without letting go of the interpreter's lock; the short sleep lets the watchdog look once."""
    done = python(WATCHED.format("watchdog.beat(); time.sleep(0.5); ctypes.PyDLL(None).sleep(60)"))
    assert done.returncode == 1
    assert "Timeout (0:00:02)!" in done.stderr


@pytest.mark.parametrize(
    "body",
    [
        "for _ in range(8): time.sleep(0.4); watchdog.beat()",
        "watchdog.beat()\n        with watchdog.grace(): time.sleep(1.5)",
    ],
)
def test_what_goes_on_is_left_alone(body):
    done = python(WATCHED.format(body))
    assert (done.returncode, done.stdout, done.stderr) == (0, "ended well\n", "")


def test_no_seconds_no_watchdog():
    done = python(
        "import threading; from tpu.watchdog import Watchdog\nwith Watchdog(0): print(threading.active_count())"
    )
    assert done.stdout == "1\n"

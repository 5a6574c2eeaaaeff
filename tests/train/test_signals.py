"""Signals, in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from train.signals import Stop

ROOT = Path(__file__).resolve().parents[2]
LINE = "{}: finishing the step in hand, saving, then leaving; once more stops at once\n"

# Steps until it is told to stop, then "saves" until it is told to go on.
LOOP = """
    import sys, time
    from train.signals import Stop
    with Stop() as stop:
        print("ready", flush=True)
        while not stop.requested:
            time.sleep(0.01)
        print(stop.requested, flush=True)
        sys.stdin.readline()
        print("saved", flush=True)
    assert "jax" not in sys.modules
"""


def start(code: str, **options) -> subprocess.Popen:
    command = [sys.executable, "-c", textwrap.dedent(code)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE) | options
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True, **pipes)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_first_signal_lets_the_work_in_hand_end(name):
    process = start(LOOP)
    process.send_signal(getattr(signal, name))
    assert process.stdout.readline() == name + "\n"
    out, err = process.communicate("\n", timeout=120)
    assert (process.returncode, out, err) == (0, "saved\n", LINE.format(name))


@pytest.mark.parametrize("second", ["SIGTERM", "SIGINT"])
def test_second_signal_exits_at_once(second):
    process = start(LOOP)
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "SIGTERM\n"
    process.send_signal(getattr(signal, second))
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err) == (128 + getattr(signal, second), "", LINE.format("SIGTERM"))


def test_a_closed_terminal_does_not_cost_the_save():
    read, write = os.pipe()
    process = start(LOOP, stderr=write)
    os.close(read)
    os.close(write)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "SIGINT\n"
    out, _ = process.communicate("\n", timeout=120)
    assert (process.returncode, out) == (0, "saved\n")


def test_a_signal_during_native_code_is_noted_after_it():
    """As during a compilation, which does not return to the interpreter until it is done."""
    process = start(
        """
        import hashlib
        from train.signals import Stop
        with Stop() as stop:
            print("ready", flush=True)
            hashlib.pbkdf2_hmac("sha512", b"", b"", 2_000_000)
            print(stop.requested, flush=True)
        """
    )
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err) == (0, "SIGTERM\n", LINE.format("SIGTERM"))


def test_handlers_are_put_back():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with Stop() as stop:
        assert all(signal.getsignal(number) not in (before[number], None) for number in before)
    assert {number: signal.getsignal(number) for number in before} == before
    assert stop.requested is None

"""Gangs of little processes: all end well, one dies, signals come."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tpu.launch import gang

ROOT = Path(__file__).resolve().parents[3]


def command(body: str) -> list[str]:
    """A process that knows its number as `me` and appends a line to the file `log` for what happens to it."""
    head = """
        import os, pathlib, signal, sys, time
        me = int(os.environ["FOURSIGHT_PROCESS"])
        def say(word):
            with open(os.environ["LOG"], "a") as file: file.write(f"{me} {word}\\n")
    """
    return [sys.executable, "-c", textwrap.dedent(head) + body]


@pytest.fixture
def log(tmp_path) -> Path:
    path = tmp_path / "log"
    path.touch()
    return path


def run(body: str, log: Path, processes: int = 3, restarts: int = 0) -> int:
    return gang.run(command(body), processes, restarts, {"LOG": str(log)})


def said(log: Path) -> list[str]:
    return sorted(log.read_text().split("\n")[:-1])


def test_all_know_their_place(log):
    names = ("COORDINATOR", "PROCESSES", "HOSTS")
    assert run(f"say(' '.join(os.environ['FOURSIGHT_' + n] for n in {names}))", log) == 0
    places = [line.split() for line in said(log)]
    assert [place[0] for place in places] == ["0", "1", "2"]
    assert len({place[1] for place in places}) == 1
    assert all(place[1].startswith("127.0.0.1:") and place[2:] == ["3", "1"] for place in places)


def test_output_of_the_first_is_ours_and_of_the_others_marked(log, capfd):
    assert run("print('out', me); print('error', me, file=sys.stderr)", log, 2) == 0
    captured = capfd.readouterr()
    assert captured.out == "out 0\n"
    assert sorted(captured.err.splitlines()) == ["[process 1] error 1", "[process 1] out 1", "error 0"]


@pytest.mark.parametrize(
    ("end", "status", "how"),
    [("os.kill(os.getpid(), 9)", 137, "SIGKILL"), ("sys.exit(5)", 5, "status 5"), ("1 / 0", 1, "status 1")],
)
def test_one_that_dies_takes_the_others_along(log, capfd, monkeypatch, end, status, how):
    monkeypatch.setattr(gang, "_PATIENCE", 0.5)
    body = f"if me == 1: time.sleep(0.5); {end}\nsay('lives'); time.sleep(60); say('was left alone')"
    assert run(body, log) == status
    assert said(log) == ["0 lives", "2 lives"]
    assert f"gang: process 1 ended with {how}; ending the others\n" in capfd.readouterr().err


def test_the_gang_is_started_again(log, monkeypatch, capfd):
    monkeypatch.setattr(gang, "_PATIENCE", 0.5)
    body = "say(f'at {os.environ[\"FOURSIGHT_COORDINATOR\"]}')\n"
    body += "runs = pathlib.Path(os.environ['LOG']).read_text().count(f'{me} at')\n"
    body += "if me == 1 and runs < 3: sys.exit(9)\nif me != 1 and runs < 3: time.sleep(60)"
    assert run(body, log, 2, restarts=5) == 0
    coordinators = [line.split()[-1] for line in said(log)]
    assert [coordinators.count(one) for one in sorted(set(coordinators))] == [2, 2, 2]
    assert "gang: starting again (2 of 5 times)\n" in capfd.readouterr().err


@pytest.mark.parametrize(("status", "starts"), [(9, 3), (2, 1), (0, 1)])
def test_starts_end_with_the_restarts_and_with_what_would_fail_again(log, status, starts):
    assert run(f"say('starts'); sys.exit({status})", log, 2, restarts=2) == status
    assert said(log).count("0 starts") == starts


SUPERVISE = "import sys; from tpu.launch import gang; sys.exit(gang.run(sys.argv[1:], 2, 3))"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("obeys", "status"), [(True, 0), (False, 137)])
def test_signals_are_handed_on_and_nothing_starts_again(log, number, obeys, status):
    """To processes that save and leave, and to such as only a second signal ends."""
    body = "signal.signal(signal.SIGTERM, lambda *_: (say('saves'), sys.exit(0)) if {} else say('ignores'))\n"
    body += "say('lives')\nwhile True: time.sleep(0.05)"
    supervisor = subprocess.Popen(
        [sys.executable, "-c", SUPERVISE, *command(body.format(obeys))],
        cwd=ROOT,
        env=os.environ | {"LOG": str(log)},
        stderr=subprocess.DEVNULL,
    )
    wait_for(log, "lives", 2)
    supervisor.send_signal(number)
    wait_for(log, "saves" if obeys else "ignores", 2)
    if not obeys:
        supervisor.send_signal(number)
    assert supervisor.wait(timeout=30) == status
    assert said(log).count("0 lives") == 1


def wait_for(log: Path, word: str, count: int) -> None:
    end = time.monotonic() + 30
    while log.read_text().count(word) < count:
        assert time.monotonic() < end
        time.sleep(0.02)

"""Which host is named, and what a host counts as its own time."""

from __future__ import annotations

import time

import pytest

from tpu import distributed
from train.stragglers import HostTime, find


@pytest.mark.parametrize(
    ("seconds", "step_seconds", "found"),
    [
        ({}, 1.0, None),
        ({0: 9.0}, 9.0, None),
        ({0: 0.1, 1: 0.9}, 1.0, 1),
        ({0: 0.9, 1: 0.1}, 1.0, 0),
        ({0: 0.1, 1: 0.12, 2: 0.9, 3: 0.1}, 1.0, 2),
        ({0: 0.8, 1: 0.9, 2: 0.8}, 1.0, None),  # all read slowly
        ({0: 0.01, 1: 0.1, 2: 0.01}, 1.0, None),  # it hides behind the devices' work
    ],
)
def test_who_is_a_straggler(seconds, step_seconds, found):
    assert find(seconds, step_seconds) == found


def test_it_is_named_once_until_something_changes(monkeypatch):
    others = {}
    monkeypatch.setattr(distributed, "tell", lambda name, value: others.update({0: value}))
    monkeypatch.setattr(distributed, "told", lambda name: others)
    host_time, sentences = HostTime(), []
    for slow in (None, 1, 1, None, 1, 2):
        others.update({process: {"host": f"host{process}", "seconds": 0.2 * (process == slow)} for process in (1, 2)})
        for _ in range(2):
            with host_time.elsewhere():
                time.sleep(0.02)
            host_time.step()
        sentences.append(host_time.straggler())
        assert 0 <= others[0]["seconds"] < 0.01
    assert [sentence is not None for sentence in sentences] == [False, True, False, False, True, True]
    assert sentences[1].startswith("straggler: process 1 on host1 needs 0.200 s of its own per step (data and Python)")
    assert "process 2 on host2" in sentences[5]


def test_its_own_time_is_what_is_not_elsewhere(monkeypatch):
    told = []
    monkeypatch.setattr(distributed, "tell", lambda name, value: told.append(value["seconds"]))
    host_time = HostTime()
    for _ in range(3):
        time.sleep(0.05)
        with host_time.elsewhere():
            time.sleep(0.1)
        host_time.step()
    host_time.straggler()
    assert 0.05 <= told[0] < 0.09

"""What a process keeps of the memory that it freed."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from tpu.host import FreedMemory

SCRIPT = """
import numpy as np
from tpu import host
assert host.keep_freed_memory()
before = host.resident_bytes()
held = np.ones(2**28, np.uint8)
del held
kept = host.resident_bytes() - before
host.give_back_freed_memory()
print(kept, host.resident_bytes() - before)
held = np.ones(2**28, np.uint8)
del held
print(host.resident_bytes() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep freed memory")
def test_freed_memory_is_kept_until_it_is_given_back():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    kept, left, kept_again = map(int, done.stdout.split())
    assert min(kept, kept_again) > 2**27
    assert left < 2**26


def given_back_after(residents: list[int], other_work: tuple[int, ...] = ()) -> list[int]:
    """After which of the steps, whose ends find the process holding so much, freed memory is given back."""
    values, given_back, steps = iter(residents), [], []
    memory = FreedMemory(lambda: next(values), lambda: given_back.append(True))
    for step in range(len(residents)):
        memory.after_step(step in other_work)
        steps += [step] * len(given_back)
        given_back.clear()
    return steps


def test_freed_memory_is_given_back_after_the_first_step_and_after_growth():
    assert given_back_after([200, 100, 100, 124, 124, 126, 100, 126, 124]) == [0, 5, 7]


def test_freed_memory_is_given_back_after_other_work():
    """What the step after it holds is the measure from then on, with what the work left behind."""
    assert given_back_after([100, 100, 100, 300, 150, 180, 150], other_work=(3,)) == [0, 3]


def test_a_process_that_shrinks_and_one_that_is_steady_keep_what_they_freed():
    assert given_back_after([100] * 50) == [0]
    assert given_back_after([100, 90, 80, 70, 60]) == [0]

"""The learning rate at the steps that matter."""

from __future__ import annotations

import math

import numpy as np
import pytest

from train.config import OptimizerConfig
from train.optimize.schedule import schedule

STEPS, WARMUP, PEAK = 100, 10, 0.4


def rates(name: str, **fields) -> np.ndarray:
    """The rate at every step of a run and at the one after its last."""
    fields = {"warmup_steps": WARMUP, "decay_steps": 30, "final_fraction": 0.25} | fields
    config = OptimizerConfig(schedule=name, learning_rate=PEAK, **fields)
    rate = schedule(config, STEPS)
    return np.array([float(rate(step)) for step in range(STEPS + 1)])


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
def test_warm_up_rises_evenly_to_the_peak(name):
    found = rates(name)
    np.testing.assert_allclose(found[:WARMUP], PEAK * np.arange(1, WARMUP + 1) / WARMUP, rtol=1e-6)
    np.testing.assert_allclose(found[WARMUP], PEAK, rtol=1e-6)
    assert found.max() <= PEAK * (1 + 1e-6)
    for warmup_steps in (0, 1):
        assert rates(name, warmup_steps=warmup_steps)[0] == pytest.approx(PEAK)


SHAPES = {
    "cosine": lambda done: 0.25 + 0.75 * (1 + math.cos(math.pi * done)) / 2,
    "linear": lambda done: 1 - 0.75 * done,
    "wsd": lambda done: 1 - 0.75 * max(0.0, (done * 90 - 60) / 30),
    "constant": lambda done: 1.0,
}


@pytest.mark.parametrize("name", SHAPES)
def test_shape_after_the_warm_up(name):
    wanted = [PEAK * SHAPES[name]((step - WARMUP) / (STEPS - WARMUP)) for step in range(WARMUP, STEPS + 1)]
    np.testing.assert_allclose(rates(name)[WARMUP:], wanted, rtol=1e-5)


def test_final_fraction_zero_ends_at_zero():
    for name in ("cosine", "linear", "wsd"):
        found = rates(name, final_fraction=0.0)
        assert found[STEPS] == pytest.approx(0, abs=1e-8)
        assert found[STEPS - 1] > 0

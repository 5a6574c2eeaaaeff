"""What tests of runs share: states that need no compiling to be drawn, runs in this process, and signals at a step."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.weights import names
from tpu import host
from train import run
from train.adapter.frozen import Frozen
from train.config import DataConfig, Experiment, RunConfig
from train.data import pipeline
from train.program import Program, make_program
from train.signals import Stop
from train.state import TrainState
from train.workdir import Workdir

PROGRAMS: dict[Any, Program] = {}  # of the file that runs


def drawn(abstract: Any, seed: int = 0, scale: float = 0.3) -> Any:
    """Random arrays by their order, so that they are the same on every mesh, laid out as `abstract` says.

    Scales of norms are about 1, all else about 0.
    """
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        found = scale * rng.normal(size=leaf.shape) + (names(path)[-1] == "scale")
        return jax.device_put(found.astype(leaf.dtype), leaf.sharding)

    return jax.tree_util.tree_map_with_path(draw, abstract)


def random_state(program: Program, seed: int = 0, scale: float = 0.3) -> TrainState:
    """A state with random weights, and zero in all else."""

    def zero(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.device_put(jax.random.key(7), leaf.sharding)
        return jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)

    state = jax.tree.map(zero, program.abstract_state)
    return state._replace(weights=drawn(program.abstract_state.weights, seed, scale))


def train_here(experiment: Experiment, path: Path, base: Frozen | None = None, devices: int = 1) -> int:
    """Trains in this process, on so many devices, without measuring the processor; returns the exit status.

    A program that an earlier run had is not traced again.
    """
    with pytest.MonkeyPatch.context() as patch:
        found = jax.devices()[:devices]
        patch.setattr(jax, "devices", lambda *backend: found)
        patch.setattr(host, "measured_matmul_rate", lambda dtype: 1e9)
        patch.setattr(run, "make_program", _remembered)
        with Stop() as stop:
            workdir = Workdir(path)
            try:
                return run.pretrain(experiment, workdir, stop, base)
            finally:
                workdir.close()


def _remembered(experiment: Experiment, mesh: jax.sharding.Mesh) -> Program:
    """The program, whatever else of its run differs: how often it is saved, and how long a constant schedule is."""
    given, steps = experiment.run, experiment.run.steps if experiment.optimizer.schedule != "constant" else 1
    key = dataclasses.replace(experiment, run=RunConfig(steps=steps, seed=given.seed, start=given.start))
    if (repr(key), mesh) not in PROGRAMS:
        PROGRAMS[repr(key), mesh] = make_program(experiment, mesh)
    return PROGRAMS[repr(key), mesh]


@contextmanager
def terminated_at(step: int) -> Iterator[None]:
    """While it is entered, this process gets SIGTERM when the batch of that step is fetched."""
    original = pipeline.train_batches

    def batches(corpus: Any, data: DataConfig, seed: int, start_step: int, rows: Any) -> Iterator[Any]:
        for number, batch in enumerate(original(corpus, data, seed, start_step, rows), start_step + 1):
            if number == step:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "train_batches", batches)
        yield

"""Scanned layers: the time to compile does not grow with their number."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from model.config import ModelConfig
from train.config import DataConfig, Experiment
from train.layout import abstract_batch
from train.program import make_program
from train.resolve import resolve


@pytest.fixture
def as_users_compile() -> Iterator[None]:
    """Optimised, and never from a cache."""
    for testing in (False, True):
        jax.config.update("jax_disable_most_optimizations", testing)
        jax.config.update("jax_enable_compilation_cache", testing)
        compilation_cache.reset_cache()
        if not testing:
            yield


@pytest.mark.slow
def test_48_layers_compile_about_as_fast_as_6(one_device, as_users_compile):
    """The whole training step, in processor time."""

    def seconds(layers: int) -> float:
        experiment = resolve(
            Experiment(
                model=ModelConfig(vocab_size=300, layers=layers, embed_dim=32, heads=2, layer_loop="scan"),
                data=DataConfig(tokenizer="bytes", context=64, batch_size=2),
            )
        )
        experiment.model = experiment.model.placed("cpu", "float32")
        with jax.set_mesh(one_device):
            start = time.process_time()
            program = make_program(experiment, one_device)
            program.step.lower(program.abstract_state, abstract_batch(experiment), {}).compile()
            return time.process_time() - start

    seconds(2)  # what only the first compilation costs
    times = {layers: statistics.median(seconds(layers) for _ in range(3)) for layers in (6, 48)}
    assert times[48] < 1.5 * times[6], times

"""What training carries from step to step."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from model.attention.memory import Memory
from model.weights import Weights

Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
    """Everything that a step changes."""

    step: jax.Array  # [] int32, updates tried
    weights: Weights
    optimizer_state: Any
    ema: Weights | None  # moving average of the weights, float32
    key: jax.Array  # the run's random key; step n draws from fold_in(key, n)
    skipped: jax.Array  # [] int32, updates left out because loss or gradient was not finite
    skipped_in_a_row: jax.Array  # [] int32
    memory: Memory | None = None  # what layers keep of the rows before (model.memory)

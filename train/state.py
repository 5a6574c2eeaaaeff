"""What training carries from step to step, what a step follows, what it gives beside the next state."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import optax

from model.weights import Weights
from train.config import Experiment
from train.objectives.objective import Objective
from train.objectives.roles import Model

Metrics = dict[str, jax.Array]
Frozen = dict[str, Weights]  # by role; {} where nothing is frozen


class TrainState(NamedTuple):
    """Everything that a step changes."""

    step: jax.Array  # [] int32, updates tried
    weights: Weights  # of the model that is trained; of several a dictionary by role
    optimizer_state: Any
    ema: Weights | None  # moving average of the weights, float32
    key: jax.Array  # the run's random key; step n draws from fold_in(key, n)
    skipped: jax.Array  # [] int32, updates left out because loss or gradient was not finite
    skipped_in_a_row: jax.Array  # [] int32
    carried: Any = None  # what the objective hands on: memory of the rows before, rows of a rollout


class Plan(NamedTuple):
    """What a step follows; nothing in it is an array."""

    experiment: Experiment
    objective: Objective
    models: dict[str, Model]  # by role
    rule: optax.GradientTransformation
    learning_rate: optax.Schedule
    still: Any  # for every weight whether it stays as it is (optimizer.frozen); None: all move
    gradient_layout: Any = None  # a PartitionSpec for every weight
    optimizer_layout: Any = None  # the NamedShardings of an optimizer's state that lies with the hosts (offload)


class Told(NamedTuple):
    """What evaluating a batch gives: sums, the denominators of the same names, and what the next batch is given."""

    sums: dict[str, jax.Array]
    weights: dict[str, jax.Array]
    carried: Any = None

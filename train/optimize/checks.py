"""What must hold between the update rule of an experiment and the rest of it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from tpu.errors import UserError

if TYPE_CHECKING:
    from train.config import Experiment, OptimizerConfig, RunConfig


def check(experiment: Experiment) -> None:
    """Raises UserError where the schedule, micro-batches or local steps do not go with the rest."""
    data, optimizer, run = experiment.data, experiment.optimizer, experiment.run
    if data.batch_size % optimizer.accumulation:
        raise UserError(
            f"optimizer.accumulation={optimizer.accumulation}: does not divide data.batch_size={data.batch_size}"
        )
    if optimizer.schedule == "wsd" and optimizer.warmup_steps + optimizer.decay_steps > run.steps:
        raise UserError(
            f"optimizer.decay_steps={optimizer.decay_steps}: with optimizer.warmup_steps={optimizer.warmup_steps} "
            f"exceeds run.steps={run.steps}"
        )
    check_patterns("optimizer.frozen", optimizer.frozen)
    _check_local_steps(optimizer, run)


def check_patterns(field: str, patterns: tuple[str, ...]) -> None:
    """Raises UserError for the first of the patterns of a field that is no regular expression."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"{field}: {pattern!r} is no regular expression: {error}") from error


def _check_local_steps(optimizer: OptimizerConfig, run: RunConfig) -> None:
    if not optimizer.local_steps:
        return
    for field in ("ema_decay", "offload", "gradient_noise"):
        if value := getattr(optimizer, field):
            raise UserError(f"optimizer.{field}={value}: not with optimizer.local_steps={optimizer.local_steps}")
    if run.steps % optimizer.local_steps:
        raise UserError(
            f"run.steps={run.steps}: not a multiple of optimizer.local_steps={optimizer.local_steps}; the steps after "
            "the last exchange would be lost"
        )

"""Learning rate as a function of the step: cosine, linear, warmup-stable-decay (arXiv:2404.06395), constant."""

from __future__ import annotations

import optax

from train.config import OptimizerConfig


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """A linear warm-up to `learning_rate`, then the chosen shape, down to `final_fraction` of it at step `steps`."""
    peak, final = config.learning_rate, config.learning_rate * config.final_fraction
    rest = steps - config.warmup_steps
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, config.final_fraction)
    elif config.schedule == "linear":
        after = optax.linear_schedule(peak, final, rest)
    elif config.schedule == "wsd":
        after = optax.linear_schedule(peak, final, config.decay_steps, rest - config.decay_steps)
    else:
        after = optax.constant_schedule(peak)
    if config.warmup_steps == 0:
        return after
    warmup = optax.linear_schedule(peak / config.warmup_steps, peak, max(1, config.warmup_steps - 1))
    return optax.join_schedules([warmup, after], [config.warmup_steps])

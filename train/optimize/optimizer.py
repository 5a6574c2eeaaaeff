"""The update rule: Optax transformations chosen by the experiment, with weight decay by the weights' names."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from train.config import OptimizerConfig


def optimizer(config: OptimizerConfig, learning_rate: optax.Schedule, axes: Any) -> optax.GradientTransformation:
    """The chosen optimizer after clipping by the global norm.

    adamw (arXiv:1711.05101), adafactor (arXiv:1804.04235), lion (arXiv:2302.06675), sgd with momentum, muon for the
    weight matrices of the layers (arXiv:2502.16982) with Nesterov's adam for everything else. Decay is decoupled from
    the gradient in all of them.

    Args:
      axes: the weights' logical axes, as `model.kinds.build` gives them; they say what is a matrix of a layer.
    """
    decay, decays = config.weight_decay, lambda weights: decay_mask(weights, config.no_decay)
    if config.name == "adamw":
        rule = optax.adamw(learning_rate, config.beta1, config.beta2, config.eps, weight_decay=decay, mask=decays)
    elif config.name == "lion":
        rule = optax.lion(learning_rate, config.beta1, config.beta2, weight_decay=decay, mask=decays)
    else:
        scale = {
            "adafactor": lambda: optax.chain(optax.scale_by_factored_rms(decay_rate=0.8), optax.clip_by_block_rms(1.0)),
            "sgd": lambda: optax.trace(config.beta1),
            # Minus one cancels the sign that muon gives its result. Its own decay would leave out what adam takes.
            "muon": lambda: muon(
                -1.0,
                beta=config.beta1,
                eps=config.eps,
                adam_b1=config.beta1,
                adam_b2=config.beta2,
                muon_weight_dimension_numbers=matrix_dimensions(axes),
                consistent_rms=0.2,
            ),
        }[config.name]()
        rule = optax.chain(scale, optax.add_decayed_weights(decay, decays), optax.scale_by_learning_rate(learning_rate))
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), rule) if config.clip_norm else rule


def decay_mask(weights: Any, no_decay: tuple[str, ...]) -> Any:
    """For every weight whether it decays: not where a part of its path holds one of the words of `no_decay`."""

    def decays(path: tuple, _: Any) -> bool:
        return not any(word in str(part.key) for part in path for word in no_decay)

    return jax.tree_util.tree_map_with_path(decays, weights)


def matrix_dimensions(axes: Any) -> Any:
    """Which dimensions of each weight are Muon's inputs and outputs; None for what is not a matrix of a layer.

    Without this, optax.contrib.muon takes stacked kernels for vectors and quietly gives them to Adam.
    """

    def dimensions(path: tuple, names: tuple[str, ...]) -> MuonDimensionNumbers | None:
        if path[-1].key != "kernel" or "layers" not in names:
            return None
        # Into the residual stream, all but the last dimension are inputs; out of it, all but the first are outputs.
        first = max(names.index(name) for name in ("layers", "experts") if name in names) + 1
        split = len(names) - 1 if names[-1] == "embed" else first + 1
        return MuonDimensionNumbers(tuple(range(first, split)), tuple(range(split, len(names))))

    return jax.tree_util.tree_map_with_path(dimensions, axes, is_leaf=lambda leaf: isinstance(leaf, tuple))


def ema_update(average: Any, weights: Any, decay: float, step: jax.Array) -> Any:
    """Exponential moving average; its decay is at most (1 + step) / (10 + step), so that it forgets the start."""
    rate = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda a, w: a + (1 - rate).astype(a.dtype) * (w - a).astype(a.dtype), average, weights)


def state_bytes(rule: optax.GradientTransformation, weights: Any) -> int:
    """Bytes of the optimizer's state for abstract weights; allocates nothing."""
    state = jax.eval_shape(rule.init, weights)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))

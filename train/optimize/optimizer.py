"""The update rule: Optax transformations chosen by the experiment, with weight decay by the weights' names."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from model.weights import MATRICES, inputs, names
from train.config import OptimizerConfig
from train.optimize.frozen import of_trained, trained_part
from train.optimize.l1_penalty import proximal_l1

NOISE_DECAY = 0.55  # gamma of arXiv:1511.06807, section 3


def optimizer(
    config: OptimizerConfig,
    learning_rate: optax.Schedule,
    axes: Any,
    still: Any = None,
    seed: int = 0,
    in_place: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """The chosen optimizer after clipping by the global norm and noise on the gradient, before the L1 penalty.

    adamw (arXiv:1711.05101), adafactor (arXiv:1804.04235), lion (arXiv:2302.06675), sgd with momentum, muon for the
    weight matrices of the layers (arXiv:2502.16982) with Nesterov's adam for everything else. Decay is decoupled from
    the gradient in all of them. `update` takes as `finite` whether the step counts; adamw's moments stay without it.

    Args:
      axes: the weights' logical axes, as `model.kinds.build` gives them; they say what is a matrix of a layer.
      still: for every weight whether it is frozen (`train.optimize.frozen`); None where none is.
      seed: of the noise.
      in_place: as for `scale_by_adam`.
    """
    axes = axes if still is None else trained_part(axes, still)
    decay, decays = config.weight_decay, lambda weights: decay_mask(weights, config.no_decay)
    if config.name == "adamw":
        rule = optax.chain(
            scale_by_adam(config.beta1, config.beta2, config.eps, in_place),
            optax.add_decayed_weights(decay, decays),
            optax.scale_by_learning_rate(learning_rate),
        )
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
    links = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    links += [optax.add_noise(config.gradient_noise, NOISE_DECAY, seed)] if config.gradient_noise else []
    links += [rule, *([proximal_l1(config.l1_penalty, learning_rate, decays)] if config.l1_penalty else [])]
    rule = optax.with_extra_args_support(optax.chain(*links) if len(links) > 1 else rule)
    return rule if still is None else of_trained(rule, still)


def scale_by_adam(
    beta1: float, beta2: float, eps: float, in_place: bool = False
) -> optax.GradientTransformationExtraArgs:
    """As `optax.scale_by_adam`, with moments that can be written where the old ones are.

    The update is formed from the moments that are kept, after a step that is not `finite` the old ones. From those of
    `optax`, which are chosen afterwards, XLA forms it twice, and copies all old moments to do so.

    Args:
      in_place: moments are written before the update is formed: less memory (CPU), more traffic.
    """
    plain = optax.scale_by_adam(beta1, beta2, eps)

    def update(
        gradient: Any, state: optax.ScaleByAdamState, weights: Any = None, *, finite: Any = True, **_: Any
    ) -> tuple[Any, optax.ScaleByAdamState]:
        mu = optax.tree.update_moment(gradient, state.mu, beta1, 1)
        nu = optax.tree.update_moment_per_elem_norm(gradient, state.nu, beta2, 2)
        mu, nu = (
            jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
            for new, old in ((mu, state.mu), (nu, state.nu))
        )
        mu, nu = jax.lax.optimization_barrier((mu, nu)) if in_place else (mu, nu)
        count = optax.safe_increment(state.count)
        mu_hat, nu_hat = optax.tree.bias_correction(mu, beta1, count), optax.tree.bias_correction(nu, beta2, count)
        scaled = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu_hat, nu_hat)
        return scaled, optax.ScaleByAdamState(jnp.where(finite, count, state.count), mu, nu)

    return optax.GradientTransformationExtraArgs(plain.init, update)


def decay_mask(weights: Any, no_decay: tuple[str, ...]) -> Any:
    """For every weight whether it decays: not where a part of its path holds one of the words of `no_decay`."""

    def decays(path: tuple, _: Any) -> bool:
        return not any(word in name for name in names(path) for word in no_decay)

    return jax.tree_util.tree_map_with_path(decays, weights)


def matrix_dimensions(axes: Any) -> Any:
    """Which dimensions of each weight are Muon's inputs and outputs; None for what is not a matrix of a layer.

    Without this, optax.contrib.muon takes stacked kernels for vectors and quietly gives them to Adam.
    """

    def dimensions(path: tuple, axes: tuple[str, ...]) -> MuonDimensionNumbers | None:
        if names(path)[-1] not in MATRICES or "layers" not in axes:
            return None
        of_inputs = inputs(axes)
        return MuonDimensionNumbers(tuple(of_inputs), tuple(range(of_inputs.stop, len(axes))))

    return jax.tree_util.tree_map_with_path(dimensions, axes, is_leaf=lambda leaf: isinstance(leaf, tuple))


def ema_update(average: Any, weights: Any, decay: float, step: jax.Array) -> Any:
    """Exponential moving average; its decay is at most (1 + step) / (10 + step), so that it forgets the start."""
    rate = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda a, w: a + (1 - rate).astype(a.dtype) * (w - a).astype(a.dtype), average, weights)


def state_bytes(rule: optax.GradientTransformation, weights: Any) -> int:
    """Bytes of the optimizer's state for abstract weights; allocates nothing."""
    state = jax.eval_shape(rule.init, weights)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))

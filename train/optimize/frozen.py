"""Weights that stay as they are (optimizer.frozen): the update rule neither sees them nor holds anything for them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax


def trained_part(tree: Any, still: Any) -> Any:
    """What of a nested dictionary alike in structure is trained: without what `still`, of bools, says is frozen."""
    if not isinstance(still, dict):
        return tree
    return {name: trained_part(tree[name], of) for name, of in still.items() if not all(jax.tree.leaves(of))}


def of_trained(rule: optax.GradientTransformationExtraArgs, still: Any) -> optax.GradientTransformationExtraArgs:
    """The rule for all weights that leaves those frozen that `still` names; its state is that of the others."""

    def init(weights: Any) -> Any:
        return rule.init(trained_part(weights, still))

    def update(gradient: Any, state: Any, weights: Any, **extra: Any) -> tuple[Any, Any]:
        changes, state = rule.update(trained_part(gradient, still), state, trained_part(weights, still), **extra)
        return _filled(changes, gradient, still), state

    return optax.GradientTransformationExtraArgs(init, update)


def _filled(changes: Any, gradient: Any, still: Any) -> Any:
    """The changes of the trained weights, with zeros for all others."""
    if all(jax.tree.leaves(still)):
        return jax.tree.map(jnp.zeros_like, gradient)
    if not isinstance(still, dict):
        return changes
    return {name: _filled(changes.get(name), gradient[name], of) for name, of in still.items()}

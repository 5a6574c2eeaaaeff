"""An L1 penalty by its proximal step: weights shrink towards 0 and stay there until a gradient is stronger.

As weight decay is (arXiv:1711.05101), it is decoupled from the gradient and from what the update rule makes of it:
after the update each weight w becomes sign(w) max(|w| - learning_rate l1_penalty, 0), the soft threshold of ISTA (Beck
and Teboulle, 2009, equation 1.5). With plain SGD the weights at rest are those that minimise loss + l1_penalty |w|. A
penalty in the loss instead would leave weights that swing around 0 and never are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax


def soft_threshold(w: jax.Array, threshold: jax.Array | float) -> jax.Array:
    """sign(w) max(|w| - threshold, 0), in w's shape."""
    return jnp.sign(w) * jnp.maximum(jnp.abs(w) - threshold, 0)


def proximal_l1(
    strength: float, learning_rate: optax.Schedule, mask: Callable[[Any], Any]
) -> optax.GradientTransformation:
    """The last link of a chain: turns updates into those that end at the soft threshold, by learning_rate * strength,
    of what they would have led to.

    Args:
      mask: of the weights, whether each is shrunk.
    """

    def init(weights: Any) -> optax.ScaleByScheduleState:
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update(updates: Any, state: optax.ScaleByScheduleState, weights: Any) -> tuple[Any, optax.ScaleByScheduleState]:
        threshold = learning_rate(state.count) * strength

        def shrunk(shrinks: bool, u: jax.Array, w: jax.Array) -> jax.Array:
            if not shrinks:
                return u
            end = soft_threshold(w.astype(jnp.float32) + u.astype(jnp.float32), threshold)
            return (end.astype(w.dtype) - w).astype(u.dtype)

        updates = jax.tree.map(shrunk, mask(weights), updates, weights)
        return updates, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)

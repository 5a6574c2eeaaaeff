"""A model with its weights, as objectives call it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx

from model.config import ModelConfig
from model.weights import Weights


class Bound(NamedTuple):
    """A model that can be called."""

    module: Any  # of the class that `model.kinds` chooses
    axes: Any  # logical axes of all of its weights
    config: ModelConfig

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """What the module computes."""
        return self.module(*arguments, **named)

    def head(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [B, T, D] -> logits [B, T, V or labels] float32."""
        return self.module.head(hidden)

    def split_head(self) -> tuple[Callable[[Weights, jax.Array], jax.Array], Weights, Any]:
        """The head as a function of (its weights, hidden states), the weights and their logical axes, as
        `train.losses.cross_entropy` takes them."""
        graph, weights = nnx.split(self.module.head)
        tied = {"embedding": self.axes["embedding"]} if self.config.tied_head else {}

        def head(weights: Weights, hidden: jax.Array) -> jax.Array:
            return nnx.merge(graph, nnx.State(weights))(hidden)

        return head, nnx.to_pure_dict(weights), self.axes.get("head", {}) | tied

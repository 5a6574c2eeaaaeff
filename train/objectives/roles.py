"""The models of an objective: which weights each has, trained and frozen, and how they become a model to call."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx

from model import kinds
from model.config import ModelConfig
from model.weights import Weights, bind
from tpu.errors import UserError
from train.adapter import weights as adapter_weights
from train.config import AdapterConfig, Experiment
from train.objectives.bound import Bound
from train.objectives.objective import Role


class Model(NamedTuple):
    """What is known of the model of a role before it has weights; all of its weights are abstract."""

    config: ModelConfig  # placed
    graphdef: nnx.GraphDef
    axes: Any  # logical axes of the whole model
    trained: Weights | None  # None: nothing is
    trained_axes: Any
    frozen: Weights | None  # None: nothing is
    frozen_axes: Any
    adapter: AdapterConfig | None  # by which both become the model's weights, where there are both

    def init(self, key: jax.Array, frozen: Weights | None) -> Weights:
        """Draws the trained weights; with an adapter, those with which the model computes what `frozen` alone does."""
        if self.adapter:
            return adapter_weights.init(self.adapter, self.config, key, frozen)
        return kinds.init(self.config, key)

    def bind(self, trained: Weights | None, frozen: Weights | None, keys: jax.Array | None = None) -> Bound:
        """The model with these weights; `keys` [B] are for the adapter's dropout, None for none."""
        if self.adapter:
            weights = adapter_weights.combined(self.adapter, frozen, trained, keys)
        else:
            weights = frozen if trained is None else trained
        return Bound(bind(self.graphdef, weights), self.axes, self.config)


def models(experiment: Experiment, roles: Mapping[str, Role]) -> dict[str, Model]:
    """The model of every role, for an experiment whose own model is `placed`.

    Raises UserError for an adapter on an objective that trains several models.
    """
    trained = [name for name, role in roles.items() if role.trained]
    if experiment.adapter.kind != "none" and len(trained) > 1:
        raise UserError(
            f"adapter.kind={experiment.adapter.kind!r}: objective.name={experiment.objective.name!r} trains "
            f"{len(trained)} models, {', '.join(trained)}; an adapter is of one; give adapter.kind='none'"
        )
    return {name: _model(experiment, role) for name, role in roles.items()}


def _model(experiment: Experiment, role: Role) -> Model:
    adapter, own = experiment.adapter, experiment.model
    if role.model is not None:
        config = role.model.placed(own.platform, own.compute_dtype)
    else:
        config = own if role.trained else adapter_weights.base_model(adapter, own)
    config = dataclasses.replace(config, head=role.head)
    graphdef, abstract, axes = kinds.build(config)
    if not role.trained:
        return Model(config, graphdef, axes, None, None, abstract, axes, None)
    if adapter.kind == "none":
        return Model(config, graphdef, axes, abstract, axes, None, None, None)
    parts = adapter_weights.parts(adapter, config)
    return Model(config, graphdef, axes, parts.trained, parts.trained_axes, parts.base, parts.base_axes, adapter)


def by_role(models: Mapping[str, Model], weights: Any) -> dict[str, Any]:
    """The weights of a state, or what belongs to them, by the role that is trained."""
    names = [name for name, model in models.items() if model.trained is not None]
    return {names[0]: weights} if len(names) == 1 else weights


def of_state(found: Mapping[str, Any]) -> Any:
    """What `by_role` takes apart: the only role's weights as they are, those of several as a dictionary."""
    return next(iter(found.values())) if len(found) == 1 else dict(found)

"""What an experiment compiles to: the functions of its objective and its step, jitted for a mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tpu import host, rules
from train.config import Experiment
from train.data.batch import Batch
from train.layout import batch_layout, state_layout, weights_layout
from train.objectives.roles import Model, models, of_state
from train.objectives.table import objective_of
from train.optimize.local_sgd import localize
from train.optimize.optimizer import optimizer
from train.optimize.schedule import schedule
from train.state import Frozen, Metrics, Plan, Told, TrainState
from train.step import evaluate as tell
from train.step import frozen_mask
from train.step import step as take_step


class Program(NamedTuple):
    """What an experiment compiles to. Call the functions inside `with jax.set_mesh(mesh)`.

    Frozen weights are a dictionary by role, as `abstract_frozen` is: {} where nothing is frozen.
    """

    init: Callable[..., TrainState]  # (key, frozen), or (key, frozen, weights) to begin with weights that are there
    step: Callable[..., tuple[TrainState, Metrics]]  # (state, batch, frozen)
    evaluate: Callable[..., Told]  # (weights, batch, frozen), and what is carried, where something is
    abstract_state: TrainState  # jax.ShapeDtypeStruct leaves that carry their sharding
    abstract_frozen: Frozen
    models: dict[str, Model]  # by role
    first_carried: Callable[[], Any]  # what the first step is handed; None where nothing is carried

    @property
    def graphdef(self) -> nnx.GraphDef:
        """Of the first model that is trained."""
        return next(model.graphdef for model in self.models.values() if model.trained is not None)


def make_program(experiment: Experiment, mesh: Mesh) -> Program:
    """The jitted functions of an experiment that is `resolved` and whose model is `placed`; allocates nothing."""
    plan = _plan(experiment)
    trained = {name: model for name, model in plan.models.items() if model.trained is not None}
    axes = of_state({name: model.trained_axes for name, model in trained.items()})
    frozen = {
        name: weights_layout(model.frozen, model.frozen_axes, mesh, experiment)
        for name, model in plan.models.items()
        if model.frozen is not None
    }

    def init(key: jax.Array, frozen: Frozen, weights: Any = None) -> TrainState:
        return _init(plan, key, frozen, weights)

    # The key is made inside: the devices of a pod that is only compiled for hold no arrays.
    state = jax.eval_shape(lambda frozen: init(jax.random.key(0), frozen), frozen)
    state = state_layout(state, axes, mesh, experiment)
    in_parts = rules.tree_shardings(mesh, axes, state.weights)
    whole = experiment.mesh.zero == 1
    plan = plan._replace(
        gradient_layout=jax.tree.map(lambda s: s.spec, _shardings(state.weights) if whole else in_parts),
        optimizer_layout=_shardings(state.optimizer_state) if experiment.optimizer.offload else None,
    )

    def step(state: TrainState, batch: Batch, frozen: Frozen) -> tuple[TrainState, Metrics]:
        return take_step(plan, state, batch, frozen)

    def evaluate(weights: Any, batch: Batch, frozen: Frozen, carried: Any) -> Told:
        return tell(plan, weights, batch, frozen, carried)

    if experiment.optimizer.local_steps:
        init, step, state = localize(init, step, state, in_parts, experiment.optimizer)
    by_leaf, rows = _shardings(state), batch_layout(experiment, mesh)
    below, everywhere = _shardings(frozen), NamedSharding(mesh, PartitionSpec())
    platform = experiment.model.platform
    evaluated = jax.jit(evaluate, in_shardings=(by_leaf.weights, rows, below, by_leaf.carried))
    return Program(
        init=jax.jit(init, out_shardings=by_leaf, compiler_options=host.start_compiler_options(platform)),
        step=jax.jit(
            step,
            in_shardings=(by_leaf, rows, below),
            out_shardings=(by_leaf, everywhere),
            donate_argnames="state",
            compiler_options=host.step_compiler_options(platform),
        ),
        evaluate=lambda weights, batch, frozen, carried=None: evaluated(weights, batch, frozen, carried),
        abstract_state=state,
        abstract_frozen=frozen,
        models=plan.models,
        first_carried=jax.jit(lambda: plan.objective.carried(experiment), out_shardings=by_leaf.carried),
    )


def _plan(experiment: Experiment) -> Plan:
    objective = objective_of(experiment)
    found = models(experiment, objective.roles(experiment))
    trained = {name: model for name, model in found.items() if model.trained is not None}
    weights = of_state({name: model.trained for name, model in trained.items()})
    axes = of_state({name: model.trained_axes for name, model in trained.items()})
    learning_rate, patterns = schedule(experiment.optimizer, experiment.run.steps), experiment.optimizer.frozen
    still = frozen_mask(weights, patterns) if patterns else None
    return Plan(
        experiment=experiment,
        objective=objective,
        models=found,
        rule=optimizer(
            experiment.optimizer, learning_rate, axes, still, experiment.run.seed, experiment.model.platform == "cpu"
        ),
        learning_rate=learning_rate,
        still=still,
    )


def _init(plan: Plan, key: jax.Array, frozen: Frozen, weights: Any) -> TrainState:
    """The state before the first step, with weights drawn where none are given."""
    init_key, run_key = jax.random.split(key)
    if weights is None:
        trained = [name for name, model in plan.models.items() if model.trained is not None]
        keys = [init_key] if len(trained) == 1 else jax.random.split(init_key, len(trained))
        weights = of_state(
            {name: plan.models[name].init(own, frozen.get(name)) for name, own in zip(trained, keys, strict=True)}
        )
    ema = jax.tree.map(lambda w: w.astype(jnp.float32), weights) if plan.experiment.optimizer.ema_decay else None
    zero, carried = jnp.zeros((), jnp.int32), plan.objective.carried(plan.experiment)
    return TrainState(zero, weights, plan.rule.init(weights), ema, run_key, zero, zero, carried)


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, tree)

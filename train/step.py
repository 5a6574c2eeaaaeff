"""The step of every objective: a pure function (state, batch, frozen weights) -> (state, metrics).

Each term of the loss is a sum over the batch divided by the sum of its weights over the global batch, so that splitting
a batch into micro-batches, packing, and the shape of the mesh never change it.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tpu.errors import UserError
from train.data.batch import Batch
from train.gradients import Found, gradients, kept, sums_of
from train.objectives.roles import by_role, of_state
from train.optimize.balance import balance_figures, rebalanced
from train.optimize.optimizer import ema_update
from train.state import Frozen, Metrics, Plan, Told, TrainState


def step(plan: Plan, state: TrainState, batch: Batch, frozen: Frozen) -> tuple[TrainState, Metrics]:
    """One update, left out where loss or gradient is not finite."""
    if plan.optimizer_layout is not None:  # It lies with the hosts (optimizer.offload).
        on_device = jax.tree.map(lambda s: s.with_memory_kind("device"), plan.optimizer_layout)
        state = state._replace(optimizer_state=jax.device_put(state.optimizer_state, on_device))
    key = jax.random.fold_in(state.key, state.step)
    on_policy = plan.objective.collect is not None  # Then rows are what is carried, and the step has its batch of them.
    found, gradient, carried = gradients(plan, state.weights, frozen, batch, key, None if on_policy else state.carried)
    gradient = jax.tree.map(lambda g, w: g.astype(w.dtype), gradient, state.weights)
    gradient = jax.lax.with_sharding_constraint(gradient, plan.gradient_layout)
    gradient_norm = optax.tree.norm(gradient)
    finite = jnp.isfinite(found.loss) & jnp.isfinite(gradient_norm)
    new, update_ratio = _updated(plan, state, gradient, found, finite, state.carried if on_policy else carried)
    if plan.optimizer_layout is not None:
        new = new._replace(optimizer_state=jax.device_put(new.optimizer_state, plan.optimizer_layout))
    bad = (~finite).astype(jnp.int32)
    new = new._replace(
        step=state.step + 1,
        skipped=state.skipped + bad,
        skipped_in_a_row=(state.skipped_in_a_row + bad) * bad,
    )
    metrics = {
        "loss": found.loss,
        **found.figures,
        "grad_norm": gradient_norm,
        "update_ratio": update_ratio,
        "learning_rate": plan.learning_rate(state.step - state.skipped),
        "loss_tokens": next(iter(plan.objective.weights(batch).values())),
        "skipped": new.skipped,
        "skipped_in_a_row": new.skipped_in_a_row,
    }
    return new, metrics | (balance_figures(found.routings) if found.routings else {})


def _updated(
    plan: Plan, state: TrainState, gradient: Any, found: Found, finite: jax.Array, carried: Any
) -> tuple[TrainState, jax.Array]:
    """The state with new weights, their average, the optimizer's state and what is carried, where all was `finite`; and
    the norm of the updates over that of the weights."""
    with jax.named_scope("optimizer"):
        updates, optimizer_state = plan.rule.update(gradient, state.optimizer_state, state.weights, finite=finite)
        updates = kept(plan, updates, jax.tree.map(jnp.zeros_like, updates))
        update_ratio, counts = optax.tree.norm(updates) / optax.tree.norm(state.weights), finite
        update_ratio = jnp.where(finite, update_ratio, jnp.nan)  # There was no update.
        if plan.experiment.model.platform == "cpu":
            # Read for the last time before they are written, the weights are not copied.
            counts, update_ratio = jax.lax.optimization_barrier((finite, update_ratio))
        weights = optax.apply_updates(state.weights, updates)
    if plan.experiment.model.router_bias:
        weights, old = by_role(plan.models, weights), by_role(plan.models, state.weights)
        first, rate = next(iter(weights)), plan.experiment.optimizer.router_bias_rate
        weights = of_state(weights | {first: rebalanced(weights[first], old[first], found.routings, rate)})
    weights = kept(plan, weights, state.weights)
    ema = state.ema
    if ema is not None:
        ema = ema_update(ema, weights, plan.experiment.optimizer.ema_decay, state.step)
    optimizer_state = _where(finite, optimizer_state, state.optimizer_state)
    weights, ema, carried = _where(counts, (weights, ema, carried), (state.weights, state.ema, state.carried))
    return state._replace(weights=weights, optimizer_state=optimizer_state, ema=ema, carried=carried), update_ratio


def _where(condition: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda new, old: jnp.where(condition, new, old), new, old)


def evaluate(plan: Plan, weights: Any, batch: Batch, frozen: Frozen, carried: Any) -> Told:
    """What is told of a batch, without dropout."""
    sums, of_batch = sums_of(plan, weights, frozen, batch, None, carried), plan.objective.weights(batch)
    return Told(dict(sums.told), {name: of_batch[name] for name in sums.told}, sums.carried)


def frozen_mask(weights: Any, patterns: tuple[str, ...]) -> Any:
    """For every weight whether one of the patterns is found in its path. Raises UserError for one found in none."""
    paths = [
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, _ in jax.tree_util.tree_leaves_with_path(weights)
    ]
    for pattern in patterns:
        if not any(re.search(pattern, path) for path in paths):
            raise UserError(
                f"optimizer.frozen: {pattern!r} is found in no weight; there is {', '.join(sorted(paths)[:8])}"
            )
    frozen = [any(re.search(pattern, path) for pattern in patterns) for path in paths]
    if all(frozen):
        raise UserError(f"optimizer.frozen={patterns}: freezes every weight; nothing is left to train")
    return jax.tree.unflatten(jax.tree.structure(weights), frozen)

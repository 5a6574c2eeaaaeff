"""The loss of a batch and its gradient, micro-batch by micro-batch.

Sums are divided by the denominators of the whole batch, so that how it is cut into micro-batches changes nothing.

Legend: B rows, A micro-batches.
"""

from __future__ import annotations

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from model.dropout import row_keys
from model.weights import rounded
from train.data.batch import Batch
from train.layout import in_ring_order
from train.objectives.objective import Sums
from train.objectives.roles import by_role, of_state
from train.optimize.balance import balance_loss, loads, router_z_loss
from train.state import Frozen, Plan


class Part(NamedTuple):
    """Rows of a batch with what belongs to them; every leaf has them first."""

    batch: Batch
    keys: jax.Array | None  # [B] for dropout
    carried: Any


class Whole(NamedTuple):
    """What a part must know of the batch that it is of."""

    weights: dict[str, jax.Array]  # denominators
    load: jax.Array | None  # of experts (`train.optimize.balance.loads`); None: the part is the whole


class Found(NamedTuple):
    """What a part adds up to, beside its gradient; leaves are sums over parts."""

    loss: jax.Array
    figures: dict[str, jax.Array]
    routings: dict[str, Any]


def gradients(
    plan: Plan, weights: Any, frozen: Frozen, batch: Batch, key: jax.Array, carried: Any
) -> tuple[Found, Any, Any]:
    """The loss with its figures, the gradient, and what is carried on."""
    micro_batches = plan.experiment.optimizer.accumulation
    whole = Whole(denominators(plan, batch), None)
    keys = row_keys(key, len(next(iter(batch.values())))) if _draws(plan) else None
    weights, frozen = _rounded(plan, weights, frozen)
    gradient = jax.value_and_grad(_share, argnums=1, has_aux=True)
    part = Part(batch, keys, carried)
    if micro_batches == 1:
        (_, (found, carried)), summed = gradient(plan, weights, frozen, part, whole)
        return found, summed, carried

    # Every A-th row, not every run of B / A rows: each device then keeps the rows it has.
    split = jax.tree.map(lambda a: a.reshape(-1, micro_batches, *a.shape[1:]).swapaxes(0, 1), part)
    if plan.experiment.loss.balance_loss:
        # The gradient of the first micro-batch depends on the load of all: a forward pass to count it.
        def counted(part: Part) -> jax.Array:
            return loads(_share(plan, weights, frozen, part, whole)[1][0].routings)

        whole = whole._replace(load=jax.lax.map(counted, split).sum(0))

    def add(sums: tuple[Found, Any], part: Part) -> tuple[tuple[Found, Any], Any]:
        (_, (found, carried)), one = gradient(plan, weights, frozen, part, whole)
        return jax.tree.map(jnp.add, sums, (found, one)), carried

    first = jax.tree.map(lambda a: a[0], split)
    found = jax.eval_shape(lambda *given: _share(plan, *given)[1][0], weights, frozen, first, whole)
    zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), weights)
    zeros = jax.lax.with_sharding_constraint(zeros, plan.gradient_layout)
    start = jax.tree.map(lambda f: jnp.zeros(f.shape, f.dtype), found), zeros
    (found, summed), carried = jax.lax.scan(add, start, split)
    return found, summed, jax.tree.map(lambda a: a.swapaxes(0, 1).reshape(-1, *a.shape[2:]), carried)


def _share(plan: Plan, weights: Any, frozen: Frozen, part: Part, whole: Whole) -> tuple[jax.Array, tuple[Found, Any]]:
    """A part's share in the loss of its batch, and (what it adds up to, what is carried on)."""
    sums, of_loss = sums_of(plan, weights, frozen, *part), plan.experiment.loss
    loss = functools.reduce(operator.add, (total / whole.weights[name] for name, total in sums.trained.items()))
    if of_loss.balance_loss:
        load = loads(sums.routings) if whole.load is None else whole.load
        loss += of_loss.balance_loss * balance_loss(sums.routings, load, whole.weights["routed"])
    if of_loss.router_z_loss:
        loss += of_loss.router_z_loss * router_z_loss(sums.routings, whole.weights["routed"])
    figures = {name: total / whole.weights[name] for name, total in sums.told.items()}
    return loss, (Found(loss, figures, dict(sums.routings)), sums.carried)


def sums_of(
    plan: Plan, weights: Any, frozen: Frozen, batch: Batch, keys: jax.Array | None = None, carried: Any = None
) -> Sums:
    """The objective's sums over a batch, with its models bound to their weights."""
    trained = by_role(plan.models, kept(plan, weights, jax.tree.map(jax.lax.stop_gradient, weights)))
    bound = {name: model.bind(trained.get(name), frozen.get(name), keys) for name, model in plan.models.items()}
    batch = in_ring_order(batch, plan.objective.layout(plan.experiment), plan.experiment)
    return plan.objective.sums(bound, batch, plan.experiment, keys, carried)


def denominators(plan: Plan, batch: Batch) -> dict[str, jax.Array]:
    """What sums over the batch are divided by; a batch of padding has no loss, and no gradient."""
    found = {name: jnp.asarray(weight, jnp.float32) for name, weight in plan.objective.weights(batch).items()}
    return {name: jnp.where(weight > 0, weight, 1.0) for name, weight in found.items()}


def kept(plan: Plan, new: Any, old: Any) -> Any:
    """The new weights, and of those that stay as they are the old."""
    return new if plan.still is None else jax.tree.map(lambda still, n, o: o if still else n, plan.still, new, old)


def _draws(plan: Plan) -> bool:
    """Whether a model that trains needs keys: something is dropped, or noise added."""
    rates = [plan.experiment.adapter.dropout]
    for model in plan.models.values():
        if model.trained is not None:
            config = model.config
            rates += [config.embedding_dropout, config.attention_dropout, config.residual_dropout]
            rates += [config.embedding_noise]
    return max(rates) > 0


def _rounded(plan: Plan, weights: Any, frozen: Frozen) -> tuple[Any, Frozen]:
    """On accelerators the matrices in their compute dtypes: they take half the time to gather."""
    if plan.experiment.model.platform == "cpu":
        return weights, frozen

    def of_all(found: dict[str, Any]) -> dict[str, Any]:
        return {name: rounded(w, plan.models[name].config.compute_dtype) for name, w in found.items()}

    return of_state(of_all(by_role(plan.models, weights))), of_all(frozen)

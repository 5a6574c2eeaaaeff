"""Local SGD with an outer optimizer (DiLoCo, arXiv:2311.08105, algorithm 1): replicas that seldom talk.

Every replica along the mesh axis `rules.REPLICA_AXIS` has weights and inner optimizer of its own and takes
`optimizer.local_steps` ordinary steps on its share of the batch. Then the outer optimizer, SGD with Nesterov's
momentum, takes the mean of the replicas' changes, with the sign turned, for the gradient of the common weights, and all
replicas go on from these. The inner optimizers keep their state, as in the paper.

What a step does within a replica stays there: its loss is divided by its own sum of loss weights, its gradient is
clipped by its own norm, an update that is not finite is left out of it alone, and it draws dropout of its own. All
replicas weigh the same in the mean, one that left out updates too, which brings a smaller change. With one local step
of plain SGD, an outer learning rate of 1 and no momentum this is synchronous training, but where the shares' sums of
loss weights differ: there, synchronous training weighs tokens alike, and this weighs replicas alike.

Between outer updates replicas exchange nothing but a handful of figures for the log.

Legend: R replicas, B rows, T tokens per row, F figures of a step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from model.weights import Weights
from tpu import rules
from train.config import OptimizerConfig
from train.data.batch import Batch
from train.state import Frozen, Metrics, TrainState


class Replicas(NamedTuple):
    """What each replica has to itself; every leaf has a first dimension [R]."""

    weights: Weights
    optimizer_state: Any
    skipped: jax.Array  # [R] int32, as in `train.state.TrainState`
    skipped_in_a_row: jax.Array  # [R] int32


class LocalState(NamedTuple):
    """The optimizer's state, seen from the common weights."""

    replicas: Replicas
    momentum: Weights  # of the outer optimizer, float32


def localize(
    init: Callable[..., TrainState],
    step: Callable[[TrainState, Batch, Frozen], tuple[TrainState, Metrics]],
    abstract_state: TrainState,
    in_parts: Any,
    config: OptimizerConfig,
) -> tuple[Callable, Callable, TrainState]:
    """Turns a synchronous step, not yet jitted, into one of `config.local_steps` between exchanges.

    `weights` of the new state are the common ones, of the last outer update: those to evaluate and to serve. Its
    `optimizer_state` is a `LocalState`. Of the metrics, `loss_tokens` and `skipped` are sums over the replicas,
    `skipped_in_a_row` is their maximum, and the others are means weighted by the replicas' sums of loss weights.

    Args:
      init: (key, frozen, weights or nothing) -> state, of the synchronous step.
      step: (state, batch [B, T], frozen) -> (state, metrics). It must leave the mesh axis of the replicas alone.
      abstract_state: what `init` gives, laid out on the mesh.
      in_parts: the NamedSharding of what belongs to each weight.

    Returns:
      init, step and abstract_state in the same forms.
    """
    axis = rules.REPLICA_AXIS
    mesh = abstract_state.step.sharding.mesh
    replicas = mesh.shape[axis]
    common, own = PartitionSpec(), PartitionSpec(axis)

    def init_local(key: jax.Array, frozen: Frozen, weights: Weights | None = None) -> TrainState:
        state = init(key, frozen, weights)
        each = Replicas(state.weights, state.optimizer_state, state.skipped, state.skipped_in_a_row)
        each = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (replicas, *leaf.shape)), each)
        momentum = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), state.weights)
        return state._replace(optimizer_state=LocalState(each, momentum))

    def step_local(state: TrainState, batch: Batch, frozen: Frozen) -> tuple[TrainState, Metrics]:
        in_replicas = jax.shard_map(
            step_of_one,
            mesh=mesh,
            in_specs=(common, common, LocalState(own, common), own, common),
            out_specs=(common, LocalState(own, common), common),
            axis_names={axis},
            check_vma=False,  # so that the step may hold shard_maps of its own
        )
        rest = state._replace(weights=None, optimizer_state=None)
        weights, optimizer_state, metrics = in_replicas(rest, state.weights, state.optimizer_state, batch, frozen)
        new = state._replace(
            step=state.step + 1,
            weights=weights,
            optimizer_state=optimizer_state,
            skipped=metrics["skipped"],
            skipped_in_a_row=metrics["skipped_in_a_row"],
        )
        return new, metrics

    def step_of_one(
        rest: TrainState, weights: Weights, local: LocalState, batch: Batch, frozen: Frozen
    ) -> tuple[Weights, LocalState, Metrics]:
        """On the devices of one replica: its part [1, ...] of what is its own, its rows [B / R, T]."""
        mine = jax.tree.map(lambda leaf: leaf[0], local.replicas)
        before = rest._replace(**mine._asdict(), key=jax.random.fold_in(rest.key, jax.lax.axis_index(axis)))
        after, figures = step(before, batch, frozen)
        weights, momentum, own_weights = jax.lax.cond(
            after.step % config.local_steps == 0,
            join,
            lambda *unchanged: unchanged,
            *(weights, local.momentum, after.weights),
        )
        mine = Replicas(own_weights, after.optimizer_state, after.skipped, after.skipped_in_a_row)
        return weights, LocalState(jax.tree.map(lambda leaf: leaf[None], mine), momentum), _together(figures, axis)

    def join(weights: Weights, momentum: Weights, own_weights: Weights) -> tuple[Weights, Weights, Weights]:
        """The new common weights, outer momentum, and again the common weights: the replica goes on from them."""
        with jax.named_scope("outer_optimizer"):
            change = jax.tree.map(lambda w, own: w.astype(jnp.float32) - own.astype(jnp.float32), weights, own_weights)
            weights, momentum = outer_update(weights, momentum, jax.lax.pmean(change, axis), config)
        return weights, momentum, weights

    return init_local, step_local, _local_state(abstract_state, in_parts, replicas)


def _local_state(old: TrainState, in_parts: Any, replicas: int) -> TrainState:
    """The abstract state of replicas, laid out on the mesh, from that of a synchronous step."""
    mesh = old.step.sharding.mesh

    def of_replicas(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, PartitionSpec(rules.REPLICA_AXIS, *leaf.sharding.spec))
        return jax.ShapeDtypeStruct((replicas, *leaf.shape), leaf.dtype, sharding=sharding)

    each = Replicas(old.weights, old.optimizer_state, old.skipped, old.skipped_in_a_row)
    momentum = jax.tree.map(
        lambda w, sharding: jax.ShapeDtypeStruct(w.shape, jnp.float32, sharding=sharding), old.weights, in_parts
    )
    return old._replace(optimizer_state=LocalState(jax.tree.map(of_replicas, each), momentum))


def outer_update(
    weights: Weights, momentum: Weights, gradient: Weights, config: OptimizerConfig
) -> tuple[Weights, Weights]:
    """SGD with Nesterov's momentum: m' = outer_momentum m + g, w' = w - outer_learning_rate (g + outer_momentum m').

    Returns:
      New weights in their dtypes, and the new momentum, float32 as `momentum` and `gradient` are.
    """
    momentum = jax.tree.map(lambda m, g: config.outer_momentum * m + g, momentum, gradient)

    def update(w: jax.Array, m: jax.Array, g: jax.Array) -> jax.Array:
        return (w - config.outer_learning_rate * (g + config.outer_momentum * m)).astype(w.dtype)

    return jax.tree.map(update, weights, momentum, gradient), momentum


def _together(figures: Metrics, axis: str) -> Metrics:
    """One step's metrics from each replica's own, by a single exchange of a few bytes."""
    names = list(figures)
    mine = jnp.stack([jnp.asarray(figures[name], jnp.float32) for name in names])  # [F]
    table = dict(zip(names, jax.lax.all_gather(mine, axis, axis=1), strict=True))  # [R] each
    total = table["loss_tokens"].sum()
    shares = jnp.where(total > 0, table["loss_tokens"] / total, 1 / table["loss_tokens"].size)
    combined = {name: (shares * values).sum() for name, values in table.items()}
    return combined | {
        "loss_tokens": total,
        "skipped": table["skipped"].sum().astype(jnp.int32),
        "skipped_in_a_row": table["skipped_in_a_row"].max().astype(jnp.int32),
    }

"""The language-modelling step: a pure function (state, batch) -> (state, metrics), and what it needs to start.

The loss is the sum over all tokens divided by the global sum of loss weights, so that splitting a batch into
micro-batches, packing, and the shape of the mesh never change it.

Legend: B rows, T tokens per row, A micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from model import transformer
from model.attention import Place
from model.transformer import Transformer, Weights
from tpu import rules
from train.config import Experiment
from train.data.batch import Batch
from train.loss import cross_entropy
from train.optimizer import ema_update, optimizer
from train.schedule import schedule

Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
    """Everything that a step changes."""

    step: jax.Array  # [] int32, updates tried
    weights: Weights
    optimizer_state: Any
    ema: Weights | None  # moving average of the weights, float32
    key: jax.Array  # the run's random key; step n draws from fold_in(key, n)
    skipped: jax.Array  # [] int32, updates left out because loss or gradient was not finite
    skipped_in_a_row: jax.Array  # [] int32


class Program(NamedTuple):
    """What an experiment compiles to. Call the functions inside `with jax.set_mesh(mesh)`."""

    init: Callable[[jax.Array], TrainState]
    step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    evaluate: Callable[[Weights, Batch], Metrics]
    abstract_state: TrainState  # jax.ShapeDtypeStruct leaves that carry their sharding
    graphdef: nnx.GraphDef


def loss_sums(model: Transformer, batch: Batch, experiment: Experiment, key: jax.Array | None) -> tuple[jax.Array, ...]:
    """Sums over a batch of the trained loss and of the negative log-likelihood (nats); see `train.loss`."""
    hidden, _ = model(batch.tokens, Place(batch.segments, batch.positions), key=key)
    head_graph, head_weights = nnx.split(model.head)

    def head(weights: Weights, h: jax.Array) -> jax.Array:
        return nnx.merge(head_graph, nnx.State(weights))(h)

    with jax.named_scope("loss"):
        weights = nnx.to_pure_dict(head_weights)
        return cross_entropy(head, weights, hidden, batch.targets, batch.loss_weights, experiment.loss)


def make_program(experiment: Experiment, mesh: Mesh) -> Program:
    """The jitted functions of an experiment that is `resolved` and whose model is `placed`; allocates nothing."""
    config = experiment.model
    graphdef, _, axes = transformer.build(config)
    learning_rate = schedule(experiment.optimizer, experiment.run.steps)
    rule = optimizer(experiment.optimizer, learning_rate, axes)
    micro_batches = experiment.optimizer.accumulation
    dropout = max(config.embedding_dropout, config.attention_dropout, config.residual_dropout) > 0

    def init(key: jax.Array) -> TrainState:
        init_key, run_key = jax.random.split(key)
        weights = transformer.init(config, init_key)
        ema = jax.tree.map(lambda w: w.astype(jnp.float32), weights) if experiment.optimizer.ema_decay else None
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, weights, rule.init(weights), ema, run_key, zero, zero)

    def loss(weights: Weights, batch: Batch, key: jax.Array | None, total: jax.Array) -> tuple[jax.Array, jax.Array]:
        trained, nll = loss_sums(transformer.bind(graphdef, weights), batch, experiment, key)
        return trained / total, nll / total

    def gradients(weights: Weights, batch: Batch, key: jax.Array) -> tuple[tuple[jax.Array, jax.Array], Weights]:
        total = batch.loss_weights.sum()
        total = jnp.where(total > 0, total, 1.0)  # A batch of padding has no loss, and no gradient.
        gradient = jax.value_and_grad(loss, has_aux=True)
        if micro_batches == 1:
            return gradient(weights, batch, key if dropout else None, total)

        def add(sums: Any, part: tuple[jax.Array, Batch]) -> tuple[Any, None]:
            index, micro_batch = part
            micro_key = jax.random.fold_in(key, index) if dropout else None
            return jax.tree.map(jnp.add, sums, gradient(weights, micro_batch, micro_key, total)), None

        # Every A-th row, not every run of B / A rows: each device then keeps the rows it has.
        split = jax.tree.map(lambda a: a.reshape(-1, micro_batches, *a.shape[1:]).swapaxes(0, 1), batch)
        zeros = ((jnp.zeros(()), jnp.zeros(())), jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), weights))
        losses, total_gradient = jax.lax.scan(add, zeros, (jnp.arange(micro_batches), split))[0]
        return losses, jax.tree.map(lambda g, w: g.astype(w.dtype), total_gradient, weights)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        (trained, nll), gradient = gradients(state.weights, batch, jax.random.fold_in(state.key, state.step))
        gradient_norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(trained) & jnp.isfinite(gradient_norm)
        with jax.named_scope("optimizer"):
            updates, optimizer_state = rule.update(gradient, state.optimizer_state, state.weights)
            weights = optax.apply_updates(state.weights, updates)
        ema = state.ema
        if ema is not None:
            ema = ema_update(ema, weights, experiment.optimizer.ema_decay, state.step)
        weights, optimizer_state, ema = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (weights, optimizer_state, ema),
            (state.weights, state.optimizer_state, state.ema),
        )
        bad = (~finite).astype(jnp.int32)
        new = TrainState(
            step=state.step + 1,
            weights=weights,
            optimizer_state=optimizer_state,
            ema=ema,
            key=state.key,
            skipped=state.skipped + bad,
            skipped_in_a_row=(state.skipped_in_a_row + bad) * bad,
        )
        metrics = {
            "loss": trained,
            "nll": nll,
            "grad_norm": gradient_norm,
            "update_ratio": optax.tree.norm(updates) / optax.tree.norm(state.weights),
            "learning_rate": learning_rate(state.step - state.skipped),
            "loss_tokens": batch.loss_weights.sum(),
            "skipped": new.skipped,
            "skipped_in_a_row": new.skipped_in_a_row,
        }
        return new, metrics

    def evaluate(weights: Weights, batch: Batch) -> Metrics:
        _, nll = loss_sums(transformer.bind(graphdef, weights), batch, experiment, None)
        return {"nll_sum": nll, "loss_tokens": batch.loss_weights.sum()}

    abstract_state = _laid_out(jax.eval_shape(init, jax.random.key(0)), axes, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state)
    rows, everywhere = rules.sharding(mesh, ("batch", "sequence")), NamedSharding(mesh, PartitionSpec())
    return Program(
        init=jax.jit(init, out_shardings=shardings),
        step=jax.jit(
            step, in_shardings=(shardings, rows), out_shardings=(shardings, everywhere), donate_argnames="state"
        ),
        evaluate=jax.jit(evaluate, in_shardings=(shardings.weights, rows), out_shardings=everywhere),
        abstract_state=abstract_state,
        graphdef=graphdef,
    )


def _laid_out(state: TrainState, axes: Any, mesh: Mesh) -> TrainState:
    """The abstract state with a sharding on every leaf: a weight's by its axes, what belongs to a weight the same.

    The optimizer's leaves belong to the weight with whose path theirs ends, where the shape is that weight's too.
    """
    layout = rules.tree_shardings(mesh, axes)
    of_weight = {
        (jax.tree_util.keystr(path), weight.shape): sharding
        for (path, weight), sharding in zip(
            jax.tree_util.tree_leaves_with_path(state.weights), jax.tree.leaves(layout), strict=True
        )
    }

    def lay_out(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        endings = (jax.tree_util.keystr(path[start:]) for start in range(len(path)))
        found = (of_weight[end, leaf.shape] for end in endings if (end, leaf.shape) in of_weight)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=next(found, NamedSharding(mesh, PartitionSpec())))

    return jax.tree_util.tree_map_with_path(lay_out, state)

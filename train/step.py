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
from model.dropout import row_keys
from model.ring_attention import zigzag
from model.transformer import Transformer, Weights
from tpu import rules
from train.config import Experiment
from train.data.batch import Batch
from train.local_sgd import localize
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


def loss_sums(
    model: Transformer, axes: Any, batch: Batch, experiment: Experiment, keys: jax.Array | None
) -> tuple[jax.Array, ...]:
    """Sums over a batch of the trained loss and of the negative log-likelihood (nats); see `train.loss`.

    Args:
      axes: the logical axes of the model's weights.
      keys: [B] keys for dropout, or None.
    """
    devices = rules.devices_along("sequence")
    if devices > 1 and experiment.model.context_parallel == "ring":
        # Everything but the ring goes by segments and positions, not by the place in the row.
        order = zigzag(batch.tokens.shape[1], devices)
        # Rows are whole where they are put in order: inside a `shard_map` XLA cannot gather from such as are cut.
        whole = jax.tree.map(lambda a: rules.constrain(a, "batch", "positions"), batch)
        batch = jax.tree.map(lambda a: rules.constrain(a[:, order], "batch", "sequence"), whole)
    hidden, _ = model(batch.tokens, Place(batch.segments, batch.positions), key=keys)
    head_graph, head_weights = nnx.split(model.head)
    head_axes = {"embedding": axes["embedding"]} if experiment.model.tied_head else axes["head"]

    def head(weights: Weights, h: jax.Array) -> jax.Array:
        return nnx.merge(head_graph, nnx.State(weights))(h)

    with jax.named_scope("loss"):
        weights = nnx.to_pure_dict(head_weights)
        return cross_entropy(head, weights, head_axes, hidden, batch.targets, batch.loss_weights, experiment.loss)


def make_program(experiment: Experiment, mesh: Mesh) -> Program:
    """The jitted functions of an experiment that is `resolved` and whose model is `placed`; allocates nothing."""
    config = experiment.model
    graphdef, _, axes = transformer.build(config)
    learning_rate = schedule(experiment.optimizer, experiment.run.steps)
    rule = optimizer(experiment.optimizer, learning_rate, axes)
    micro_batches = experiment.optimizer.accumulation
    offload = experiment.optimizer.offload
    dropout = max(config.embedding_dropout, config.attention_dropout, config.residual_dropout) > 0

    def init(key: jax.Array) -> TrainState:
        init_key, run_key = jax.random.split(key)
        weights = transformer.init(config, init_key)
        ema = jax.tree.map(lambda w: w.astype(jnp.float32), weights) if experiment.optimizer.ema_decay else None
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, weights, rule.init(weights), ema, run_key, zero, zero)

    def loss(weights: Weights, batch: Batch, keys: jax.Array | None, total: jax.Array) -> tuple[jax.Array, jax.Array]:
        trained, nll = loss_sums(transformer.bind(graphdef, weights), axes, batch, experiment, keys)
        return trained / total, nll / total

    def gradients(weights: Weights, batch: Batch, key: jax.Array) -> tuple[tuple[jax.Array, jax.Array], Weights]:
        total = batch.loss_weights.sum()
        total = jnp.where(total > 0, total, 1.0)  # A batch of padding has no loss, and no gradient.
        keys = row_keys(key, batch.tokens.shape[0]) if dropout else None
        if config.platform != "cpu":  # Rounded before they are gathered, the weights take half the time to gather.
            weights = jax.tree_util.tree_map_with_path(rounded, weights)
        gradient = jax.value_and_grad(loss, has_aux=True)
        if micro_batches == 1:
            return gradient(weights, batch, keys, total)

        def add(sums: Any, part: tuple[Batch, jax.Array | None]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, gradient(weights, *part, total)), None

        # Every A-th row, not every run of B / A rows: each device then keeps the rows it has.
        split = jax.tree.map(lambda a: a.reshape(-1, micro_batches, *a.shape[1:]).swapaxes(0, 1), (batch, keys))
        zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), weights)
        zeros = jax.lax.with_sharding_constraint(zeros, gradient_layout)
        return jax.lax.scan(add, ((jnp.zeros(()), jnp.zeros(())), zeros), split)[0]

    def rounded(path: tuple, weight: jax.Array) -> jax.Array:
        return weight.astype(config.compute_dtype) if path[-1].key in ("kernel", "embedding") else weight

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        (trained, nll), gradient = gradients(state.weights, batch, jax.random.fold_in(state.key, state.step))
        gradient = jax.tree.map(lambda g, w: g.astype(w.dtype), gradient, state.weights)
        gradient = jax.lax.with_sharding_constraint(gradient, gradient_layout)
        old_optimizer_state = state.optimizer_state
        if offload:
            on_device = jax.tree.map(lambda s: s.with_memory_kind("device"), shardings.optimizer_state)
            old_optimizer_state = jax.device_put(old_optimizer_state, on_device)
        gradient_norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(trained) & jnp.isfinite(gradient_norm)
        with jax.named_scope("optimizer"):
            updates, optimizer_state = rule.update(gradient, old_optimizer_state, state.weights)
            weights = optax.apply_updates(state.weights, updates)
        ema = state.ema
        if ema is not None:
            ema = ema_update(ema, weights, experiment.optimizer.ema_decay, state.step)
        weights, optimizer_state, ema = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (weights, optimizer_state, ema),
            (state.weights, old_optimizer_state, state.ema),
        )
        if offload:
            optimizer_state = jax.device_put(optimizer_state, shardings.optimizer_state)
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
        _, nll = loss_sums(transformer.bind(graphdef, weights), axes, batch, experiment, None)
        return {"nll_sum": nll, "loss_tokens": batch.loss_weights.sum()}

    abstract_state = _laid_out(jax.eval_shape(lambda: init(jax.random.key(0))), axes, mesh, experiment)
    in_parts = rules.tree_shardings(mesh, axes, abstract_state.weights)
    if experiment.optimizer.local_steps:
        init, step, abstract_state = localize(init, step, abstract_state, in_parts, experiment.optimizer)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state)
    gradient_layout = jax.tree.map(lambda s: s.spec, shardings.weights if experiment.mesh.zero == 1 else in_parts)
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


def _laid_out(state: TrainState, axes: Any, mesh: Mesh, experiment: Experiment) -> TrainState:
    """The abstract state with a sharding on every leaf: a weight's by its axes, what belongs to a weight the same.

    The optimizer's leaves belong to the weight with whose path theirs ends, where the shape is that weight's too. Under
    ZeRO stages 1 and 2 the weights themselves stay whole along fsdp, and only what belongs to them lies in parts.
    """
    weights = rules.tree_shardings(mesh, axes, state.weights, experiment.mesh.zero)
    in_parts = rules.tree_shardings(mesh, axes, state.weights)
    of_weight = {
        (jax.tree_util.keystr(path), weight.shape): sharding
        for (path, weight), sharding in zip(
            jax.tree_util.tree_leaves_with_path(state.weights), jax.tree.leaves(in_parts), strict=True
        )
    }

    def lay_out(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        endings = (jax.tree_util.keystr(path[start:]) for start in range(len(path)))
        found = (of_weight[end, leaf.shape] for end in endings if (end, leaf.shape) in of_weight)
        sharding = next(found, NamedSharding(mesh, PartitionSpec()))
        if experiment.optimizer.offload and path[0].name == "optimizer_state" and leaf.shape:
            sharding = sharding.with_memory_kind("pinned_host")
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    laid_out = jax.tree_util.tree_map_with_path(lay_out, state)
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
    return laid_out._replace(weights=jax.tree.map(place, state.weights, weights))

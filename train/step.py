"""The language-modelling step: a pure function (state, batch) -> (state, metrics), and what it needs to start.

The loss is the sum over all tokens divided by the global sum of loss weights, so that splitting a batch into
micro-batches, packing, and the shape of the mesh never change it.

Legend: B rows, T tokens per row, A micro-batches.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from model import kinds
from model.attention.memory import Memory, empty_memory
from model.attention.ring_attention import zigzag
from model.bert import Bert
from model.dropout import row_keys
from model.encoder_decoder import EncoderDecoder
from model.fusion.contrastive import Contrastive
from model.place import Place
from model.transformer import Transformer
from model.vision.image_classifier import ImageClassifier
from model.vision.images import Images
from model.weights import Weights, bind, rounded
from tpu import rules
from tpu.errors import UserError
from train.adapter import weights as adapter_weights
from train.config import Experiment
from train.data.batch import BY_TOKEN, Batch
from train.losses.contrastive import contrastive_sums
from train.losses.cross_entropy import cross_entropy
from train.losses.labels import label_sums
from train.objectives.table import LABEL_HEADS, SCORED
from train.optimize.balance import Routings, balance_figures, balance_loss, loads, rebalanced, router_z_loss
from train.optimize.local_sgd import localize
from train.optimize.optimizer import ema_update, optimizer
from train.optimize.schedule import schedule
from train.state import Metrics, TrainState


class Program(NamedTuple):
    """What an experiment compiles to. Call the functions inside `with jax.set_mesh(mesh)`.

    With an adapter the weights of the state are those that it trains, and every function takes the frozen ones as one
    more, last argument, until `over` has given them to all.
    """

    init: Callable[..., TrainState]  # (key), or (key, weights) to begin with weights that are there already
    step: Callable[..., tuple[TrainState, Metrics]]  # (state, batch)
    evaluate: Callable[..., dict[str, Any]]  # (weights, batch), and a `memory`, which it gives back, where there is one
    abstract_state: TrainState  # jax.ShapeDtypeStruct leaves that carry their sharding
    graphdef: nnx.GraphDef
    empty_memory: Callable[[], Memory | None]  # of data.batch_size rows; None where the model remembers nothing
    abstract_base: Weights | None = None  # frozen weights, where there is an adapter

    def over(self, base: Weights) -> Program:
        """The same functions over these frozen weights, without that argument."""
        return self._replace(
            init=lambda key: self.init(key, base),
            step=lambda state, batch: self.step(state, batch, base),
            evaluate=lambda weights, batch, memory=None: self.evaluate(weights, batch, memory, base),
        )


class Sums(NamedTuple):
    """Sums over a batch, float32 scalars: `by_row` to be divided by the rows, the rest by the loss weights."""

    trained: jax.Array  # the loss that is trained
    nll: jax.Array  # negative log-likelihood (nats), or what stands for it (`train.losses.labels`)
    by_row: jax.Array | float = 0.0  # next-sentence prediction
    correct: jax.Array | float = 0.0  # right labels
    routings: Routings | None = None  # what the routers of mixtures of experts did
    memory: Memory | None = None  # after the batch


def abstract_batch(experiment: Experiment) -> Batch:
    """The shapes and dtypes of the batches that an experiment trains on, as jax.ShapeDtypeStruct."""
    data, model, objective = experiment.data, experiment.model, experiment.objective
    rows, tokens, inputs = data.batch_size, data.context, data.context
    if objective.name == "span_corruption":
        noise, spans = objective.spans(data.context)
        tokens, inputs = noise + spans + 1, data.context - noise + spans
    elif objective.name == "sequence_to_sequence":
        tokens = data.target_context or data.context
    elif objective.name == "image_classification":
        tokens = 1
    sees, merges = model.vision.encoder != "none", model.fusion not in ("none", "contrastive")
    count = data.images if merges else 1
    sides = model.vision.sides
    native = sees and data.image_fit == "native"
    if native:
        count, sides = data.patches, (model.vision.patch_size,) * 2
    of_image = jax.ShapeDtypeStruct((rows, count, *sides, model.vision.channels), jnp.uint8)

    def integers(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    whole = integers(rows, tokens)
    in_numbers = objective.name in ("regression", "multi_label", "span")
    return Batch(
        tokens=whole,
        targets=jax.ShapeDtypeStruct((rows, tokens, model.labels), jnp.float32) if in_numbers else whole,
        loss_weights=jax.ShapeDtypeStruct((rows, tokens), jnp.float32),
        segments=whole,
        positions=whole,
        token_types=whole if data.pair_field or model.next_sentence else None,
        next_sentence=integers(rows, 1) if model.next_sentence else None,
        inputs=integers(rows, inputs) if model.kind == "encoder_decoder" else None,
        input_segments=integers(rows, inputs) if model.kind == "encoder_decoder" else None,
        images=of_image if sees else None,
        image_segments=integers(rows, count) if sees else None,
        image_positions=integers(rows, count, 2) if native else None,
        image_slots=whole if merges else None,
        images_seen=whole if merges else None,
        rope_positions=integers(rows, tokens, 3) if merges and model.rope_sections else None,
        given=whole if merges else None,
    )


def batch_layout(experiment: Experiment, mesh: Mesh) -> Batch:
    """How batches lie on a mesh: all by rows, and what a row has for each of its tokens along the sequence too."""
    by_token, by_row = (rules.sharding(mesh, names) for names in (("batch", "sequence"), ("batch",)))
    return Batch(
        **{
            name: None if leaf is None else by_token if name in BY_TOKEN else by_row
            for name, leaf in abstract_batch(experiment)._asdict().items()
        }
    )


def loss_sums(
    model: Transformer | Bert | EncoderDecoder,
    axes: Any,
    batch: Batch,
    experiment: Experiment,
    keys: jax.Array | None,
    memory: Memory | None = None,
) -> Sums:
    """The sums of a batch under an experiment's objective; see `train.losses.cross_entropy` and `train.losses.labels`.

    Args:
      axes: the logical axes of the model's weights.
      keys: [B] keys for dropout, or None.
      memory: of the rows before, or None.
    """
    devices = rules.devices_along("sequence")
    if devices > 1 and experiment.model.context_parallel == "ring":
        # Everything but the ring goes by segments and positions, not by the place in the row.
        order = zigzag(batch.tokens.shape[1], devices)
        # Rows are whole where they are put in order: inside a `shard_map` XLA cannot gather from such as are cut.
        by_token = {name: array for name in BY_TOKEN if (array := getattr(batch, name)) is not None}
        whole = jax.tree.map(lambda a: rules.constrain(a, "batch", "positions"), by_token)
        batch = batch._replace(**jax.tree.map(lambda a: rules.constrain(a[:, order], "batch", "sequence"), whole))
    extra = {name: getattr(batch, name) for name in ("token_types", "inputs", "input_segments")}
    extra = {name: array for name, array in extra.items() if array is not None}
    place, routings = Place(batch.segments, batch.positions), {}
    if experiment.objective.name in ("contrastive", "image_classification"):
        return _image_sums(model, batch, place, experiment)
    if experiment.model.kind == "decoder":
        images = None
        if batch.images is not None:
            by_token = batch.image_slots, batch.images_seen, batch.given
            images = Images(batch.images, batch.image_segments, *by_token, batch.image_positions)
        turned = batch.rope_positions
        hidden, memory, routings = model.routed(batch.tokens, place, memory, keys, positions=turned, images=images)
    else:
        hidden, _ = model(batch.tokens, place, key=keys, **extra)
    if experiment.objective.name in LABEL_HEADS:
        with jax.named_scope("loss"):
            name, logits = experiment.objective.name, model.head(hidden)
            loss, correct = label_sums(name, logits, batch.targets, batch.loss_weights)
            return Sums(loss, loss, correct=correct, routings={})
    by_row = 0.0
    if batch.next_sentence is not None:
        first = model.next_sentence(hidden[:, :1])  # [B, 1, 2]
        by_row, _ = label_sums("classification", first, batch.next_sentence, jnp.ones(first.shape[:2]))
    head_graph, head_weights = nnx.split(model.head)
    head_axes = axes.get("head", {}) | ({"embedding": axes["embedding"]} if experiment.model.tied_head else {})

    def head(weights: Weights, h: jax.Array) -> jax.Array:
        return nnx.merge(head_graph, nnx.State(weights))(h)

    with jax.named_scope("loss"):
        weights = nnx.to_pure_dict(head_weights)
        targets = batch.targets, batch.loss_weights
        sums = cross_entropy(head, weights, head_axes, hidden, *targets, experiment.loss)
    return Sums(*sums, by_row, routings=routings, memory=memory)


def _image_sums(model: Contrastive | ImageClassifier, batch: Batch, place: Place, experiment: Experiment) -> Sums:
    """The sums of objectives that take one image a row, and weigh its first token."""
    weights, images = batch.loss_weights[:, :1], batch.images[:, 0]
    if experiment.objective.name == "contrastive":
        logits = model.logits(model.images(images), model.texts(batch.tokens, place))
        with jax.named_scope("loss"):
            loss, correct = contrastive_sums(logits, weights[:, 0], experiment.model.vision.similarity)
    else:
        logits = model(images)[:, None]
        with jax.named_scope("loss"):
            loss, correct = label_sums("classification", logits, batch.targets[:, :1], weights)
    return Sums(loss, loss, correct=correct, routings={})


def make_program(experiment: Experiment, mesh: Mesh) -> Program:
    """The jitted functions of an experiment that is `resolved` and whose model is `placed`; allocates nothing."""
    config, adapter = experiment.model, experiment.adapter
    graphdef, abstract, model_axes = kinds.build(config)
    frozen_here = frozen_mask(abstract, experiment.optimizer.frozen)
    parts = adapter_weights.parts(adapter, config) if adapter.kind != "none" else None
    axes = parts.trained_axes if parts else model_axes
    learning_rate = schedule(experiment.optimizer, experiment.run.steps)
    micro_batches = experiment.optimizer.accumulation
    offload, any_frozen = experiment.optimizer.offload, bool(experiment.optimizer.frozen)
    rule = optimizer(experiment.optimizer, learning_rate, axes, frozen_here if any_frozen else None)
    dropout = max(config.embedding_dropout, config.attention_dropout, config.residual_dropout, adapter.dropout) > 0

    def init(key: jax.Array, given: Weights | None = None) -> TrainState:
        init_key, run_key = jax.random.split(key)
        if parts:
            weights = adapter_weights.init(adapter, config, init_key, given)
        else:
            weights = kinds.init(config, init_key) if given is None else given
        ema = jax.tree.map(lambda w: w.astype(jnp.float32), weights) if experiment.optimizer.ema_decay else None
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, weights, rule.init(weights), ema, run_key, zero, zero, first_memory())

    def first_memory() -> Memory | None:
        return empty_memory(config, experiment.data.batch_size) if config.remembers else None

    def kept(new: Weights, old: Weights) -> Weights:
        """The new weights, and of those that are frozen the old."""
        return jax.tree.map(lambda still, n, o: o if still else n, frozen_here, new, old) if any_frozen else new

    def model_of(weights: Weights, base: Weights | None, keys: jax.Array | None) -> Any:
        weights = kept(weights, jax.tree.map(jax.lax.stop_gradient, weights))
        return bind(graphdef, adapter_weights.combined(adapter, base, weights, keys) if parts else weights)

    def loss(weights: Weights, base: Weights | None, part: Any, of_all: Any) -> tuple[jax.Array, Any]:
        """A part of a batch's share in its loss, and ((share of the nll, what the routers did), memory).

        `part` is (batch, keys for dropout, memory); `of_all` is what must be known of the whole: sum of loss weights,
        tokens, and the experts' loads, or None where the part is the whole.
        """
        batch, keys, memory = part
        total, tokens, load = of_all
        sums = loss_sums(model_of(weights, base, keys), model_axes, batch, experiment, keys, memory)
        trained = sums.trained / total + sums.by_row / experiment.data.batch_size
        if experiment.loss.balance_loss:
            load = loads(sums.routings) if load is None else load
            trained += experiment.loss.balance_loss * balance_loss(sums.routings, load, tokens)
        if experiment.loss.router_z_loss:
            trained += experiment.loss.router_z_loss * router_z_loss(sums.routings, tokens)
        return trained, ((sums.nll / total, sums.routings), sums.memory)

    def gradients(
        weights: Weights, base: Weights | None, batch: Batch, key: jax.Array, memory: Memory | None
    ) -> tuple[tuple[jax.Array, Any], Weights, Memory | None]:
        total = batch.loss_weights.sum()
        total = jnp.where(total > 0, total, 1.0)  # A batch of padding has no loss, and no gradient.
        tokens = jnp.sum(batch.segments > 0, dtype=jnp.float32)
        keys = row_keys(key, batch.tokens.shape[0]) if dropout else None
        if config.platform != "cpu":  # Rounded before they are gathered, the weights take half the time to gather.
            weights, base = (rounded(tree, config.compute_dtype) for tree in (weights, base))
        gradient = jax.value_and_grad(loss, has_aux=True)
        if micro_batches == 1:
            (trained, (figures, memory)), summed = gradient(weights, base, (batch, keys, memory), (total, tokens, None))
            return (trained, figures), summed, memory

        # Every A-th row, not every run of B / A rows: each device then keeps the rows it has.
        split = jax.tree.map(lambda a: a.reshape(-1, micro_batches, *a.shape[1:]).swapaxes(0, 1), (batch, keys, memory))
        load = None
        if experiment.loss.balance_loss:
            # The gradient of the first micro-batch depends on the load of all: a forward pass to count it.
            def counted(part: Any) -> jax.Array:
                _, ((_, routings), _) = loss(weights, base, part, (total, tokens, None))
                return loads(routings)

            load = jax.lax.map(counted, split).sum(0)

        def add(sums: Any, part: Any) -> tuple[Any, Memory | None]:
            (trained, (figures, memory)), one = gradient(weights, base, part, (total, tokens, load))
            return jax.tree.map(jnp.add, sums, ((trained, figures), one)), memory

        first = jax.tree.map(lambda a: a[0], split)
        trained, (figures, _) = jax.eval_shape(loss, weights, base, first, (total, tokens, load))
        zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), weights)
        zeros = jax.lax.with_sharding_constraint(zeros, gradient_layout)
        start = jax.tree.map(lambda f: jnp.zeros(f.shape, f.dtype), (trained, figures)), zeros
        (figures, summed), memory = jax.lax.scan(add, start, split)
        return figures, summed, jax.tree.map(lambda a: a.swapaxes(0, 1).reshape(-1, *a.shape[2:]), memory)

    def step(state: TrainState, batch: Batch, base: Weights | None = None) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        (trained, (nll, routings)), gradient, memory = gradients(state.weights, base, batch, key, state.memory)
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
            updates = kept(updates, jax.tree.map(jnp.zeros_like, updates))
            weights = optax.apply_updates(state.weights, updates)
        if config.router_bias:
            weights = rebalanced(weights, state.weights, routings, experiment.optimizer.router_bias_rate)
        weights = kept(weights, state.weights)
        ema = state.ema
        if ema is not None:
            ema = ema_update(ema, weights, experiment.optimizer.ema_decay, state.step)
        weights, optimizer_state, ema, memory = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (weights, optimizer_state, ema, memory),
            (state.weights, old_optimizer_state, state.ema, state.memory),
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
            memory=memory,
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
        } | (balance_figures(routings) if routings else {})
        return new, metrics

    def evaluate(weights: Weights, batch: Batch, memory: Memory | None, base: Weights | None) -> dict[str, Any]:
        sums = loss_sums(model_of(weights, base, None), model_axes, batch, experiment, None, memory)
        figures = {"nll_sum": sums.nll, "loss_tokens": batch.loss_weights.sum()}
        figures |= {"correct_sum": sums.correct} if experiment.objective.name in SCORED else {}
        return figures if memory is None else figures | {"memory": sums.memory}

    frozen: tuple[Any, ...] = ()  # with an adapter, the one more argument of the functions
    if parts:
        layout = rules.tree_shardings(mesh, parts.base_axes, parts.base, experiment.mesh.zero)
        frozen = (jax.tree.map(_with_sharding, parts.base, layout),)
    abstract_state = _laid_out(
        jax.eval_shape(lambda *base: init(jax.random.key(0), *base), *frozen), axes, mesh, experiment
    )
    in_parts = rules.tree_shardings(mesh, axes, abstract_state.weights)
    if experiment.optimizer.local_steps:
        init, step, abstract_state = localize(init, step, abstract_state, in_parts, experiment.optimizer)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state)
    gradient_layout = jax.tree.map(lambda s: s.spec, shardings.weights if experiment.mesh.zero == 1 else in_parts)
    rows, everywhere = batch_layout(experiment, mesh), NamedSharding(mesh, PartitionSpec())
    below = jax.tree.map(lambda leaf: leaf.sharding, frozen)
    evaluated = jax.jit(evaluate, in_shardings=(shardings.weights, rows, shardings.memory, *(below or (None,))))
    return Program(
        init=jax.jit(init, out_shardings=shardings),
        step=jax.jit(
            step, in_shardings=(shardings, rows, *below), out_shardings=(shardings, everywhere), donate_argnames="state"
        ),
        evaluate=lambda weights, batch, memory=None, base=None: evaluated(weights, batch, memory, base),
        abstract_state=abstract_state,
        graphdef=graphdef,
        empty_memory=jax.jit(first_memory, out_shardings=shardings.memory),
        abstract_base=frozen[0] if parts else None,
    )


def frozen_mask(weights: Weights, patterns: tuple[str, ...]) -> Any:
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
        if path[0].name == "memory":
            along = rules.sharding(mesh, ("batch",) + ("positions",) * (len(leaf.shape) - 1), leaf.shape)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=along)
        endings = (jax.tree_util.keystr(path[start:]) for start in range(len(path)))
        found = (of_weight[end, leaf.shape] for end in endings if (end, leaf.shape) in of_weight)
        sharding = next(found, NamedSharding(mesh, PartitionSpec()))
        if experiment.optimizer.offload and path[0].name == "optimizer_state" and leaf.shape:
            sharding = sharding.with_memory_kind("pinned_host")
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    laid_out = jax.tree_util.tree_map_with_path(lay_out, state)
    return laid_out._replace(weights=jax.tree.map(_with_sharding, state.weights, weights))


def _with_sharding(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

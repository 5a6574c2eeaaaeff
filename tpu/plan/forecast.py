"""What a layout costs, by arithmetic alone: a rough model that ranks thousands of layouts in seconds.

Bytes and operations follow from shapes; seconds from the chip's public figures and two shares:

- PRODUCTS of the peak is what libtpu's own estimates give matrix products, norms and activations around them together
  (0.74 to 0.78 over the compiled rows of docs/pods.md);
- EXPOSED of the network's time is taken not to hide behind products;
- RING_UTILISATION of the peak is what libtpu's estimates give ring attention, which is no kernel.

The compiler has the last word (`tpu.plan` asks it about the best few). Counted per device, in bfloat16 with float32
state. Legend: D embed_dim, H heads, G kv_heads, K head_dim, M mlp_dim, V vocab_size, L layers, S stages, R repeats.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from model.config import ModelConfig
from model.fields.shape import GATED
from tpu.chips import Topology
from tpu.compile.hlo_collectives import Collective
from tpu.compile.roofline import KERNEL_UTILISATION, collective_seconds
from tpu.pipeline import bubble_fraction
from tpu.rules import ZERO_AXES
from train.config import Experiment

PRODUCTS = 0.77
EXPOSED = 0.5
RING_UTILISATION = 0.07
LOGITS_BYTES = 1.5 * 2**29  # a chunk of logits and its gradient (train.losses.cross_entropy)


@dataclasses.dataclass
class Forecast:
    """One step of one layout, per device."""

    arguments: int  # bytes of weights, optimizer state and moving average
    temporary: int  # bytes of everything else
    flops: int  # of products, rematerialised ones and the bubble's included
    compute: float  # seconds, the bubble included
    network: dict[str, float]  # seconds by mesh axis
    collectives: list[Collective]

    @property
    def step(self) -> float:
        """Expected seconds of a step."""
        network = sum(self.network.values())
        return self.compute + EXPOSED * network + max(0.0, (1 - EXPOSED) * network - self.compute)

    @property
    def limit(self) -> str:
        """What takes the most: compute or the network of an axis."""
        axis = max(self.network, key=self.network.get, default="")
        return "compute" if not axis or self.compute >= self.network[axis] else f"{axis} network"


def forecast(experiment: Experiment, topology: Topology, mesh: Any, trained: float = 1.0) -> Forecast:
    """The forecast of an experiment that is decided (`Experiment.on`) for the devices of a jax mesh on `topology`.

    trained: the share of the weights that is not frozen (`train.budget.summary.trained_share`): for the others there is
    no gradient and no state. Seconds are those of training all.
    """
    model, sizes = experiment.model, experiment.mesh
    chip = topology.chip
    groups = _Sizes(experiment)
    layer, table = layer_weights(model), model.vocab_size * model.embed_dim
    tables = table * (1 if model.tied_head else 2)
    if model.positions == "learned":
        tables += model.max_positions * model.embed_dim
    own = layer * model.layers / (sizes.tensor * sizes.stage)  # weights of the layers whose work a device does

    again = recomputed(model)
    bubble = bubble_fraction(sizes.stage, groups.repeats, groups.microbatches) if sizes.stage > 1 else 0.0
    products = groups.tokens * own * (6 + 2 * again) / (1 - bubble)
    products += 6 * groups.tokens * table / (sizes.tensor * sizes.stage)
    seen = sum(
        experiment.data.context / 2 if k == "global" else model.keys_seen(k, experiment.data.context)
        for k in model.pattern
    )
    keys = seen / len(model.pattern)
    kernels = groups.tokens * model.layers / sizes.stage * 2 * model.heads * model.head_dim / sizes.tensor * keys
    kernels *= (7 + (0 if model.remat in ("none", "attention", "projections") else 2)) / (1 - bubble)
    peak = chip.peak_flops / chip.devices
    ring = sizes.sequence > 1 and model.context_parallel == "ring"
    compute = products / (peak * PRODUCTS) + kernels / (peak * (RING_UTILISATION if ring else KERNEL_UTILISATION))

    # Along the whole of a slice the TPU compiler does not scatter: it sums everything and keeps a part. If that slice
    # has three dimensions it does not gather either: it sums what lies between zeros.
    scatter = "all-reduce" if groups.shards == topology.devices else "reduce-scatter"
    gather = "all-reduce" if groups.shards == topology.devices and chip.torus == 3 else "all-gather"
    collectives = _collectives(experiment, groups, own, tables, gather, scatter)
    network: dict[str, float] = {}
    for row in collectives:
        network[row.axis] = network.get(row.axis, 0.0) + collective_seconds(row, topology, mesh)
    arguments, temporary = _memory(experiment, groups, layer, own, table, tables, gather, trained)
    return Forecast(arguments, temporary, int(products), compute, network, collectives)


def layer_weights(model: ModelConfig) -> float:
    """Weights of one layer's matrices that a token meets; the mean of layers where some are mixtures of experts."""
    attention = (2 * model.heads + 2 * model.kv_heads) * model.head_dim * model.embed_dim
    return attention + _projections(model) * model.embed_dim * mlp_columns(model)


def idle_weights(model: ModelConfig) -> float:
    """Weights of one layer's experts that a token does not meet; the mean of layers."""
    others = (model.experts - model.experts_per_token) * model.expert_dim * _mixtures(model)
    return _projections(model) * model.embed_dim * others


def mlp_columns(model: ModelConfig) -> float:
    """Columns of the feed-forward blocks that a token meets in one layer; the mean of layers."""
    mixtures = _mixtures(model)
    met = (model.experts_per_token + model.shared_experts) * model.expert_dim
    return mixtures * met + (1 - mixtures) * model.mlp_dim


def _mixtures(model: ModelConfig) -> float:
    return sum(map(model.mixes, range(len(model.pattern)))) / len(model.pattern)


def _projections(model: ModelConfig) -> int:
    return 3 if model.activation in GATED else 2


def recomputed(model: ModelConfig) -> float:
    """The share of a layer's products that the backward pass does again, by `model.remat`."""
    layer = layer_weights(model)
    last = model.embed_dim * mlp_columns(model)  # the last product is never needed again
    into_mlp = layer - (2 * model.heads + 2 * model.kv_heads) * model.head_dim * model.embed_dim - last
    queries = (model.heads + 2 * model.kv_heads) * model.head_dim * model.embed_dim
    return {
        "full": layer - last,
        "attention": layer - last,
        "all_but_mlp": into_mlp,
        "offload_projections": layer - last - queries,
    }.get(model.remat, 0) / layer


def saved_per_token(model: ModelConfig, tensor: int) -> float:
    """Bytes that the forward pass of one layer saves for one token on one device of `tensor`."""
    parts = 2 if model.activation in GATED else 1
    heads = (model.heads + 2 * model.kv_heads) * model.head_dim
    attended, mlp = model.heads * model.head_dim, parts * mlp_columns(model)
    numbers = {
        "full": 0,
        "offload_projections": 0,
        "attention": attended,
        "all_but_mlp": heads + model.embed_dim,
        "projections": heads + attended + model.embed_dim + mlp,
    }.get(model.remat, heads + attended + 4 * model.embed_dim + 2 * mlp)
    return 2 * (model.embed_dim + numbers) / tensor


class _Sizes:
    """What a device works on."""

    def __init__(self, experiment: Experiment):
        sizes, model = experiment.mesh, experiment.model
        self.accumulation = experiment.optimizer.accumulation
        self.shards = sizes.fsdp * sizes.expert * sizes.sequence  # that ZeRO cuts weights into
        rows = experiment.data.batch_size / (sizes.data * sizes.fsdp * sizes.expert)
        self.tokens = rows * experiment.data.context / sizes.sequence  # of a step, per tensor group
        self.repeats = model.pipeline_repeats
        self.microbatches = (model.pipeline_microbatches or sizes.stage) if sizes.stage > 1 else 1
        self.ticks = self.microbatches * self.repeats + sizes.stage - 1 if sizes.stage > 1 else 1
        self.at_once = self.tokens / self.accumulation / self.microbatches  # tokens in a layer at one time


def _memory(
    experiment: Experiment,
    groups: _Sizes,
    layer: int,
    own: float,
    table: int,
    tables: int,
    gather: str,
    trained: float,
) -> tuple[int, int]:
    model, sizes = experiment.model, experiment.mesh
    shards = groups.shards
    states = {"adamw": 2, "muon": 2, "adafactor": 0.01}.get(experiment.optimizer.name, 1) * trained
    states += 1 if experiment.optimizer.ema_decay else 0
    spread = tables / (shards * sizes.tensor * sizes.stage)
    idle = idle_weights(model)
    held = own + idle * model.layers / (sizes.tensor * sizes.stage)
    in_parts = held / shards + spread
    whole = in_parts if sizes.zero == 3 else held + tables / (sizes.tensor * sizes.stage)
    arguments = 4 * whole + 4 * states * in_parts
    gradients = 2 * trained * (in_parts if sizes.zero == 3 else held) * (2 if groups.accumulation > 1 else 1)
    rounded = 2 * whole
    layers = model.layers / sizes.stage
    # A pipeline saves what every tick reads; without one, every micro-batch of an accumulation is done before the next.
    kept = groups.at_once * layers * saved_per_token(model, sizes.tensor) * groups.ticks / groups.repeats
    mlp = mlp_columns(model) * _projections(model)
    working = 2 * groups.at_once * (4 * model.embed_dim + (mlp + 4 * model.heads * model.head_dim) / sizes.tensor)
    copies = 3 if gather == "all-reduce" else 2  # of a layer's gathered weights; zeros take as much again
    gathered = 2 * copies * (layer + idle / sizes.expert) / sizes.tensor if shards > 1 and sizes.zero == 3 else 0
    stages = 6 * 2 * groups.tokens / groups.accumulation * model.embed_dim / sizes.tensor if sizes.stage > 1 else 0
    head = 6 * table + LOGITS_BYTES
    return int(arguments), int(gradients + rounded + kept + max(working + gathered, head) + stages)


def _collectives(
    experiment: Experiment, groups: _Sizes, own: float, tables: int, gather: str, scatter: str
) -> list[Collective]:
    """What a device gathers, sums and passes on in a step; bytes as `tpu.compile.hlo_collectives` counts them.

    `gather` and `scatter` are the kinds of collective that do this for the shards of ZeRO.
    """
    model, sizes = experiment.model, experiment.mesh
    rows: list[Collective] = []

    def add(kind: str, axes: tuple[str, ...], bytes_: float, count: float = 1, network: str = "ici") -> None:
        axes = tuple(axis for axis in axes if getattr(sizes, axis) > 1)
        if axes and bytes_:
            size = math.prod(getattr(sizes, axis) for axis in axes)
            rows.append(Collective(kind, "+".join(axes), size, network, 1, int(count), int(bytes_)))

    passes = groups.accumulation * groups.ticks / groups.repeats
    if model.experts:
        # Of the experts a device gathers its own alone, and all it sums is counted as if it were so too.
        met = (model.experts_per_token * _mixtures(model)) * model.expert_dim * _projections(model) * model.embed_dim
        own += ((met + idle_weights(model)) / sizes.expert - met) * model.layers / (sizes.tensor * sizes.stage)
        slots = groups.tokens * model.experts_per_token * (model.capacity_factor or 1)
        moved = 2 * slots * model.embed_dim * model.layers * _mixtures(model) / sizes.stage
        add("all-to-all", ("expert",), moved * (4 if recomputed(model) == 0 else 6), 6 * model.layers)
    if sizes.zero == 3:
        add(gather, ZERO_AXES, 2 * 2 * own * passes + 2 * tables, 2 * model.layers * passes)
        add(scatter, ZERO_AXES, 2 * own * passes + 2 * tables, model.layers * passes)
    else:
        add("all-reduce" if sizes.zero == 1 else "reduce-scatter", ZERO_AXES, 2 * own + 2 * tables, model.layers)
        add("all-gather", ZERO_AXES, 4 * own + 4 * tables, model.layers)
    parts = groups.shards if sizes.zero > 1 else 1
    inner = sizes.data // sizes.slices if sizes.slice_axis == "data" else sizes.data
    if inner > 1:
        rows.append(Collective("all-reduce", "data", inner, "ici", 1, 1, int((2 * own + 2 * tables) / parts)))
    if sizes.slices > 1 and sizes.slice_axis == "data":
        rows.append(Collective("all-reduce", "data", sizes.slices, "dcn", 1, 1, int((2 * own + 2 * tables) / parts)))
    if sizes.tensor > 1:
        forward_again = 0 if recomputed(model) == 0 else 1
        moved = 2 * groups.tokens * model.embed_dim * model.layers / sizes.stage
        add("all-gather", ("tensor",), moved * (4 + 2 * forward_again), 4 * model.layers)
        add("reduce-scatter", ("tensor",), moved * (4 + forward_again), 4 * model.layers)
    if sizes.sequence > 1:
        layers = model.layers / sizes.stage
        block = 2 * 2 * groups.tokens * model.kv_heads * model.head_dim / sizes.tensor * layers
        if model.context_parallel == "ring":
            add("collective-permute", ("sequence",), block * (sizes.sequence - 1) * 5, 5 * layers)
        else:
            heads = 2 * groups.tokens * model.heads * model.head_dim / sizes.tensor * layers
            add("all-to-all", ("sequence",), 3 * (2 * heads + block), 12 * layers)
    if sizes.stage > 1:
        h = 2 * groups.at_once * model.embed_dim / sizes.tensor
        slow = sizes.slices > 1 and sizes.slice_axis == "stage"
        add("collective-permute", ("stage",), 2 * h * groups.ticks, 2 * groups.ticks, "dcn" if slow else "ici")
    return rows

"""How batches, states and frozen weights lie on a mesh; all of it follows from the logical axes that they declare."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from model.attention.ring_attention import zigzag
from tpu import rules
from train.config import Experiment
from train.data.batch import Batch, Layout
from train.objectives.table import objective_of
from train.state import TrainState


def layout_of(experiment: Experiment) -> Layout:
    """The batch that the experiment's objective declares."""
    return objective_of(experiment).layout(experiment)


def abstract_batch(experiment: Experiment) -> Batch:
    """The shapes and dtypes of the batches that an experiment trains on, as jax.ShapeDtypeStruct."""
    return {name: jax.ShapeDtypeStruct(f.shape, f.dtype) for name, f in layout_of(experiment).items()}


def batch_layout(experiment: Experiment, mesh: Mesh) -> dict[str, NamedSharding]:
    """How batches lie on a mesh."""
    return {name: rules.sharding(mesh, field.axes) for name, field in layout_of(experiment).items()}


def in_ring_order(batch: Batch, layout: Layout, experiment: Experiment) -> Batch:
    """The batch with what it has by token in the order of ring attention, where the mesh in use cuts rows for it.

    Everything but the ring goes by segments and positions, not by the place in the row.
    """
    devices = rules.devices_along("sequence")
    if devices == 1 or experiment.model.context_parallel != "ring":
        return batch

    def ordered(name: str, array: jax.Array) -> jax.Array:
        axes = layout[name].axes
        if "sequence" not in axes:
            return array
        # Rows are whole where they are put in order: inside a `shard_map` XLA cannot gather from such as are cut.
        whole = rules.constrain(array, *("positions" if axis == "sequence" else axis for axis in axes))
        dimension = axes.index("sequence")
        order = zigzag(array.shape[dimension], devices)
        return rules.constrain(whole[(slice(None),) * dimension + (order,)], *axes)

    return {name: ordered(name, array) for name, array in batch.items()}


def state_layout(state: TrainState, axes: Any, mesh: Mesh, experiment: Experiment) -> TrainState:
    """The abstract state with a sharding on every leaf: a weight's by its axes, what belongs to a weight the same.

    The optimizer's leaves belong to the weight with whose path theirs ends, where the shape is that weight's too. Under
    ZeRO stages 1 and 2 the weights themselves stay whole along fsdp, and only what belongs to them lies in parts. What
    the objective carries is cut by rows.
    """
    in_parts = rules.tree_shardings(mesh, axes, state.weights)
    of_weight = {
        (jax.tree_util.keystr(path), weight.shape): sharding
        for (path, weight), sharding in zip(
            jax.tree_util.tree_leaves_with_path(state.weights), jax.tree.leaves(in_parts), strict=True
        )
    }

    def lay_out(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if path[0].name == "carried":
            names = (("batch",) + ("positions",) * len(leaf.shape))[: len(leaf.shape)]
            return with_sharding(leaf, rules.sharding(mesh, names, leaf.shape))
        endings = (jax.tree_util.keystr(path[start:]) for start in range(len(path)))
        found = (of_weight[end, leaf.shape] for end in endings if (end, leaf.shape) in of_weight)
        sharding = next(found, NamedSharding(mesh, PartitionSpec()))
        if experiment.optimizer.offload and path[0].name == "optimizer_state" and leaf.shape:
            sharding = sharding.with_memory_kind("pinned_host")
        return with_sharding(leaf, sharding)

    laid_out = jax.tree_util.tree_map_with_path(lay_out, state)
    return laid_out._replace(weights=weights_layout(state.weights, axes, mesh, experiment))


def weights_layout(weights: Any, axes: Any, mesh: Mesh, experiment: Experiment) -> Any:
    """Abstract weights with a sharding on every leaf."""
    return jax.tree.map(with_sharding, weights, rules.tree_shardings(mesh, axes, weights, experiment.mesh.zero))


def with_sharding(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    """The abstract array with this layout."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

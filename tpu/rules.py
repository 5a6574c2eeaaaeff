"""The one table from logical axes to mesh axes; no other file names a mesh axis.

Weights and activations name what their dimensions mean ("embed", "heads", "batch", ...). This table says along which
axes of the mesh such a dimension is cut. The first mesh axes listed that are not yet taken by an earlier dimension of
the same array apply.
"""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# From the axis whose neighbours may lie far apart to the one whose neighbours talk most.
MESH_AXES = ("stage", "data", "fsdp", "expert", "sequence", "tensor")

RULES: dict[str, tuple[str, ...]] = {
    # weights
    "embed": ("fsdp", "expert", "sequence"),
    "table_embed": ("fsdp", "expert", "sequence", "tensor", "stage"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "patch": (),
    "taps": (),
    "channels": (),
    "mlp": ("tensor",),
    "vocab": (),
    "experts": ("expert",),
    "repeats": (),
    "layers": ("stage",),
    "positions": (),
    "norm": (),
    "rank": (),  # of low-rank adapters, and the width of bottlenecks
    "prefix": (),
    # activations
    "batch": ("data", "fsdp", "expert"),
    "sequence": ("sequence",),
    "residual_sequence": ("sequence", "tensor"),  # between blocks (arXiv:2205.05198, section 4.2.2)
    "loss_sequence": ("sequence", "tensor", "stage"),
    "activation_embed": (),
    "activation_heads": ("tensor",),
    "ulysses_heads": ("tensor", "sequence"),
    "activation_mlp": ("tensor",),
}

# The axis along which replicas lie that train by themselves for a while (`train.optimize.local_sgd`).
REPLICA_AXIS = "data"

# The axes along which the ranks of ZeRO lie (arXiv:1910.02054); stages 1 and 2 keep weights whole along them.
ZERO_AXES = ("fsdp", "expert", "sequence")


def partition_spec(axes: tuple[str, ...], mesh: Any = None, shape: tuple[int, ...] = ()) -> PartitionSpec:
    """The PartitionSpec of an array whose dimensions have these logical names. Raises KeyError for an unknown name.

    With a mesh and a shape, axes of size one and axes that are manual in an enclosing `shard_map` are left out, and of
    several axes for one dimension those, from the last, whose sizes do not divide it: key/value heads fewer than the
    tensor axis are copied. What may not be copied is checked where the experiment is read (`train.mesh_checks`).
    """
    taken: set[str] = set(getattr(mesh, "manual_axes", ()))
    dimensions = []
    for index, axis in enumerate(axes):
        free = tuple(m for m in RULES[axis] if m not in taken and (mesh is None or mesh.shape[m] > 1))
        while shape and shape[index] % math.prod(mesh.shape[m] for m in free):
            free = free[:-1]
        taken.update(free)
        dimensions.append(free if len(free) > 1 else free[0] if free else None)
    return PartitionSpec(*dimensions)


def sharding(mesh: Mesh, axes: tuple[str, ...], shape: tuple[int, ...] = ()) -> NamedSharding:
    """How an array with these logical axes, and of this shape, lies on `mesh`."""
    return NamedSharding(mesh, partition_spec(axes, mesh, shape))


def constrain(x: jax.Array, *axes: str) -> jax.Array:
    """Fixes the layout of an activation inside `with jax.set_mesh(mesh)`; without a mesh, returns `x` as it is."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, mesh, x.shape))


def devices_along(name: str) -> int:
    """The number of devices along the mesh axes of a logical axis, those inside an enclosing `shard_map` left out."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[m] for m in RULES[name] if m not in mesh.manual_axes) if not mesh.empty else 1


def free_axes(mesh: Any) -> set[str]:
    """The mesh axes that are not manual in an enclosing `shard_map`."""
    return set(mesh.axis_names) - set(mesh.manual_axes)


def tree_shardings(mesh: Mesh, axes: Any, weights: Any, zero: int = 3) -> Any:
    """`sharding` for every leaf of a tree of logical-axes tuples, beside a tree of arrays or abstract arrays.

    A weight that is no array (`model.weights.Weight`) says what the axes of its parts are. With `zero` below 3 the axes
    of ZERO_AXES cut nothing.
    """

    def lay_out(names: tuple[str, ...], weight: Any) -> Any:
        if hasattr(weight, "axes"):
            return tree_shardings(mesh, weight.axes(names), weight, zero)
        found = sharding(mesh, names, weight.shape)
        return found if zero == 3 else NamedSharding(mesh, without(found.spec, ZERO_AXES))

    return jax.tree.map(lay_out, axes, weights, is_leaf=lambda leaf: isinstance(leaf, tuple))


def axes_in(spec: PartitionSpec) -> tuple[str, ...]:
    """All mesh axes of a spec."""
    return tuple(axis for d in spec for axis in ((d,) if isinstance(d, str) else d or ()))


def without(spec: PartitionSpec, axes: tuple[str, ...]) -> PartitionSpec:
    """The spec with these mesh axes left out."""
    kept = [tuple(axis for axis in axes_in(PartitionSpec(d)) if axis not in axes) for d in spec]
    return PartitionSpec(*(d if len(d) > 1 else d[0] if d else None for d in kept))

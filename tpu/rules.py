"""The one table from logical axes to mesh axes; no other file names a mesh axis.

Weights and activations name what their dimensions mean ("embed", "heads", "batch", ...). This table says along which
axes of the mesh such a dimension is cut. The first mesh axes listed that are not yet taken by an earlier dimension of
the same array apply.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor", "sequence", "expert", "stage")

RULES: dict[str, tuple[str, ...]] = {
    # weights
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "experts": ("expert",),
    "layers": ("stage",),
    "positions": (),
    "norm": (),
    # activations
    "batch": ("data", "fsdp"),
    "sequence": ("sequence",),
    "activation_embed": (),
    "activation_heads": ("tensor",),
    "activation_mlp": ("tensor",),
    "activation_vocab": ("tensor",),
}


def partition_spec(axes: tuple[str, ...]) -> PartitionSpec:
    """The PartitionSpec of an array whose dimensions have these logical names. Raises KeyError for an unknown name."""
    taken: set[str] = set()
    dimensions = []
    for axis in axes:
        free = tuple(m for m in RULES[axis] if m not in taken)
        taken.update(free)
        dimensions.append(free if len(free) > 1 else free[0] if free else None)
    return PartitionSpec(*dimensions)


def sharding(mesh: Mesh, axes: tuple[str, ...]) -> NamedSharding:
    """How an array with these logical axes lies on `mesh`."""
    return NamedSharding(mesh, partition_spec(axes))


def constrain(x: jax.Array, *axes: str) -> jax.Array:
    """Fixes the layout of an activation inside `with jax.set_mesh(mesh)`; without a mesh, returns `x` as it is."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes))


def tree_shardings(mesh: Mesh, axes: Any) -> Any:
    """`sharding` for every leaf of a tree of logical-axes tuples."""
    return jax.tree.map(lambda leaf: sharding(mesh, leaf), axes, is_leaf=lambda leaf: isinstance(leaf, tuple))

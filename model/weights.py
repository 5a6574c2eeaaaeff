"""A model's weights: how they come to be, what stands for a matrix, and what tools ask of both alike.

Modules describe; they are used functionally. `build` gives the graph and the abstract weights, `init` the weights, and
`bind` joins graph and weights into a model to call, inside or outside of `jax.jit`. Weights are a nested dictionary
whose leaves are arrays; where a matrix would be, there may be a `Weight`: adapted, quantised, pruned.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
from flax import nnx

from model.config import ModelConfig

Weights = dict[str, Any]

_BUILT: dict[Any, Any] = {}  # what `build` found for a config's fields, a class and a mesh

MATRICES = ("kernel", "embedding")  # names of the weights that activations meet in `model.linear`


@runtime_checkable
class Weight(Protocol):
    """A matrix that is no array. A registered pytree whose leaves are its parts.

    Layers are stacked, and a stack is cut, along the first dimensions of every part: `shape` follows from the parts.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix that it stands for, dimensions that stack layers included."""

    def matmul(
        self, x: jax.Array, contract: int, dtype: str, platform: str, result: str, transposed: bool = False
    ) -> jax.Array:
        """As `model.linear.matmul`, of one layer."""

    def rows(self, indices: jax.Array) -> jax.Array:
        """The rows [..., D] of a table [N, D] at `indices` [...]."""

    def dense(self) -> jax.Array:
        """The matrix as one float32 array, of one layer or of stacked ones."""

    def axes(self, names: tuple[str, ...]) -> Any:
        """The logical axes of the parts, alike in structure, from those of the matrix."""


def build(config: ModelConfig, make: Callable[..., nnx.Module]) -> tuple[nnx.GraphDef, Weights, Any]:
    """The graph, the abstract weights (jax.ShapeDtypeStruct) and, alike in structure, each weight's logical axes.

    Allocates nothing and touches no device. `config` must be `resolved` and `placed`; `make` is the class of a module
    (of a whole model `model.kinds.build` knows it).
    """
    # A run asks five times, and tracing takes seconds. Leaves know the mesh in use.
    key = repr(config), make, jax.sharding.get_abstract_mesh()
    if key not in _BUILT:
        graphdef, state = nnx.split(nnx.eval_shape(lambda: make(config, nnx.Rngs(0))))
        axes = jax.tree.map(lambda p: p.get_metadata("axes"), state, is_leaf=lambda n: isinstance(n, nnx.Variable))
        _BUILT[key] = graphdef, nnx.to_pure_dict(state), nnx.to_pure_dict(axes)
    return jax.tree.map(lambda leaf: leaf, _BUILT[key])  # with dictionaries of the caller's own


def init(config: ModelConfig, key: jax.Array, make: Callable[..., nnx.Module]) -> Weights:
    """Draws the weights; call inside `jax.jit` with `out_shardings` to lay them out as they are made."""
    return nnx.to_pure_dict(nnx.state(make(config, nnx.Rngs(key))))


def bind(graphdef: nnx.GraphDef, weights: Weights) -> Any:
    """The model that computes with these weights."""
    return nnx.merge(graphdef, nnx.State(weights))


def names(path: tuple) -> tuple[str, ...]:
    """The names along a tree's path, whatever its nodes are: ("stack", "groups", "layer_0", "mlp", "up", "kernel")."""
    return tuple(jax.tree_util.keystr((part,), simple=True) for part in path)


def is_weight(node: Any) -> bool:
    """Whether a node of a tree stands for a matrix without being an array."""
    return isinstance(node, Weight)


def named(weights: Any) -> dict[tuple[str, ...], Any]:
    """Every array and every whole `Weight` of a tree by its `names`."""
    return {names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(weights, is_leaf=is_weight)}


def size(weight: Any) -> int:
    """The number of elements of an array, or of the matrix that a `Weight` stands for."""
    return math.prod(weight.shape)


def dense(weight: Any) -> jax.Array:
    """An array as it is, a `Weight` as the float32 array that it stands for."""
    return weight.dense() if is_weight(weight) else weight


def axes_of(weights: Weights, axes: Any) -> Any:
    """The logical axes of every part of the weights, from those `axes` of arrays in the places of all."""
    return jax.tree.map(lambda w, own: w.axes(own) if is_weight(w) else own, weights, axes, is_leaf=is_weight)


def inputs(axes: tuple[str, ...]) -> range:
    """Which dimensions of a matrix with these logical axes are its inputs; those before them stack layers and experts.

    Into the residual stream, all but the last are; from one space to itself half of them; else the first.
    """
    first = max((axes.index(name) + 1 for name in ("layers", "experts") if name in axes), default=0)
    own = axes[first:]
    half = len(own) // 2
    if own[:half] == own[half:]:
        return range(first, first + half)
    return range(first, len(axes) - 1 if own[-1] == "embed" else first + 1)


def map_matrices(function: Callable[[Any], Any], weights: Weights) -> Weights:
    """The weights with `function` of every matrix, an array or a `Weight`, in its place; all others as they are."""

    def changed(path: tuple, weight: Any) -> Any:
        return function(weight) if names(path)[-1] in MATRICES else weight

    return jax.tree_util.tree_map_with_path(changed, weights, is_leaf=is_weight)


def rounded(weights: Weights, dtype: str) -> Weights:
    """The weights with every matrix that is an array in `dtype`, to which `model.linear` would round it anyway."""
    return map_matrices(lambda w: w if is_weight(w) else w.astype(dtype), weights)

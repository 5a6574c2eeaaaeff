"""Layers in repeating groups: weights stacked along a first dimension, run by a scan or unrolled.

A group is one pass over `config.pattern`. Scanned, compile time does not grow with depth. Unrolled, XLA:CPU need
not slice the stacked weights in every iteration. The weights are stored the same way for both.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from model.attention import Place
from model.block import Block
from model.config import ModelConfig

REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Group(nnx.Module):
    """One repetition of the pattern: attributes `layer_0`, `layer_1`, ..."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        for i, kind in enumerate(config.pattern):
            setattr(self, f"layer_{i}", Block(config, kind, rngs))
        self.size = len(config.pattern)

    def __call__(
        self, h: jax.Array, place: Place, slots: Place | None, rotation: Any, cached: Any, key: jax.Array | None
    ) -> tuple[jax.Array, Any]:
        """As `Block`, with `cached` a dictionary of layer names."""
        new = {}
        for i in range(self.size):
            name = f"layer_{i}"
            layer_key = None if key is None else jax.random.fold_in(key, i)
            layer_cache = None if cached is None else cached[name]
            h, new[name] = getattr(self, name)(h, place, slots, rotation, layer_cache, layer_key)
        return h, None if cached is None else new


class Stack(nnx.Module):
    """All groups; every weight of `self.groups` has a first dimension "layers"."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.count = config.layers // len(config.pattern)
        self.unroll = config.layer_loop == "unroll"
        self.remat = config.remat
        keys = jax.random.split(rngs.params(), self.count)
        self.groups = nnx.vmap(lambda key: Group(config, nnx.Rngs(key)))(keys)
        for _, node in nnx.iter_graph(self.groups):
            if isinstance(node, nnx.Param):
                node.set_metadata(axes=("layers", *node.get_metadata("axes")))

    def __call__(
        self, h: jax.Array, place: Place, slots: Place | None, rotation: Any, cached: Any, key: jax.Array | None
    ) -> tuple[jax.Array, Any]:
        """As `Block`, with `cached` the `layers` of a `model.cache.Cache`."""
        graphdef, state = nnx.split(self.groups)
        weights = nnx.to_pure_dict(state)

        def body(h: jax.Array, weights: Any, cached: Any, index: Any) -> tuple[jax.Array, Any]:
            group_key = None if key is None else jax.random.fold_in(key, index)
            return nnx.merge(graphdef, nnx.State(weights))(h, place, slots, rotation, cached, group_key)

        if self.remat != "none":
            body = jax.checkpoint(body, policy=REMAT_POLICIES[self.remat], prevent_cse=self.unroll)
        if not self.unroll:
            return jax.lax.scan(lambda h, x: body(h, *x), h, (weights, cached, jax.numpy.arange(self.count)))
        new = []
        for index, group in enumerate(unstacked(weights, self.count)):
            h, group_cache = body(h, group, None if cached is None else cached[index], index)
            new.append(group_cache)
        return h, None if cached is None else new


def unstacked(weights: Any, count: int) -> list[Any]:
    """The weights of each group, from arrays [count, ...] or from tuples of `count` arrays (see `unstack`)."""
    weights = jax.tree.map(lambda w: w if isinstance(w, tuple) else _split(w), weights, is_leaf=_is_tuple)
    return [jax.tree.map(lambda w: w[i], weights, is_leaf=_is_tuple) for i in range(count)]


def unstack(weights: dict[str, Any]) -> dict[str, Any]:
    """Turns the stacked arrays of a whole model's weights into tuples once, for loops that would slice them often."""
    return weights | {"stack": jax.tree.map(_split, weights["stack"])}


def _split(array: jax.Array) -> tuple[jax.Array, ...]:
    """[count, ...] -> count arrays [...]; one split, because its gradient is one concatenation."""
    parts = jax.lax.split(array, (1,) * array.shape[0], axis=0)
    return tuple(part.reshape(array.shape[1:]) for part in parts)


def _is_tuple(leaf: Any) -> bool:
    return isinstance(leaf, tuple)

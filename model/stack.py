"""Layers in repeating groups: weights stacked along a first dimension, run by a scan or unrolled.

A group is one pass over `config.pattern`. Scanned, compile time does not grow with depth. Unrolled, XLA:CPU need
not slice the stacked weights in every iteration. The weights are stored the same way for both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from model.attention import Place
from model.block import Block, residual
from model.config import ModelConfig
from model.dropout import fold_in
from tpu import rules
from tpu.pipeline import pipeline

REMAT = {  # model.remat: names of what the forward pass saves beside the input of each group of layers
    "full": (),
    "attention": ("attention",),
    "all_but_mlp": ("query", "key", "value", "out"),
    "projections": ("query", "key", "value", "attention", "out", "mlp"),
}


def remat_policy(remat: str) -> Any:
    """The `jax.checkpoint` policy of a `model.remat` other than "none"."""
    policies = jax.checkpoint_policies
    if remat in REMAT:
        return policies.save_only_these_names(*REMAT[remat])
    if remat == "offload_projections":
        return policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=["query", "key", "value"],
            offload_src="device",
            offload_dst="pinned_host",
        )
    return {"dots": policies.dots_saveable, "dots_no_batch": policies.dots_with_no_batch_dims_saveable}[remat]


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
            layer_cache = None if cached is None else cached[name]
            h, new[name] = getattr(self, name)(h, place, slots, rotation, layer_cache, fold_in(key, i))
        return h, None if cached is None else new


class Stack(nnx.Module):
    """All groups; every weight of `self.groups` has a first dimension "layers".

    With `pipeline_repeats` above 1 that dimension is split into ("repeats", "layers"), because each stage of a pipeline
    then holds several runs of layers; the order stays.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.count, self.repeats = config.layers // len(config.pattern), config.pipeline_repeats
        self.microbatches = config.pipeline_microbatches
        self.unroll = config.layer_loop == "unroll"
        self.remat = config.remat
        keys = jax.random.split(rngs.params(), self.count)
        make, lead = nnx.vmap(lambda key: Group(config, nnx.Rngs(key))), ("layers",)
        if self.repeats > 1:
            keys = keys.reshape(self.repeats, -1)
            make, lead = nnx.vmap(make), ("repeats", "layers")
        self.groups = make(keys)
        for _, node in nnx.iter_graph(self.groups):
            if isinstance(node, nnx.Param):
                node.set_metadata(axes=(*lead, *node.get_metadata("axes")))

    def __call__(
        self, h: jax.Array, place: Place, slots: Place | None, rotation: Any, cached: Any, key: jax.Array | None
    ) -> tuple[jax.Array, Any]:
        """As `Block`, with `cached` the `layers` of a `model.cache.Cache`."""
        graphdef, state = nnx.split(self.groups)
        weights, side = nnx.to_pure_dict(state), (place, rotation, key)

        def group(h: jax.Array, side: Any, weights: Any, cached: Any, index: Any) -> tuple[jax.Array, Any]:
            place, rotation, key = side
            return nnx.merge(graphdef, nnx.State(weights))(h, place, slots, rotation, cached, fold_in(key, index))

        if cached is None and rules.devices_along("layers") > 1:
            return self._pipelined(group, weights, h, side), None
        weights = joined(weights, self.repeats)
        group = self._rematerialized(group)

        def body(h: jax.Array, weights: Any, cached: Any, index: Any) -> tuple[jax.Array, Any]:
            return group(h, side, weights, cached, index)

        if not self.unroll:
            return jax.lax.scan(lambda h, x: body(h, *x), h, (weights, cached, jax.numpy.arange(self.count)))
        new = []
        for index, parts in enumerate(unstacked(weights, self.count)):
            h, group_cache = body(h, parts, None if cached is None else cached[index], index)
            new.append(group_cache)
        return h, None if cached is None else new

    def _rematerialized(self, function: Callable) -> Callable:
        if self.remat == "none":
            return function
        return jax.checkpoint(function, policy=remat_policy(self.remat), prevent_cse=self.unroll)

    def _pipelined(self, group: Callable, weights: Any, h: jax.Array, side: Any) -> jax.Array:
        """As `__call__` for training: the groups in parts, on the stages of the mesh."""
        if self.repeats == 1:
            weights = jax.tree.map(lambda w: w[None], weights)

        def at(h: jax.Array, side: Any, weights: Any, repeat: jax.Array, i: jax.Array, index: jax.Array) -> jax.Array:
            return group(h, side, jax.tree.map(lambda w: w[repeat, i], weights), None, index)[0]

        at = self._rematerialized(at)  # Weights are taken inside: taken outside, every tick would save its own.

        def part(weights: Any, repeat: jax.Array, h: jax.Array, side: Any, first: jax.Array) -> jax.Array:
            def body(h: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
                return at(residual(h), side, weights, repeat, i, first + i), None

            return jax.lax.scan(body, h, jax.numpy.arange(jax.tree.leaves(weights)[0].shape[1]))[0]

        return pipeline(part, weights, h, side, self.microbatches or rules.devices_along("layers"))


def joined(weights: Any, repeats: int) -> Any:
    """Arrays [repeats, count / repeats, ...] as [count, ...]; tuples (see `unstack`) and single runs as they are."""
    if repeats == 1:
        return weights
    return jax.tree.map(lambda w: w if _is_tuple(w) else w.reshape(-1, *w.shape[2:]), weights, is_leaf=_is_tuple)


def unstacked(weights: Any, count: int) -> list[Any]:
    """The weights of each group, from arrays [count, ...] or from tuples of `count` arrays (see `unstack`)."""
    weights = jax.tree.map(lambda w: w if isinstance(w, tuple) else _split(w), weights, is_leaf=_is_tuple)
    return [jax.tree.map(lambda w: w[i], weights, is_leaf=_is_tuple) for i in range(count)]


def unstack(weights: dict[str, Any], repeats: int = 1) -> dict[str, Any]:
    """Turns the stacked arrays of a whole model's weights into tuples once, for loops that would slice them often."""
    return weights | {"stack": jax.tree.map(_split, joined(weights["stack"], repeats))}


def _split(array: jax.Array) -> tuple[jax.Array, ...]:
    """[count, ...] -> count arrays [...]; one split, because its gradient is one concatenation."""
    parts = jax.lax.split(array, (1,) * array.shape[0], axis=0)
    return tuple(part.reshape(array.shape[1:]) for part in parts)


def _is_tuple(leaf: Any) -> bool:
    return isinstance(leaf, tuple)

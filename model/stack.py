"""Layers in repeating groups: weights stacked along a first dimension, run by a scan or unrolled.

A group is one pass over `config.pattern`. Scanned, compile time does not grow with depth. Unrolled, XLA:CPU need
not slice the stacked weights in every iteration. The weights are stored the same way for both.

Groups may share one set of weights (ALBERT, arXiv:1909.11942, section 3.1), which is then stored once and whose
gradient is the sum of theirs; each has a cache of its own, and may have low-rank factors of its own beside the shared
matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from model.adapters.lora import applied, draw_a, factors
from model.attention.gated_cross_attention import GatedCrossAttention
from model.attention.layer_inputs import LayerInputs
from model.block import Block
from model.config import ModelConfig
from model.dropout import fold_in
from model.linear import parameter, zeros
from model.moe import Routing
from model.residual import residual
from model.weights import MATRICES
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
    """One repetition of the pattern: attributes `layer_0`, `layer_1`, ...; `gate_i` before `layer_i` where it looks."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.size, self.looks = len(config.pattern), tuple(config.looks(i) for i in range(len(config.pattern)))
        for i, kind in enumerate(config.pattern):
            if self.looks[i]:
                setattr(self, f"gate_{i}", GatedCrossAttention(config, rngs))
            setattr(self, f"layer_{i}", Block(config, kind, rngs, config.mixes(i)))

    def __call__(
        self, h: jax.Array, inputs: LayerInputs, cached: Any, key: jax.Array | None
    ) -> tuple[jax.Array, Any, dict[str, Routing]]:
        """As `Block`, with `cached` a dictionary of layer names, and a `Routing` for the name of each mixture.

        A gate's entry of the cache are the keys and values of the images, from the first call on.
        """
        new, routings = {}, {}
        for i in range(self.size):
            name = f"layer_{i}"
            layer_cache = None if cached is None else cached[name]
            layer = getattr(self, name)
            if self.looks[i]:
                held = None if cached is None else cached.get(f"gate_{i}")
                h, held = getattr(self, f"gate_{i}")(h, inputs.place, inputs.source, held, fold_in(key, self.size + i))
                new |= {} if held is None else {f"gate_{i}": held}
            h, new[name], routing = layer(h, inputs, layer_cache, fold_in(key, i))
            routings |= {} if routing is None else {name: routing}
        return h, None if cached is None else new, routings


class Stack(nnx.Module):
    """All groups; every weight of `self.groups` has a first dimension "layers", of as many sets as there are.

    With `pipeline_repeats` above 1 that dimension is split into ("repeats", "layers"), because each stage of a pipeline
    then holds several runs of layers; the order stays.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.count, self.repeats = config.layers // len(config.pattern), config.pipeline_repeats
        self.microbatches = config.pipeline_microbatches
        self.unroll = config.layer_loop == "unroll"
        self.remat = config.remat
        self.sets, self.sharing = config.layer_sets(), config.share_layers
        keys = jax.random.split(rngs.params(), self.sets)
        make, lead = nnx.vmap(lambda key: Group(config, nnx.Rngs(key))), ("layers",)
        if self.repeats > 1:
            keys = keys.reshape(self.repeats, -1)
            make, lead = nnx.vmap(make), ("repeats", "layers")
        self.groups = make(keys)
        for _, node in nnx.iter_graph(self.groups):
            if isinstance(node, nnx.Param):
                node.set_metadata(axes=(*lead, *node.get_metadata("axes")))
        self.deltas = _deltas(config, self.groups, self.count, rngs) if config.share_rank else None

    def __call__(
        self,
        h: jax.Array,
        inputs: LayerInputs,
        cached: Any = None,
        key: jax.Array | None = None,
        part: tuple[int, int] | None = None,
    ) -> tuple[jax.Array, Any, dict[str, Routing]]:
        """As `Group`, with `cached` the `layers` of a `Cache` and every `Routing` stacked [groups, ...].

        part: which groups to run, from the first to before the second, and whose `cached` are given; None: all.
        """
        first, last = part or (0, self.count)
        graphdef, state = nnx.split(self.groups)
        weights, side = nnx.to_pure_dict(state), (inputs, key)
        deltas = {} if self.deltas is None else nnx.to_pure_dict(nnx.state(self.deltas))

        def group(h: jax.Array, side: Any, weights: Any, cached: Any, index: Any) -> tuple[jax.Array, Any, Any]:
            inputs, key = side
            model = nnx.merge(graphdef, nnx.State(weights))
            return model(h, inputs, cached, fold_in(key, index))

        if cached is None and part is None and rules.devices_along("layers") > 1:
            h, routings = self._pipelined(group, weights, h, side)
            return h, None, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), routings)
        weights = joined(weights, self.repeats)
        if not self.unroll and (first, last) != (0, self.count):
            weights = jax.tree.map(lambda w: w[first:last], weights)
        group = self._rematerialized(group)

        def body(h: jax.Array, weights: Any, deltas: Any, cached: Any, index: Any) -> tuple[jax.Array, Any]:
            h, new, routings = group(h, side, applied(weights, deltas), cached, index)
            return h, (new, routings)

        if not self.unroll:
            h, (new, routings) = self._scanned(body, h, weights, (deltas, cached, jax.numpy.arange(first, last)))
            return h, new, routings
        results = []
        sets, deltas = unstacked(weights, self.sets), unstacked(deltas, self.count)
        for index in range(first, last):
            number = index % self.sets if self.sharing == "alternate" else index * self.sets // self.count
            h, result = body(h, sets[number], deltas[index], None if cached is None else cached[index - first], index)
            results.append(result)
        new, routings = zip(*results, strict=True)
        routings = jax.tree.map(lambda *parts: jax.numpy.stack(parts), *routings)
        return h, None if cached is None else list(new), routings

    def _scanned(self, body: Callable, h: jax.Array, weights: Any, own: Any) -> tuple[jax.Array, Any]:
        """All groups as one loop, or, where they share weights, as two: over the sets and over the groups of a set.

        `own` is what each group has to itself, with a first dimension `count`.
        """
        if self.sharing == "none":
            return jax.lax.scan(lambda h, x: body(h, x[0], *x[1]), h, (weights, own))

        def in_turn(h: jax.Array, own: Any) -> tuple[jax.Array, Any]:
            return jax.lax.scan(lambda h, x: body(h, x[0], *x[1]), h, (weights, own))

        def again(h: jax.Array, x: tuple[Any, Any]) -> tuple[jax.Array, Any]:
            return jax.lax.scan(lambda h, own: body(h, x[0], *own), h, x[1])

        alternate = self.sharing == "alternate"
        outer = self.count // self.sets if alternate else self.sets
        own = jax.tree.map(lambda a: a.reshape(outer, -1, *a.shape[1:]), own)
        h, new = jax.lax.scan(in_turn, h, own) if alternate else jax.lax.scan(again, h, (weights, own))
        return h, jax.tree.map(lambda a: a.reshape(self.count, *a.shape[2:]), new)

    def _rematerialized(self, function: Callable) -> Callable:
        if self.remat == "none":
            return function
        return jax.checkpoint(function, policy=remat_policy(self.remat), prevent_cse=self.unroll)

    def _pipelined(self, group: Callable, weights: Any, h: jax.Array, side: Any) -> tuple[jax.Array, Any]:
        """As `__call__` for training: the groups in parts, on the stages of the mesh; no cache."""
        if self.repeats == 1:
            weights = jax.tree.map(lambda w: w[None], weights)

        def at(h: jax.Array, side: Any, weights: Any, repeat: jax.Array, i: jax.Array, index: jax.Array) -> Any:
            h, _, routings = group(h, side, jax.tree.map(lambda w: w[repeat, i], weights), None, index)
            return h, routings

        at = self._rematerialized(at)  # Weights are taken inside: taken outside, every tick would save its own.

        def part(weights: Any, repeat: jax.Array, h: jax.Array, side: Any, first: jax.Array) -> tuple[jax.Array, Any]:
            def body(h: jax.Array, i: jax.Array) -> tuple[jax.Array, Any]:
                return at(residual(h), side, weights, repeat, i, first + i)

            return jax.lax.scan(body, h, jax.numpy.arange(jax.tree.leaves(weights)[0].shape[1]))

        return pipeline(part, weights, h, side, self.microbatches or rules.devices_along("layers"))


def _deltas(config: ModelConfig, groups: Group, count: int, rngs: nnx.Rngs) -> nnx.Dict:
    """Low-rank factors for every matrix of `groups`, a pair for each of `count` groups; nested as the matrices are."""

    def pairs(node: Any) -> nnx.Dict:
        found = {}
        for name, part in node.items():
            if name in MATRICES:
                shape, axes = part.get_value().shape, part.get_metadata("axes")
                both = factors((count, *shape[1:]), axes, config.share_rank)
                found[name] = nnx.Dict(
                    lora_a=parameter(rngs, *both["lora_a"], config.weight_dtype, lambda key, s: draw_a(key, s, axes)),
                    lora_b=parameter(rngs, *both["lora_b"], config.weight_dtype, zeros),
                )
            elif not isinstance(part, nnx.Variable) and (below := pairs(part)):
                found[name] = below
        return nnx.Dict(found)

    return pairs(nnx.state(groups))


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
    stacks = weights.keys() & {"stack", "encoder", "decoder"}
    return weights | {name: jax.tree.map(_split, joined(weights[name], repeats)) for name in stacks}


def _split(array: jax.Array) -> tuple[jax.Array, ...]:
    """[count, ...] -> count arrays [...]; one split, because its gradient is one concatenation."""
    parts = jax.lax.split(array, (1,) * array.shape[0], axis=0)
    return tuple(part.reshape(array.shape[1:]) for part in parts)


def _is_tuple(leaf: Any) -> bool:
    return isinstance(leaf, tuple)

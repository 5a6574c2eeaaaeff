"""What an adapter trains beside frozen weights, and how both become the weights of a model.

The trained weights are a nested dictionary whose paths are those of the model: at a matrix the factors of LoRA
(`lora`, with the lengths of `model.adapters.dora`), elsewhere weights that the base lacks (`model.adapters.bottleneck`,
`model.adapters.prefix`), or that take the place of the base's: its biases (BitFit, arXiv:2106.10199). They are float32.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from model import kinds
from model.adapters.dora import DoRA
from model.adapters.lora import LoRA, applied, draw_a, factors
from model.config import ModelConfig
from model.dropout import fold_in
from model.weights import MATRICES, Weights, dense, is_weight
from tpu.errors import UserError
from train.config import ADDED_FIELDS, AdapterConfig


class Parts(NamedTuple):
    """Frozen and trained weights, abstract, and the logical axes of each."""

    base: Weights
    base_axes: Any
    trained: Weights
    trained_axes: Any


def base_model(adapter: AdapterConfig, config: ModelConfig) -> ModelConfig:
    """The model without the modules that the adapter adds."""
    field = ADDED_FIELDS.get(adapter.kind)
    return dataclasses.replace(config, **{field: 0}) if field else config


def parts(adapter: AdapterConfig, config: ModelConfig) -> Parts:
    """What is frozen and what is trained in a model of this `placed` config, which has what the adapter adds.

    Raises UserError where the adapter finds nothing to train, naming what there is.
    """
    _, whole, axes = kinds.build(config)
    _, base, base_axes = kinds.build(base_model(adapter, config))
    shapes, names, old = flatten_dict(whole), flatten_dict(axes), flatten_dict(base)
    found: dict[tuple[str, ...], tuple[tuple[int, ...], tuple[str, ...]]] = {}
    if adapter.kind in ("lora", "dora"):
        for path in _targets(adapter, shapes):
            pair = factors(shapes[path].shape, names[path], adapter.rank)
            found |= {(*path, name): part for name, part in pair.items()}
            if adapter.kind == "dora":
                at = pair["lora_b"][1].index("rank")
                found[*path, "magnitude"] = tuple((*of[:at], *of[at + 1 :]) for of in pair["lora_b"])
    else:
        chosen = [p for p in shapes if (p[-1] == "bias" if adapter.kind == "bias" else p not in old)]
        if not chosen:
            raise UserError("adapter.kind='bias': the model has no biases to train; take another kind, such as 'lora'")
        found = {path: (shapes[path].shape, names[path]) for path in chosen}
    trained = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, (shape, _) in found.items()}
    return Parts(base, base_axes, unflatten_dict(trained), unflatten_dict({p: axes for p, (_, axes) in found.items()}))


def init(adapter: AdapterConfig, config: ModelConfig, key: jax.Array, base: Weights) -> Weights:
    """The trained weights with which the model computes what `base` alone does."""
    trained = parts(adapter, config)
    old, names = flatten_dict(base), flatten_dict(trained.base_axes)
    drawn = flatten_dict(kinds.init(dataclasses.replace(config, weight_dtype="float32"), key))
    new = {}
    for number, (path, leaf) in enumerate(sorted(flatten_dict(trained.trained).items())):
        if path[-1] == "lora_a":
            new[path] = draw_a(jax.random.fold_in(key, number), leaf.shape, names[path[:-1]])
        elif path[-1] in ("lora_b", "magnitude"):
            new[path] = jnp.zeros(leaf.shape)
        else:
            new[path] = (old if path in old else drawn)[path].astype(jnp.float32)
    return unflatten_dict(new)


def combined(adapter: AdapterConfig, base: Weights, trained: Weights, keys: jax.Array | None = None) -> Weights:
    """The model's weights: the base's, with adapted ones in the place of those that the adapter changes.

    Args:
      keys: [B] of the rows, for `adapter.dropout`; None for none.
    """
    number = 0

    def adapted(kernel: Any, lora_a: jax.Array, lora_b: jax.Array, magnitude: jax.Array | None = None) -> LoRA | DoRA:
        nonlocal number
        low_rank = LoRA(kernel, lora_a, lora_b, scale=lora_scale(adapter))
        if keys is not None and adapter.dropout:
            stacked, number = lora_a.shape[: low_rank.stacking], number + 1
            of_layer = functools.partial(fold_in, fold_in(keys, 1000 + number))  # The model's own folds are small.
            low_rank.keys = jax.vmap(of_layer)(jnp.arange(math.prod(stacked))).reshape(*stacked, -1)  # [L, B]
            low_rank.rate = adapter.dropout
        return low_rank if magnitude is None else DoRA(low_rank, magnitude)

    return applied(base, trained, adapted)


def merged(adapter: AdapterConfig, base: Weights, trained: Weights) -> Weights:
    """The model's weights as plain arrays; matrices that the adapter changes are computed, and stay, in float32."""
    return jax.tree.map(dense, combined(adapter, base, trained), is_leaf=is_weight)


def lora_scale(adapter: AdapterConfig) -> float:
    """alpha / rank, or alpha / sqrt(rank) (rsLoRA, arXiv:2312.03732, definition 3.1)."""
    return adapter.alpha / (math.sqrt(adapter.rank) if adapter.rslora else adapter.rank)


def _targets(adapter: AdapterConfig, shapes: dict[tuple[str, ...], Any]) -> list[tuple[str, ...]]:
    """The paths of the matrices of layers, in any stack, in which one of `adapter.targets` is found.

    A pattern that is found outside the image encoder leaves that as it is.
    """
    known = {".".join(p[:-1]): p for p in shapes if "groups" in p and p[-1] in MATRICES}
    chosen: dict[tuple[str, ...], None] = {}
    for pattern in adapter.targets:
        matches = [path for name, path in known.items() if re.search(pattern, name)]
        if not matches:
            raise UserError(f"adapter.targets: {pattern!r} is found in no weight matrix; there are {', '.join(known)}")
        chosen |= dict.fromkeys([path for path in matches if "vision" not in path] or matches)
    for path in chosen:  # Experts and image encoders have other rows than the batch, each of which has a key.
        if adapter.dropout and ("vision" in path or ("moe" in path and "shared" not in path)):
            raise UserError(
                f"adapter.dropout={adapter.dropout}: not in {'.'.join(path[:-1])}; give 0, or other adapter.targets"
            )
    return list(chosen)

"""Weights to start from: those of other runs, taken over where path and shape agree, such as a language model's text
and a contrastive model's image encoder. Learned positions of images are resampled for images of another size."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from model import kinds
from model.config import VisionConfig
from model.vision.vit import resampled
from model.weights import Weights
from tpu import rules
from tpu.errors import UserError
from train.checkpoint import checkpoint
from train.config import AdapterConfig, Experiment
from train.data.text import tokenizer as tokenizers
from train.data.text.tokenizer import Tokenizer
from train.layout import with_sharding
from train.tree import from_dict

POSITIONS = ("vision.encoder.vit.position_embedding", "vision.encoder.position_embedding")


def tokenizer_of(paths: Sequence[str]) -> Tokenizer | None:
    """The tokenizer of the first of these checkpoints; None where there is none. Raises UserError as `taken_over`."""
    if not paths:
        return None
    return tokenizers.from_dict(checkpoint.read_meta(checkpoint.find(pathlib.Path(paths[0]), "weights"))["tokenizer"])


def taken_over(weights: Weights, paths: Sequence[str], mesh: Mesh, vision: VisionConfig) -> Weights:
    """`weights`, of a model with this `vision`, with those of the checkpoints in place of its own; of several that have
    one, the first's.

    Says what was taken, resampled, and not taken for its shape. Raises UserError where a directory holds no checkpoint
    of weights, or nothing that fits.
    """
    for path in reversed(paths):
        step_dir = checkpoint.find(pathlib.Path(path), "weights")
        experiment: Experiment = from_dict(Experiment, checkpoint.read_meta(step_dir)["experiment"])
        if experiment.adapter != AdapterConfig():
            raise UserError(f"run.start: {step_dir} is an adapter; merge it first (python -m train.adapter merge)")
        _, abstract, axes = kinds.build(experiment.model.placed("cpu", "float32"))
        layout = rules.tree_shardings(mesh, axes, abstract)
        abstract = jax.tree.map(with_sharding, abstract, layout)
        theirs = _by_path(checkpoint.load_weights(step_dir, abstract))
        seen = experiment.model.vision
        fitting = {
            name: positions_on_grid(weight, seen, vision) if name in POSITIONS else weight
            for name, weight in theirs.items()
        }
        own = _by_path(weights)
        taken = {n for n, w in fitting.items() if n in own and w is not None and w.shape == own[n].shape}
        if not taken:
            raise UserError(f"run.start: no weight of {step_dir} has path and shape of one here")

        def take(at: tuple, leaf: jax.Array, taken: set[str] = taken, fitting: dict[str, Any] = fitting) -> jax.Array:
            name = _name(at)
            return jax.device_put(fitting[name].astype(leaf.dtype), leaf.sharding) if name in taken else leaf

        weights = jax.tree_util.tree_map_with_path(take, weights)
        print(_report(step_dir, theirs, own, taken, seen, vision))
    return weights


def positions_on_grid(table: jax.Array, old: VisionConfig, new: VisionConfig) -> jax.Array | None:
    """The learned positions of `old`'s images as those of `new`'s, [class token and vectors, D]: bicubic as the encoder
    resamples them, a class token's row as it is. None where only one of the two has a class token."""
    if old.class_token != new.class_token:
        return None
    grids = (old.grid, old.columns), (new.grid, new.columns)
    if grids[0] == grids[1]:
        return table
    first, places = table[: int(old.class_token)], table[int(old.class_token) :]
    return jnp.concatenate([first, resampled(places.astype(jnp.float32), *grids, old.position_slack)])


def _report(
    step_dir: pathlib.Path,
    theirs: dict[str, jax.Array],
    own: dict[str, jax.Array],
    taken: set[str],
    old: VisionConfig,
    new: VisionConfig,
) -> str:
    """What was taken from a checkpoint, and what of it was not taken as it is, in one line."""
    total = sum(leaf.size for leaf in own.values())
    told = [f"starting with {sum(own[name].size for name in taken):,} of {total:,} parameters from {step_dir}"]
    grids = f"{old.grid} x {old.columns}", f"{new.grid} x {new.columns}"
    if taken.intersection(POSITIONS) and grids[0] != grids[1]:
        told.append(f"positions of images resampled from {grids[0]} to {grids[1]} vectors")
    left = [
        f"{name} {list(weight.shape)}, here {list(own[name].shape)}"
        for name, weight in theirs.items()
        if name in own and name not in taken
    ]
    return "; ".join(told + ([f"not taken for their shape: {'; '.join(left)}"] if left else []))


def _by_path(weights: Weights) -> dict[str, jax.Array]:
    return {_name(at): leaf for at, leaf in jax.tree_util.tree_leaves_with_path(weights)}


def _name(at: tuple) -> str:
    return jax.tree_util.keystr(at, simple=True, separator=".")

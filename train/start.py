"""Weights to start from: those of other runs, taken over where path and shape agree, such as a language model's text
and a contrastive model's image encoder."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from model import kinds
from model.transformer import Weights
from tpu import rules
from tpu.errors import UserError
from train import checkpoint
from train.config import AdapterConfig, Experiment
from train.data import tokenizer as tokenizers
from train.data.tokenizer import Tokenizer
from train.tree import from_dict


def tokenizer_of(paths: Sequence[str]) -> Tokenizer | None:
    """The tokenizer of the first of these checkpoints; None where there is none. Raises UserError as `taken_over`."""
    if not paths:
        return None
    return tokenizers.from_dict(checkpoint.read_meta(checkpoint.find(pathlib.Path(paths[0]), "weights"))["tokenizer"])


def taken_over(weights: Weights, paths: Sequence[str], mesh: Mesh) -> Weights:
    """`weights` with those of the checkpoints in place of its own; of several that have one, the first's.

    Says what was taken. Raises UserError where a directory holds no checkpoint of weights, or nothing that fits.
    """
    for path in reversed(paths):
        step_dir = checkpoint.find(pathlib.Path(path), "weights")
        experiment: Experiment = from_dict(Experiment, checkpoint.read_meta(step_dir)["experiment"])
        if experiment.adapter != AdapterConfig():
            raise UserError(f"run.start: {step_dir} is an adapter; merge it first (python -m train.adapter merge)")
        _, abstract, axes = kinds.build(experiment.model.placed("cpu", "float32"))
        layout = rules.tree_shardings(mesh, axes, abstract)
        abstract = jax.tree.map(lambda w, s: jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=s), abstract, layout)
        theirs = dict(jax.tree_util.tree_leaves_with_path(checkpoint.load_weights(step_dir, abstract)))
        taken: list[int] = []

        def take(at: tuple, own: jax.Array, theirs: dict[Any, jax.Array] = theirs, taken: list = taken) -> jax.Array:
            found = theirs.get(at)
            if found is None or found.shape != own.shape:
                return own
            taken.append(own.size)
            return jax.device_put(found.astype(own.dtype), own.sharding)

        weights = jax.tree_util.tree_map_with_path(take, weights)
        total = sum(leaf.size for leaf in jax.tree.leaves(weights))
        if not taken:
            raise UserError(f"run.start: no weight of {step_dir} has path and shape of one here")
        print(f"starting with {sum(taken):,} of {total:,} parameters from {step_dir}")
    return weights

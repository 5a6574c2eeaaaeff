"""A trained model from nothing but a checkpoint directory: experiment, tokenizer, weights, functions to use them."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from model.weights import Weights
from tpu import host
from tpu.errors import UserError
from tpu.mesh import make_mesh
from train.adapter import weights as adapter_weights
from train.adapter.frozen import base_of
from train.checkpoint import checkpoint
from train.config import AdapterConfig, Experiment, MeshConfig
from train.data.text import tokenizer as tokenizers
from train.step import make_program
from train.tree import from_dict


@dataclasses.dataclass(frozen=True)
class Trained:
    """A checkpoint, opened on one device."""

    step_dir: pathlib.Path
    experiment: Experiment  # its model placed on this platform
    tokenizer: tokenizers.Tokenizer
    graphdef: nnx.GraphDef
    weights: Weights
    evaluate: Callable[..., dict[str, Any]]  # sums over one batch, see train.step
    empty_memory: Callable[[], Any]
    mesh: Mesh


def open_checkpoint(
    path: pathlib.Path, field: str = "weights", base: str | None = None, **model_overrides: Any
) -> Trained:
    """Opens a workdir's newest good step, or one step directory. Raises UserError where there is none, or no `field`.

    An adapter is opened with its base and merged into it, in float32.

    Args:
      field: "weights", or "ema" for their moving average.
      base: where the base of an adapter lies now; None: where it was. UserError where the checkpoint is no adapter.
      model_overrides: fields of the model that do not change its weights, such as compute_dtype="float32".
    """
    host.keep_freed_memory()
    step_dir = checkpoint.find(path, "weights")
    meta = checkpoint.read_meta(step_dir)
    experiment = from_dict(Experiment, meta["experiment"])
    if field == "ema" and not experiment.optimizer.ema_decay:
        raise UserError(f"checkpoint={step_dir}: was trained without a moving average (optimizer.ema_decay=0)")
    below = base_of(meta, step_dir, base) if "base" in meta else None
    if base and not below:
        raise UserError(f"base={base}: checkpoint {step_dir} is no adapter, and has no base; leave it out")
    backend = host.start_backend()
    model = dataclasses.replace(experiment.model, **model_overrides)
    # An evaluation batch need not divide the mesh that trained it.
    experiment = dataclasses.replace(
        experiment, model=model.placed(backend, host.fast_dtype(backend)), mesh=MeshConfig(data=1)
    )
    mesh = make_mesh(experiment.mesh, jax.devices()[:1])
    program = make_program(experiment, mesh)
    weights = checkpoint.load_weights(step_dir, getattr(program.abstract_state, field), field)
    if below:
        frozen = checkpoint.load_weights(below.step_dir, program.abstract_base)
        weights = jax.jit(functools.partial(adapter_weights.merged, experiment.adapter))(frozen, weights)
        program = make_program(dataclasses.replace(experiment, adapter=AdapterConfig()), mesh)
    return Trained(
        step_dir=step_dir,
        experiment=experiment,
        tokenizer=tokenizers.from_dict(meta["tokenizer"]),
        graphdef=program.graphdef,
        weights=weights,
        evaluate=program.evaluate,
        empty_memory=program.empty_memory,
        mesh=mesh,
    )

"""A trained model from nothing but a checkpoint directory: experiment, tokenizer, weights, functions to use them."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from model.transformer import Weights
from tpu import host
from tpu.errors import UserError
from tpu.mesh import make_mesh
from train import checkpoint
from train.config import Experiment, MeshConfig, from_dict
from train.data import tokenizer as tokenizers
from train.step import Metrics, make_program


@dataclasses.dataclass(frozen=True)
class Trained:
    """A checkpoint, opened on one device."""

    step_dir: pathlib.Path
    experiment: Experiment  # its model placed on this platform
    tokenizer: tokenizers.Tokenizer
    graphdef: nnx.GraphDef
    weights: Weights
    evaluate: Callable[[Weights, Any], Metrics]  # sums over one batch, see train.step
    mesh: Mesh


def open_checkpoint(path: pathlib.Path, field: str = "weights", **model_overrides: Any) -> Trained:
    """Opens a workdir's newest good step, or one step directory. Raises UserError where there is none, or no `field`.

    Args:
      field: "weights", or "ema" for their moving average.
      model_overrides: fields of the model that do not change its weights, such as compute_dtype="float32".
    """
    host.keep_freed_memory()
    step_dir = checkpoint.find(path, "weights")
    meta = checkpoint.read_meta(step_dir)
    experiment = from_dict(Experiment, meta["experiment"])
    if field == "ema" and not experiment.optimizer.ema_decay:
        raise UserError(f"checkpoint={step_dir}: was trained without a moving average (optimizer.ema_decay=0)")
    backend = host.start_backend()
    model = dataclasses.replace(experiment.model, **model_overrides)
    # An evaluation batch need not divide the mesh that trained it.
    experiment = dataclasses.replace(
        experiment, model=model.placed(backend, host.fast_dtype(backend)), mesh=MeshConfig(data=1)
    )
    mesh = make_mesh(experiment.mesh, jax.devices()[:1])
    program = make_program(experiment, mesh)
    abstract = getattr(program.abstract_state, field)
    return Trained(
        step_dir=step_dir,
        experiment=experiment,
        tokenizer=tokenizers.from_dict(meta["tokenizer"]),
        graphdef=program.graphdef,
        weights=checkpoint.load_weights(step_dir, abstract, field),
        evaluate=program.evaluate,
        mesh=mesh,
    )

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
from train.adapter.frozen import adapted_role, find_frozen, load_frozen, references
from train.checkpoint import checkpoint
from train.config import AdapterConfig, Experiment, MeshConfig
from train.data.text import tokenizer as tokenizers
from train.program import make_program
from train.state import Frozen, Told
from train.tree import from_dict


@dataclasses.dataclass(frozen=True)
class Trained:
    """A checkpoint, opened on one device."""

    step_dir: pathlib.Path
    experiment: Experiment  # its model placed on this platform
    tokenizer: tokenizers.Tokenizer
    graphdef: nnx.GraphDef
    weights: Weights
    evaluate: Callable[..., Told]  # sums over one batch, see train.program
    first_carried: Callable[[], Any]
    frozen: Callable[[], Frozen]  # reads what the objective evaluates with besides: a reference, a teacher
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
    known, adapted = references(meta, experiment), experiment.adapter.kind != "none"
    if base and not adapted:
        raise UserError(f"base={base}: checkpoint {step_dir} is no adapter, and has no base; leave it out")
    role = adapted_role(experiment)
    below = find_frozen(known[role], step_dir, base) if adapted else None
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
        unchanged = checkpoint.load_weights(below.step_dir, program.abstract_frozen[role])
        weights = jax.jit(functools.partial(adapter_weights.merged, experiment.adapter))(unchanged, weights)
        program = make_program(dataclasses.replace(experiment, adapter=AdapterConfig()), mesh)

    def frozen() -> Frozen:
        found = {name: find_frozen(known[name], step_dir) for name in program.abstract_frozen}
        return load_frozen(found, program.abstract_frozen)

    return Trained(
        step_dir=step_dir,
        experiment=experiment,
        tokenizer=tokenizers.from_dict(meta["tokenizer"]),
        graphdef=program.graphdef,
        weights=weights,
        evaluate=program.evaluate,
        first_carried=program.first_carried,
        frozen=frozen,
        mesh=mesh,
    )

"""An experiment as it will run: what follows from its fields is filled in, and what cannot be is refused."""

from __future__ import annotations

import dataclasses
import logging

from model.fields.limits import check_effects
from tpu.errors import UserError
from train import mesh_checks
from train.adapter import checks as adapter_checks
from train.config import ADDED_FIELDS, Experiment, OptimizerConfig, RunConfig
from train.data import checks as data_checks
from train.data.images import checks as image_checks
from train.objectives.table import objective_of
from train.optimize import checks as optimizer_checks
from train.tree import check_types

log = logging.getLogger(__name__)


def resolve(experiment: Experiment) -> Experiment:
    """Returns a copy with derived fields filled in. Raises UserError naming the field that cannot be."""
    check_types(experiment)
    branches = {f.name: getattr(experiment, f.name) for f in dataclasses.fields(Experiment) if f.name != "name"}
    copies = {name: dataclasses.replace(branch) for name, branch in branches.items()}
    experiment = dataclasses.replace(experiment, **copies | {"model": experiment.model.resolved()})
    model, data, run = experiment.model, experiment.data, experiment.run
    if field := ADDED_FIELDS.get(experiment.adapter.kind):
        setattr(model, field, getattr(experiment.adapter, field))
    objective = objective_of(experiment)
    data.bpe_vocab_size = data.bpe_vocab_size or model.vocab_size - objective.special_tokens(experiment)
    _fit_schedule(experiment.optimizer, run)
    if run.seed >= 2**32:
        raise UserError(f"run.seed={run.seed}: must be below 2^32; larger ones would repeat the draws of smaller ones")
    for name in copies.keys() - {"model"}:
        check_effects(getattr(experiment, name), name, experiment)
    for checks in (data_checks, image_checks, optimizer_checks, adapter_checks, mesh_checks):
        checks.check(experiment)
    objective.check(experiment)
    return experiment


def on(experiment: Experiment, devices: int, platform: str, fast_dtype: str) -> Experiment:
    """Returns a copy of a resolved experiment whose mesh, and every "auto" of whose model, is decided for so many
    devices of a platform ("cpu", "gpu" or "tpu"). Raises UserError where it does not fit them."""
    model, mesh = experiment.model, experiment.mesh.filled(devices)
    platform = platform if model.platform == "auto" else model.platform
    if platform == "cpu" and mesh.stage > 1:
        fast_dtype = "float32"  # XLA cannot compile a pipeline in bfloat16 for CPUs.
    experiment = dataclasses.replace(experiment, mesh=mesh, model=model.placed(platform, fast_dtype))
    mesh_checks.check(experiment)
    return experiment


def _fit_schedule(optimizer: OptimizerConfig, run: RunConfig) -> None:
    """Fills in decay_steps, and shortens a warm-up that is as long as the run, or leaves a decay of wsd no room."""
    given, optimizer.decay_steps = optimizer.decay_steps, optimizer.decay_steps or max(1, run.steps // 5)
    decay = optimizer.decay_steps if optimizer.schedule == "wsd" and not given else 1
    if optimizer.schedule != "constant" and optimizer.warmup_steps + decay > run.steps:
        fitting = min(run.steps // 10, run.steps - decay)
        log.info(
            "optimizer.warmup_steps=%d: run.steps=%d has no room for it; %d instead",
            optimizer.warmup_steps,
            run.steps,
            fitting,
        )
        optimizer.warmup_steps = fitting

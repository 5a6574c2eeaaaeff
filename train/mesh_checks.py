"""What must hold between a mesh and the model, the batch and the adapter that lie on it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from model.fields.norms import DROPOUTS
from tpu.errors import UserError

if TYPE_CHECKING:
    from train.config import Experiment


def check(experiment: Experiment) -> None:
    """Raises UserError where the sizes of the mesh cannot be, or, once all are known, do not fit the rest."""
    sizes = {f"mesh.{axis}": size for axis, size in experiment.mesh.sizes().items()}
    for field in [field for field, size in sizes.items() if size == -1][1:]:
        raise UserError(f"{field}=-1: only one size may be -1")
    for field, size in sizes.items():
        if size < 1 and size != -1:
            raise UserError(f"{field}={size}: must be at least 1")
    if -1 not in sizes.values():
        _check_copies(experiment)
        _check_pipeline(experiment)
        _check_sizes(experiment)
        _check_rows(experiment)
        _check_parts(experiment)


def _check_copies(experiment: Experiment) -> None:
    mesh = experiment.mesh
    along = getattr(mesh, mesh.slice_axis)
    if along % mesh.slices:
        raise UserError(
            f"mesh.{mesh.slice_axis}={along}: not a multiple of mesh.slices={mesh.slices}, which lie along it"
        )
    if experiment.optimizer.local_steps and mesh.data == 1:
        raise UserError(
            f"optimizer.local_steps={experiment.optimizer.local_steps}: needs several copies of the weights, and "
            "mesh.data=1; give mesh.data above 1, or optimizer.local_steps=0"
        )


def _check_sizes(experiment: Experiment) -> None:
    """Raises UserError where a dimension of the model or the batch does not divide by the mesh axes that cut it."""
    model, data, mesh = experiment.model, experiment.data, experiment.mesh
    accumulation = experiment.optimizer.accumulation
    pipeline = _microbatches(experiment) if mesh.stage > 1 else 1
    shards = mesh.data * mesh.fsdp * mesh.expert * pipeline
    if (data.batch_size // accumulation) % shards:
        raise UserError(
            f"data.batch_size={data.batch_size}: each of the {accumulation} micro-batches must divide by mesh.data * "
            f"mesh.fsdp * mesh.expert{' * model.pipeline_microbatches' if pipeline > 1 else ''} = {shards}; "
            f"valid: multiples of {shards * accumulation}"
        )
    for field, size, axes in (
        ("data.context", data.context, ("sequence", "tensor")),
        ("model.embed_dim", model.embed_dim, ("fsdp", "expert", "sequence")),
        ("model.heads", model.heads, ("tensor",)),
        ("model.mlp_dim", model.mlp_dim, ("tensor",)),
        ("model.expert_dim", model.expert_dim, ("tensor",)),
        ("model.experts", model.experts, ("expert",)),
    ):
        product = math.prod(getattr(mesh, axis) for axis in axes)
        if size % product:
            named = " * ".join(f"mesh.{axis}" for axis in axes)
            raise UserError(f"{field}={size}: not a multiple of {named} = {product}")


def _check_rows(experiment: Experiment) -> None:
    """Raises UserError where rows cannot be cut along the sequence."""
    model, data, mesh = experiment.model, experiment.data, experiment.mesh
    if mesh.sequence == 1:
        return
    if model.kind != "decoder":
        raise UserError(f"mesh.sequence={mesh.sequence}: not with model.kind={model.kind!r}; give 1")
    if field := model.needs_whole_rows:
        raise UserError(f"{field}: needs whole rows, and mesh.sequence={mesh.sequence} cuts them; give mesh.sequence=1")
    if model.capacity_factor:
        raise UserError(
            f"model.capacity_factor={model.capacity_factor}: counts the tokens of whole rows, and "
            f"mesh.sequence={mesh.sequence} cuts them; give model.capacity_factor=0 (dropless)"
        )
    if model.context_parallel == "ulysses":
        for field, heads in (("heads", model.heads), ("kv_heads", model.kv_heads)):
            if heads % (mesh.sequence * mesh.tensor):
                raise UserError(
                    f"model.{field}={heads}: model.context_parallel='ulysses' needs a multiple of mesh.sequence * "
                    f"mesh.tensor = {mesh.sequence * mesh.tensor}; or take 'ring'"
                )
        return
    for field in DROPOUTS:
        if value := getattr(model, field):
            raise UserError(
                f"model.{field}={value}: with mesh.sequence={mesh.sequence} and model.context_parallel='ring' rows lie "
                "in another order, which would drop other elements; take 'ulysses'"
            )
    if data.context % (2 * mesh.sequence):
        raise UserError(f"data.context={data.context}: not a multiple of 2 * mesh.sequence = {2 * mesh.sequence}")


def _check_pipeline(experiment: Experiment) -> None:
    """Raises UserError where layers cannot be stages of a pipeline."""
    model, mesh = experiment.model, experiment.mesh
    if mesh.stage == 1:
        return
    if model.platform == "cpu" and model.compute_dtype == "bfloat16":
        raise UserError(
            f"model.compute_dtype=bfloat16: XLA cannot compile it for CPUs with mesh.stage={mesh.stage}; give "
            "model.compute_dtype=float32"
        )
    if model.kind not in ("decoder", "encoder"):
        raise UserError(f"mesh.stage={mesh.stage}: not with model.kind={model.kind!r}; give 1")
    if model.remembers:
        raise UserError(f"mesh.stage={mesh.stage}: not with a model that remembers (model.memory, model.knn_memory)")
    if model.fusion in ("co", "tangled"):
        raise UserError(
            f"mesh.stage={mesh.stage}: not with model.fusion={model.fusion!r}, which runs its layers between "
            "connections and never as a pipeline; give 1"
        )
    if model.share_layers != "none":
        raise UserError(
            f"mesh.stage={mesh.stage}: a pipeline needs layers of their own, and model.share_layers="
            f"{model.share_layers!r}; give mesh.stage=1"
        )


def _check_parts(experiment: Experiment) -> None:
    """Raises UserError where stages do not divide the layers, or do not go with an adapter's dropout."""
    model, mesh, adapter = experiment.model, experiment.mesh, experiment.adapter
    ring = mesh.sequence > 1 and model.context_parallel == "ring"
    if adapter.kind in ("lora", "dora") and adapter.dropout and (ring or mesh.stage > 1):
        raise UserError(
            f"adapter.dropout={adapter.dropout}: not with mesh.stage={mesh.stage}, nor with mesh.sequence="
            f"{mesh.sequence} where model.context_parallel='ring'; give 0"
        )
    groups, parts = model.layers // len(model.pattern), mesh.stage * model.pipeline_repeats
    if mesh.stage > 1 and groups % parts:
        raise UserError(
            f"mesh.stage={mesh.stage}: {groups} groups of layers do not divide into mesh.stage * "
            f"model.pipeline_repeats = {parts} parts"
        )
    if mesh.stage > 1 and _microbatches(experiment) % mesh.stage:
        raise UserError(
            f"model.pipeline_microbatches={_microbatches(experiment)}: not a multiple of mesh.stage={mesh.stage}"
        )


def _microbatches(experiment: Experiment) -> int:
    return experiment.model.pipeline_microbatches or experiment.mesh.stage

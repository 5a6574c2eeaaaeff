"""What must hold between the branches of an experiment, each with the error that says what to give instead."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from tpu.errors import UserError
from train.data.chat.record import IMAGE
from train.objectives.table import OBJECTIVES

if TYPE_CHECKING:
    from train.config import Experiment, OptimizerConfig, RunConfig


def check(experiment: Experiment) -> None:
    """Raises UserError for the first field of a resolved experiment that is out of range or at odds with another."""
    data, optimizer, mesh, run = experiment.data, experiment.optimizer, experiment.mesh, experiment.run
    _at_least(1, {"data.context": data.context, "data.batch_size": data.batch_size, "data.prefetch": data.prefetch})
    _at_least(1, {"run.steps": run.steps, "run.keep_last": run.keep_last, "run.log_every": run.log_every})
    _at_least(1, {"run.max_bad_steps": run.max_bad_steps, "optimizer.accumulation": optimizer.accumulation})
    sizes = {f"mesh.{axis}": size for axis, size in mesh.sizes().items()}
    for field in [field for field, size in sizes.items() if size == -1][1:]:
        raise UserError(f"{field}=-1: only one size may be -1")
    _at_least(1, {field: size for field, size in sizes.items() if size != -1} | {"mesh.slices": mesh.slices})
    _one_of("mesh.slice_axis", mesh.slice_axis, ("data", "fsdp", "stage"))
    _one_of("mesh.zero", mesh.zero, (1, 2, 3))
    _at_least(0, {"loss.chunk_tokens": experiment.loss.chunk_tokens})
    _at_least(
        0, {f"run.{f}": getattr(run, f) for f in ("seed", "eval_every", "eval_batches", "save_every", "keep_every")}
    )
    _at_least(0, {"run.watchdog_seconds": run.watchdog_seconds})
    _at_least(
        0,
        {
            f"optimizer.{f}": getattr(optimizer, f)
            for f in ("warmup_steps", "weight_decay", "clip_norm", "learning_rate", "local_steps")
        },
    )
    _at_least(0, {f"loss.{f}": getattr(experiment.loss, f) for f in ("z_loss", "balance_loss", "router_z_loss")})
    _at_least(0, {"optimizer.router_bias_rate": optimizer.router_bias_rate})
    for field in ("balance_loss", "router_z_loss"):
        if (value := getattr(experiment.loss, field)) and not experiment.model.experts:
            raise UserError(f"loss.{field}={value}: has no effect with model.experts=0; give model.experts")
    _one_of("optimizer.name", optimizer.name, ("adamw", "adafactor", "lion", "sgd", "muon"))
    _one_of("optimizer.schedule", optimizer.schedule, ("cosine", "linear", "wsd", "constant"))
    _one_of("data.invalid_utf8", data.invalid_utf8, ("replace", "refuse"))
    for field, value in (
        ("data.holdout", data.holdout),
        ("loss.label_smoothing", experiment.loss.label_smoothing),
        ("optimizer.ema_decay", optimizer.ema_decay),
        ("optimizer.beta1", optimizer.beta1),
        ("optimizer.beta2", optimizer.beta2),
        ("optimizer.outer_momentum", optimizer.outer_momentum),
    ):
        if not 0.0 <= value < 1.0:
            raise UserError(f"{field}={value}: must be at least 0 and below 1")
    if not 0.0 <= optimizer.final_fraction <= 1.0:
        raise UserError(f"optimizer.final_fraction={optimizer.final_fraction}: must be between 0 and 1")
    if run.spike_factor <= 1.0:
        raise UserError(f"run.spike_factor={run.spike_factor}: must be above 1")
    if optimizer.eps <= 0:
        raise UserError(f"optimizer.eps={optimizer.eps}: must be positive")
    if run.seed >= 2**32:
        raise UserError(f"run.seed={run.seed}: must be below 2^32; larger ones would repeat the draws of smaller ones")
    if not data.sources:
        raise UserError("data.sources=(): name at least one source")
    if data.weights and len(data.weights) != len(data.sources):
        raise UserError(
            f"data.weights={data.weights}: needs one weight for each of the {len(data.sources)} data.sources"
        )
    if any(w <= 0 for w in data.weights):
        raise UserError(f"data.weights={data.weights}: every weight must be positive")
    if data.bpe_vocab_size > experiment.model.vocab_size:
        raise UserError(
            f"data.bpe_vocab_size={data.bpe_vocab_size}: larger than model.vocab_size={experiment.model.vocab_size}"
        )
    if data.tokenizer == "bpe" and data.bpe_vocab_size < 257:
        raise UserError(
            f"data.bpe_vocab_size={data.bpe_vocab_size}: must be at least 257 (256 bytes and end of document)"
        )
    experiment.model.check_context(data.context, "data.context")
    _check_memory(experiment)
    if data.batch_size % optimizer.accumulation:
        raise UserError(
            f"optimizer.accumulation={optimizer.accumulation}: does not divide data.batch_size={data.batch_size}"
        )
    _check_objective(experiment)
    _check_local_steps(optimizer, run)
    _check_adapter(experiment)
    if optimizer.schedule != "constant" and optimizer.warmup_steps >= run.steps:
        raise UserError(f"optimizer.warmup_steps={optimizer.warmup_steps}: must be below run.steps={run.steps}")
    if optimizer.schedule == "wsd" and optimizer.warmup_steps + optimizer.decay_steps > run.steps:
        raise UserError(
            f"optimizer.decay_steps={optimizer.decay_steps}: with optimizer.warmup_steps={optimizer.warmup_steps} "
            f"exceeds run.steps={run.steps}"
        )


def _check_objective(experiment: Experiment) -> None:
    model, objective, data = experiment.model, experiment.objective, experiment.data
    _one_of("objective.name", objective.name, tuple(OBJECTIVES))
    kind, head = OBJECTIVES[objective.name]
    kinds = (kind, "encoder") if objective.name == "contrastive" else (kind,)
    for field, wanted in (("kind", kind), ("head", head)):
        if getattr(model, field) not in (kinds if field == "kind" else (head,)):
            raise UserError(
                f"model.{field}={getattr(model, field)!r}: objective.name={objective.name!r} trains "
                f"model.{field}={wanted!r}"
            )
    _check_sight(experiment)
    if objective.name == "span" and model.labels != 2:
        raise UserError(f"model.labels={model.labels}: objective.name='span' needs 2, the first token and the last")
    if model.next_sentence and (model.token_types < 2 or data.context < 2):
        raise UserError(
            f"model.token_types={model.token_types}: model.next_sentence needs at least 2, and as large a data.context"
        )
    if not 0.0 < objective.corruption < 1.0:
        raise UserError(f"objective.corruption={objective.corruption}: must be between 0 and 1")
    if objective.span_length < 1.0:
        raise UserError(f"objective.span_length={objective.span_length}: must be at least 1")
    if objective.special_token >= model.vocab_size:
        raise UserError(
            f"objective.special_token={objective.special_token}: must be below model.vocab_size={model.vocab_size}"
        )
    last = data.context if objective.name != "span_corruption" else objective.spans(data.context)[1]
    if objective.name == "span_corruption" and (data.context < 2 or 0 <= objective.special_token < last - 1):
        raise UserError(
            f"objective.special_token={objective.special_token}: data.context={data.context} has {last} sentinels, "
            "which go down from it to at least 0"
        )
    if data.target_context < 0:
        raise UserError(f"data.target_context={data.target_context}: must not be negative")


def _check_sight(experiment: Experiment) -> None:
    """Raises UserError where images, objective and rows do not go together."""
    model, objective, data = experiment.model, experiment.objective, experiment.data
    _at_least(1, {f"data.{field}": getattr(data, field) for field in ("images", "max_tiles", "patches")})
    _at_least(0, {"data.frames": data.frames})
    _one_of("data.image_fit", data.image_fit, ("squash", "pad", "crop", "tiles", "native"))
    _one_of("data.image_resample", data.image_resample, ("bicubic", "bilinear"))
    packs = model.fusion == "merge" and model.vision.encoder == "vit" and model.vision.stem == "patches"
    if data.image_fit == "native" and not (packs and model.vision.positions in ("rope", "sincos")):
        raise UserError(
            "data.image_fit='native': needs model.fusion='merge' and a vit on patches with model.vision.positions rope "
            "or sincos"
        )
    if data.image_fit == "native" and (model.vision.class_token or model.vision.connector == "perceiver"):
        raise UserError("data.image_fit='native': not with model.vision.class_token or connector='perceiver'")
    if 0 < model.vision.image_positions < data.images and model.fusion not in ("none", "contrastive"):
        raise UserError(
            f"data.images={data.images}: model.vision.image_positions={model.vision.image_positions} tells no more "
            "images of a row apart; give at least as many, or 0"
        )
    if data.image_fit in ("tiles", "native") and (model.vision.image_width or model.vision.patch_width):
        raise UserError(f"data.image_fit={data.image_fit!r}: not with model.vision.image_width or patch_width")
    if data.max_megapixels <= 0:
        raise UserError(f"data.max_megapixels={data.max_megapixels}: must be positive")
    if not 0.0 <= data.max_bad_fraction <= 1.0:
        raise UserError(f"data.max_bad_fraction={data.max_bad_fraction}: must be between 0 and 1")
    for field in ("user_format", "assistant_format"):
        if getattr(data, field).count("{}") != 1:
            raise UserError(f"data.{field}={getattr(data, field)!r}: must hold {{}} once, where the text stands")
        if IMAGE in getattr(data, field):
            raise UserError(f"data.{field}={getattr(data, field)!r}: {IMAGE} stands in the text of a turn, not here")
    if (objective.name == "contrastive") != (model.fusion == "contrastive"):
        raise UserError(
            f"objective.name={objective.name!r}: model.fusion={model.fusion!r}; 'contrastive' goes with 'contrastive'"
        )
    if model.fusion not in ("none", "contrastive") and objective.name != "conversation":
        raise UserError(
            f"objective.name={objective.name!r}: model.fusion={model.fusion!r} reads images in conversations; give "
            "objective.name='conversation'"
        )
    if objective.name == "contrastive":
        if data.batch_size == 1:
            raise UserError(
                "data.batch_size=1: objective.name='contrastive' compares the rows of a batch; give 2 or more"
            )
        if experiment.optimizer.accumulation > 1 or experiment.optimizer.local_steps:
            raise UserError(
                f"optimizer.accumulation={experiment.optimizer.accumulation}: objective.name='contrastive' compares "
                "all rows of a batch with each other; give 1, and optimizer.local_steps=0"
            )
    _check_room(experiment)


def _check_room(experiment: Experiment) -> None:
    """Raises UserError where a row holds too few images, or too few tokens for what they become."""
    model, objective, data = experiment.model, experiment.objective, experiment.data
    tiles = data.image_fit == "tiles" and model.vision.encoder != "none"
    if tiles and objective.name in ("contrastive", "image_classification"):
        raise UserError(
            f"data.image_fit='tiles': objective.name={objective.name!r} takes one image a row; give squash, pad or crop"
        )
    if tiles and data.images < 2:
        raise UserError(
            f"data.images={data.images}: data.image_fit='tiles' makes at least 2 images of each, and up to 1 + "
            f"data.max_tiles = {1 + data.max_tiles}; give as many"
        )
    if objective.name != "conversation" or model.fusion != "merge":
        return
    if data.image_fit == "native":
        most = data.patches // model.vision.shrink**2
        if data.context <= most:
            raise UserError(
                f"data.context={data.context}: the images of a row take up to {most} tokens; give more, or fewer "
                "data.patches"
            )
        return
    vectors = model.vision.vectors * (2 if tiles else 1)
    if data.context <= vectors:
        raise UserError(
            f"data.context={data.context}: one image takes {vectors} tokens; give more, or a larger "
            "model.vision.patch_size or a connector that makes fewer of them"
        )


def _check_memory(experiment: Experiment) -> None:
    model, data = experiment.model, experiment.data
    if model.remembers and not data.contiguous:
        raise UserError(
            f"model.memory={model.memory}, model.knn_memory={model.knn_memory}: rows must go on from batch to batch to "
            "be remembered; give data.contiguous=True"
        )
    if data.contiguous and model.positions == "learned":
        raise UserError("data.contiguous=True: positions go on from row to row, beyond the table of learned ones")
    if data.contiguous and data.weights:
        raise UserError(f"data.weights={data.weights}: not with data.contiguous=True, which takes sources as they are")
    if model.remembers and experiment.optimizer.local_steps:
        raise UserError(f"optimizer.local_steps={experiment.optimizer.local_steps}: not with a model that remembers")


def _check_local_steps(optimizer: OptimizerConfig, run: RunConfig) -> None:
    if optimizer.outer_learning_rate <= 0:
        raise UserError(f"optimizer.outer_learning_rate={optimizer.outer_learning_rate}: must be positive")
    if not optimizer.local_steps:
        return
    for field in ("ema_decay", "offload"):
        if value := getattr(optimizer, field):
            raise UserError(f"optimizer.{field}={value}: not with optimizer.local_steps={optimizer.local_steps}")
    if run.steps % optimizer.local_steps:
        raise UserError(
            f"run.steps={run.steps}: not a multiple of optimizer.local_steps={optimizer.local_steps}; the steps after "
            "the last exchange would be lost"
        )


def _check_adapter(experiment: Experiment) -> None:
    adapter = experiment.adapter
    _one_of("adapter.kind", adapter.kind, ("none", "lora", "dora", "bottleneck", "prefix", "bias"))
    _at_least(1, {f"adapter.{f}": getattr(adapter, f) for f in ("rank", "bottleneck_dim", "prefix_tokens")})
    if not 0.0 <= adapter.dropout < 1.0:
        raise UserError(f"adapter.dropout={adapter.dropout}: must be at least 0 and below 1")
    if adapter.alpha <= 0:
        raise UserError(f"adapter.alpha={adapter.alpha}: must be positive")
    if not adapter.targets:
        raise UserError("adapter.targets=(): name at least one pattern, such as 'attention'")
    for field, patterns in (("adapter.targets", adapter.targets), ("optimizer.frozen", experiment.optimizer.frozen)):
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"{field}: {pattern!r} is no regular expression: {error}") from error
    if adapter.kind != "none" and (experiment.optimizer.frozen or experiment.run.start):
        raise UserError(
            "optimizer.frozen, run.start: not with an adapter, whose base is frozen and given; leave them out"
        )
    if adapter.kind != "none" and experiment.optimizer.local_steps:
        raise UserError(
            f"optimizer.local_steps={experiment.optimizer.local_steps}: not with adapter.kind={adapter.kind!r}; give 0"
        )


def check_mesh(experiment: Experiment) -> None:
    """Raises UserError where a dimension of the model or the batch does not divide by the mesh axes that cut it."""
    model, data, mesh = experiment.model, experiment.data, experiment.mesh
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
    if mesh.stage > 1 and model.platform == "cpu" and model.compute_dtype == "bfloat16":
        raise UserError(
            f"model.compute_dtype=bfloat16: XLA cannot compile it for CPUs with mesh.stage={mesh.stage}; give "
            "model.compute_dtype=float32"
        )
    for axis in ("sequence", "stage"):
        if model.kind != "decoder" and (axis == "sequence" or model.kind != "encoder") and getattr(mesh, axis) > 1:
            raise UserError(f"mesh.{axis}={getattr(mesh, axis)}: not with model.kind={model.kind!r}; give 1")
    if mesh.sequence > 1 and (field := model.needs_whole_rows):
        raise UserError(f"{field}: needs whole rows, and mesh.sequence={mesh.sequence} cuts them; give mesh.sequence=1")
    if mesh.stage > 1 and model.remembers:
        raise UserError(f"mesh.stage={mesh.stage}: not with a model that remembers (model.memory, model.knn_memory)")
    if mesh.stage > 1 and model.fusion in ("co", "tangled"):
        raise UserError(
            f"mesh.stage={mesh.stage}: not with model.fusion={model.fusion!r}, which runs its layers between "
            "connections and never as a pipeline; give 1"
        )
    accumulation = experiment.optimizer.accumulation
    microbatches = model.pipeline_microbatches or mesh.stage
    pipeline = microbatches if mesh.stage > 1 else 1
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
    if mesh.sequence > 1 and model.capacity_factor:
        raise UserError(
            f"model.capacity_factor={model.capacity_factor}: counts the tokens of whole rows, and "
            f"mesh.sequence={mesh.sequence} cuts them; give model.capacity_factor=0 (dropless)"
        )
    if mesh.sequence > 1 and model.context_parallel == "ulysses":
        for field, heads in (("heads", model.heads), ("kv_heads", model.kv_heads)):
            if heads % (mesh.sequence * mesh.tensor):
                raise UserError(
                    f"model.{field}={heads}: model.context_parallel='ulysses' needs a multiple of mesh.sequence * "
                    f"mesh.tensor = {mesh.sequence * mesh.tensor}; or take 'ring'"
                )
    if mesh.stage > 1 and model.share_layers != "none":
        raise UserError(
            f"mesh.stage={mesh.stage}: a pipeline needs layers of their own, and model.share_layers="
            f"{model.share_layers!r}; give mesh.stage=1"
        )
    adapter = experiment.adapter
    ring = mesh.sequence > 1 and model.context_parallel == "ring"
    if adapter.kind in ("lora", "dora") and adapter.dropout and (ring or mesh.stage > 1):
        raise UserError(
            f"adapter.dropout={adapter.dropout}: not with mesh.stage={mesh.stage}, nor with mesh.sequence="
            f"{mesh.sequence} where model.context_parallel='ring'; give 0"
        )
    for field in ("embedding_dropout", "attention_dropout", "residual_dropout"):
        if mesh.sequence > 1 and model.context_parallel == "ring" and getattr(model, field):
            raise UserError(
                f"model.{field}={getattr(model, field)}: with mesh.sequence={mesh.sequence} and "
                "model.context_parallel='ring' rows lie in another order, which would drop other elements; take "
                "'ulysses'"
            )
    if mesh.sequence > 1 and model.context_parallel == "ring" and data.context % (2 * mesh.sequence):
        raise UserError(f"data.context={data.context}: not a multiple of 2 * mesh.sequence = {2 * mesh.sequence}")
    if mesh.stage > 1:
        groups, parts = model.layers // len(model.pattern), mesh.stage * model.pipeline_repeats
        if groups % parts:
            raise UserError(
                f"mesh.stage={mesh.stage}: {groups} groups of layers do not divide into mesh.stage * "
                f"model.pipeline_repeats = {parts} parts"
            )
        if microbatches % mesh.stage:
            raise UserError(f"model.pipeline_microbatches={microbatches}: not a multiple of mesh.stage={mesh.stage}")


def _at_least(minimum: int, fields: dict[str, float]) -> None:
    for field, value in fields.items():
        if value < minimum:
            raise UserError(f"{field}={value}: must be at least {minimum}")


def _one_of(field: str, value: Any, valid: tuple[Any, ...]) -> None:
    if value not in valid:
        raise UserError(f"{field}={value!r}: valid: {', '.join(map(str, valid))}")

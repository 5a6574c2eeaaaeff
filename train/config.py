"""The experiment: one tree of typed dataclasses, its checks across branches, and its JSON form."""

# No postponed annotations here: ml_collections reads the fields' types as they stand.
import dataclasses
import functools
import math
import re
import typing
from typing import Any

from model.config import ModelConfig
from tpu.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor", "sequence", "expert", "stage")  # the order in which people read them


@dataclasses.dataclass
class DataConfig:
    """What is read, how it is cut into tokens and rows."""

    sources: tuple[str, ...] = ("python_docs",)  # python_docs, a glob of files, or tfds:NAME[:SPLIT]
    weights: tuple[float, ...] = ()  # share of rows from each source; (): in proportion to their tokens
    text_field: str = "text"  # of .jsonl, .parquet and TensorFlow Datasets records
    tfds_dir: str = ""  # "": the data_dir of tensorflow-datasets
    invalid_utf8: str = "replace"  # or "refuse"
    holdout: float = 0.05  # share of documents kept for evaluation, chosen by hash
    tokenizer: str = "bpe"  # bytes, bpe (trained on the sources), a tokenizer.json or a sentencepiece .model
    bpe_vocab_size: int = 0  # 0: model.vocab_size
    context: int = 256  # tokens per row
    batch_size: int = 12  # rows per step, over all devices
    prefetch: int = 4  # batches made ahead
    contiguous: bool = False  # row b of a batch goes on where row b of the batch before ended (for model.memory)
    cache_dir: str = ""  # "": $FOURSIGHT_CACHE, else ~/.cache/foursight
    label_field: str = "label"  # of labelled records (train.data.labelled)
    pair_field: str = ""  # of labelled records: a second text, such as a question about the first; "": there is none
    target_context: int = 0  # tokens of a sequence_to_sequence target; 0: data.context
    images: int = 1  # images per row, at most (of a model that sees); train.data.conversations says what is read
    image_fit: str = "squash"  # what makes an image square: squash, pad or crop (train.data.resize)
    image_field: str = "image"  # of TensorFlow Datasets records
    caption_field: str = "caption"  # of TensorFlow Datasets and of the JSON of tar shards
    user_format: str = "{}\n"  # what is given of a conversation, {} standing for the text
    assistant_format: str = "{}"  # what is answered; the end of the document follows
    max_bad_fraction: float = 0.01  # of the records read, that may be left out because they cannot be read


# What objective.name may be, and the model.kind and model.head that it trains.
OBJECTIVES = {
    "next_token": ("decoder", "language"),
    "masked": ("encoder", "language"),  # BERT (arXiv:1810.04805, section 3.1)
    "classification": ("encoder", "pooled"),
    "regression": ("encoder", "pooled"),
    "multi_label": ("encoder", "pooled"),
    "token_classification": ("encoder", "token"),
    "span": ("encoder", "token"),  # the first and last token of an answer
    "span_corruption": ("encoder_decoder", "language"),  # T5 (arXiv:1910.10683, section 3.1.4)
    "sequence_to_sequence": ("encoder_decoder", "language"),
    "conversation": ("decoder", "language"),  # what one side says, with images or without (train.data.conversations)
    "contrastive": ("decoder", "language"),  # CLIP, SigLIP (train.contrastive_loss)
    "image_classification": ("vision", "language"),
}
# Objectives that read labelled records, and of these the ones whose head gives labels instead of tokens.
LABELLED = ("classification", "regression", "multi_label", "token_classification", "span", "sequence_to_sequence")
LABEL_HEADS = LABELLED[:-1]
# Objectives that read conversations about images, and of these the ones that score by right answers.
CONVERSATIONS = ("conversation", "contrastive", "image_classification")
SCORED = (*LABEL_HEADS, *CONVERSATIONS[1:])


@dataclasses.dataclass
class ObjectiveConfig:
    """What is to be predicted."""

    name: str = "next_token"  # one of OBJECTIVES
    corruption: float = 0.15  # of masked and span_corruption: the share of tokens to predict
    span_length: float = 3.0  # of span_corruption: the mean length of what is cut out
    special_token: int = -1  # the mask, or the first sentinel, the others below it; -1: model.vocab_size - 1

    def spans(self, context: int) -> tuple[int, int]:
        """Of span_corruption: how many tokens of a row are cut out, and in how many spans."""
        noise = min(max(round(context * self.corruption), 1), context - 1)
        return noise, min(max(round(noise / self.span_length), 1), noise, context - noise)

    def special_tokens(self, context: int) -> int:
        """How many of the last ids of model.vocab_size must be no token of the tokenizer."""
        if self.special_token >= 0:
            return 0
        return {"masked": 1, "span_corruption": self.spans(context)[1]}.get(self.name, 0)


@dataclasses.dataclass
class LossConfig:
    """Terms of the language-modelling loss."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0  # weight of log(Z)^2 (PaLM, arXiv:2204.02311, section 5)
    balance_loss: float = 0.0  # weight of the experts' load-balance loss (Switch: 0.01); see train.balance
    router_z_loss: float = 0.0  # weight of the routers' z-loss (ST-MoE: 0.001)
    chunk_tokens: int = 0  # tokens whose logits exist at one time; 0: as many as make 64 MiB of logits


@dataclasses.dataclass
class OptimizerConfig:
    """The update rule and its schedule."""

    name: str = "adamw"  # adamw, adafactor, lion, sgd, muon
    learning_rate: float = 1e-3
    schedule: str = "cosine"  # cosine, linear, wsd (warmup-stable-decay), constant
    warmup_steps: int = 100
    decay_steps: int = 0  # of wsd; 0: a fifth of run.steps
    final_fraction: float = 0.1  # learning rate at the last step, as a share of the highest
    beta1: float = 0.9  # adamw, lion, muon's adam; momentum of sgd and muon
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    # weights whose path holds one of these
    no_decay: tuple[str, ...] = ("norm", "bias", "embedding", "_token", "_gate", "latents", "probe", "logit_scale")
    frozen: tuple[str, ...] = ()  # weights whose path one of these patterns is found in stay bitwise as they are
    clip_norm: float = 1.0  # 0: no clipping
    accumulation: int = 1  # micro-batches per step
    ema_decay: float = 0.0  # 0: no moving average of the weights
    router_bias_rate: float = 1e-3  # with model.router_bias: how far a step moves each of its entries
    offload: bool = False  # keep the optimizer's state in the hosts' memory (TPU, GPU)
    local_steps: int = 0  # steps that each copy of the weights along mesh.data takes by itself (DiLoCo); 0: synchronous
    outer_learning_rate: float = 0.7  # with local_steps: of SGD with Nesterov's momentum, on the copies' mean change
    outer_momentum: float = 0.9


@dataclasses.dataclass
class MeshConfig:
    """Devices along each mesh axis; their product is the device count. One of them may be -1: all that remain."""

    data: int = 1  # copies of the weights, each with its share of the batch
    fsdp: int = (
        1  # ZeRO: each device keeps a part of the weights and of the optimizer's state, and a share of the batch
    )
    tensor: int = 1  # heads and mlp columns (Megatron)
    sequence: int = 1  # tokens of a row (model.context_parallel)
    expert: int = 1  # experts; a dense model takes it as more fsdp
    stage: int = 1  # pipeline stages
    slices: int = 1  # parts of the machine with only a slow network between them
    slice_axis: str = "data"  # the axis that they lie along: data, fsdp or stage
    zero: int = 3  # what lies in parts along fsdp. 1: optimizer state; 2: gradients too; 3: weights too

    def filled(self, devices: int) -> "MeshConfig":
        """A copy in which -1 is what remains of `devices`. Raises UserError where they do not divide."""
        given = {axis: getattr(self, axis) for axis in MESH_AXES}
        known = math.prod(size for size in given.values() if size != -1)
        if -1 not in given.values():
            return dataclasses.replace(self)
        if devices % known:
            named = " * ".join(f"mesh.{axis}={size}" for axis, size in given.items() if size > 1)
            raise UserError(f"{named} = {known}: does not divide the {devices} devices")
        return dataclasses.replace(self, **{axis: devices // known for axis, size in given.items() if size == -1})


@dataclasses.dataclass
class RunConfig:
    """How long, how often, what is kept."""

    steps: int = 1000
    seed: int = 0
    start: tuple[
        str, ...
    ] = ()  # checkpoints whose weights are taken where path and shape agree; the first that has one
    eval_every: int = 250  # 0: only at the end
    eval_batches: int = 0  # 0: the whole held-out set
    save_every: int = 250  # 0: only at the end
    keep_last: int = 3
    keep_every: int = 0  # keep every step that is a multiple; 0: none
    keep_best: bool = False  # keep the step with the lowest held-out loss
    log_every: int = 10
    watchdog_seconds: int = 3600  # without a step end the process, which tells where it hangs; 0: never
    max_bad_steps: int = 20  # non-finite steps in a row that stop the run
    spike_factor: float = 1.5  # a loss this many times its running mean is logged as a spike
    tensorboard: bool = True


@dataclasses.dataclass
class AdapterConfig:
    """What is trained beside frozen weights, by `train.finetune` (see train.adapter_weights)."""

    kind: str = "none"  # lora, dora, bottleneck, prefix, bias (BitFit); none: all weights are trained
    targets: tuple[str, ...] = (r"attention\.(query|value)$",)  # of lora, dora: patterns, found in the matrices' paths
    rank: int = 8  # of lora, dora
    alpha: float = 16.0  # what is added is scaled by alpha / rank
    rslora: bool = False  # by alpha / sqrt(rank) instead (arXiv:2312.03732)
    dropout: float = 0.0  # of what lora and dora multiply
    bottleneck_dim: int = 64  # of bottleneck
    prefix_tokens: int = 16  # of prefix


# kind of adapter: the field, of that name in AdapterConfig and ModelConfig, by which the model has its modules
ADDED_FIELDS = {"bottleneck": "bottleneck_dim", "prefix": "prefix_tokens"}


@dataclasses.dataclass
class Experiment:
    """Everything that decides what a run computes."""

    name: str = "experiment"
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    run: RunConfig = dataclasses.field(default_factory=RunConfig)
    adapter: AdapterConfig = dataclasses.field(default_factory=AdapterConfig)

    def resolved(self) -> "Experiment":
        """Returns a copy with derived fields filled in. Raises UserError naming the field that cannot be."""
        check_types(self)
        experiment = dataclasses.replace(
            self,
            model=self.model.resolved(),
            **{
                f: dataclasses.replace(getattr(self, f))
                for f in ("data", "loss", "optimizer", "mesh", "run", "adapter")
            },
        )
        experiment.objective = dataclasses.replace(self.objective)
        if field := ADDED_FIELDS.get(experiment.adapter.kind):
            setattr(experiment.model, field, getattr(experiment.adapter, field))
        if not experiment.data.bpe_vocab_size:
            reserved = experiment.objective.special_tokens(experiment.data.context)
            experiment.data.bpe_vocab_size = experiment.model.vocab_size - reserved
        if not experiment.optimizer.decay_steps:
            experiment.optimizer.decay_steps = max(1, experiment.run.steps // 5)
        _check(experiment)
        if -1 not in (getattr(experiment.mesh, axis) for axis in MESH_AXES):
            _check_mesh(experiment)
        return experiment

    def on(self, devices: int) -> "Experiment":
        """Returns a copy whose mesh is decided for so many devices. Raises UserError where it does not fit them."""
        experiment = dataclasses.replace(self, mesh=self.mesh.filled(devices))
        _check_mesh(experiment)
        return experiment


def _check(experiment: Experiment) -> None:
    data, optimizer, mesh, run = experiment.data, experiment.optimizer, experiment.mesh, experiment.run
    _at_least(1, {"data.context": data.context, "data.batch_size": data.batch_size, "data.prefetch": data.prefetch})
    _at_least(1, {"run.steps": run.steps, "run.keep_last": run.keep_last, "run.log_every": run.log_every})
    _at_least(1, {"run.max_bad_steps": run.max_bad_steps, "optimizer.accumulation": optimizer.accumulation})
    sizes = {f"mesh.{axis}": getattr(mesh, axis) for axis in MESH_AXES}
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
    _at_least(1, {"data.images": data.images})
    _one_of("data.image_fit", data.image_fit, ("squash", "pad", "crop"))
    if not 0.0 <= data.max_bad_fraction <= 1.0:
        raise UserError(f"data.max_bad_fraction={data.max_bad_fraction}: must be between 0 and 1")
    for field in ("user_format", "assistant_format"):
        if getattr(data, field).count("{}") != 1:
            raise UserError(f"data.{field}={getattr(data, field)!r}: must hold {{}} once, where the text stands")
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
    if objective.name == "conversation" and model.fusion == "merge" and data.context <= model.vision.vectors:
        raise UserError(
            f"data.context={data.context}: one image takes {model.vision.vectors} tokens; give more, or a larger "
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


def _check_mesh(experiment: Experiment) -> None:
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


_hints = functools.cache(typing.get_type_hints)  # A planner checks ten thousands of experiments.


def check_types(tree: Any, prefix: str = "") -> None:
    """Raises UserError for the first field of a dataclass tree whose value is not of its declared type."""
    hints = _hints(type(tree))
    for field in dataclasses.fields(tree):
        value, hint, name = getattr(tree, field.name), hints[field.name], prefix + field.name
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, hint):
                raise UserError(f"{name}={value!r}: must be a {hint.__name__}")
            check_types(value, name + ".")
        elif not _is_of(value, hint):
            raise UserError(f"{name}={value!r}: must be {type_name(hint)}")


def _is_of(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_is_of(v, typing.get_args(hint)[0]) for v in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def type_name(hint: Any) -> str:
    """A declared type in words."""
    if typing.get_origin(hint) is tuple:
        return f"a tuple of {typing.get_args(hint)[0].__name__}"
    return {"int": "an integer", "float": "a finite number", "bool": "true or false", "str": "a string"}[hint.__name__]


def to_dict(tree: Any) -> dict[str, Any]:
    """The tree as nested dictionaries that `json` can write (tuples become lists)."""
    return {
        f.name: to_dict(v) if dataclasses.is_dataclass(v) else list(v) if isinstance(v, tuple) else v
        for f in dataclasses.fields(tree)
        for v in [getattr(tree, f.name)]
    }


def from_dict(cls: type, tree: dict[str, Any], prefix: str = "") -> Any:
    """Builds the dataclass `cls` from what `to_dict` gave. Raises UserError for a field that `cls` does not have."""
    hints = _hints(cls)
    unknown = sorted(set(tree) - set(hints))
    if unknown:
        raise UserError(f"{prefix}{unknown[0]}: no such field; valid: {', '.join(hints)}")
    values = {}
    for name, value in tree.items():
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            value = from_dict(hint, value, f"{prefix}{name}.")
        elif typing.get_origin(hint) is tuple:
            value = tuple(value)
        values[name] = value
    return cls(**values)


def differences(a: Any, b: Any, prefix: str = "") -> list[str]:
    """The fields in which two trees of one type differ, as `name: value of a, value of b`."""
    rows = []
    for field in dataclasses.fields(a):
        x, y, name = getattr(a, field.name), getattr(b, field.name), prefix + field.name
        if dataclasses.is_dataclass(x):
            rows += differences(x, y, name + ".")
        elif x != y:
            rows.append(f"{name}: {x!r}, {y!r}")
    return rows

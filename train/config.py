"""The experiment: one tree of typed dataclasses. train/resolve.py derives the rest and checks the whole."""

# No postponed annotations here: ml_collections reads the fields' types as they stand.
import dataclasses
import math

from model.config import ModelConfig
from model.fields.limits import choice, given, number
from tpu.errors import UserError

CORRUPTING = {"objective.name": ("masked", "span_corruption")}
LOW_RANK = {"adapter.kind": ("lora", "dora")}


@dataclasses.dataclass
class DataConfig:
    """What is read, how it is cut into tokens and rows."""

    sources: tuple[str, ...] = ("python_docs",)  # python_docs, a glob of files, or tfds:NAME[:SPLIT]
    weights: tuple[float, ...] = ()  # share of rows from each source; (): in proportion to their tokens
    text_field: str = "text"  # of .jsonl, .parquet and TensorFlow Datasets records
    tfds_dir: str = ""  # "": the data_dir of tensorflow-datasets
    invalid_utf8: str = choice("replace", "refuse")
    holdout: float = number(0.05, at_least=0, below=1)  # share of documents kept for evaluation, chosen by hash
    # bytes, bpe (trained on the sources), a tokenizer.json or a sentencepiece .model
    tokenizer: str = given("bpe", from_base=True)
    bpe_vocab_size: int = given(0, from_base=True)  # 0: model.vocab_size
    context: int = number(256, at_least=1)  # tokens per row
    batch_size: int = number(12, at_least=1)  # rows per step, over all devices
    prefetch: int = number(4, at_least=1)  # batches made ahead
    contiguous: bool = False  # row b of a batch goes on where row b of the batch before ended (for model.memory)
    cache_dir: str = ""  # "": $FOURSIGHT_CACHE, else ~/.cache/foursight
    label_field: str = "label"  # of labelled records (train.data.text.labelled)
    pair_field: str = ""  # of labelled records: a second text, such as a question about the first; "": there is none
    # tokens of a target; 0: data.context
    target_context: int = number(0, at_least=0, of={"objective.name": ("sequence_to_sequence",)})
    # images per row, at most (of a model that sees); train.data.chat.rows says what is read
    images: int = number(1, at_least=1, from_base=True, free=True)
    # how images are made to fit (train.data.images.look)
    image_fit: str = choice("squash", "pad", "crop", "tiles", "native", from_base=True, free=True)
    # the filter of their resizing; antialiased, as Pillow's
    image_resample: str = choice("bicubic", "bilinear", from_base=True, free=True)
    # only with tiles: most of one image, in addition to its overview
    max_tiles: int = number(4, at_least=1, from_base=True, free=True)
    # only with native: patches of all images of a row, at most
    patches: int = number(256, at_least=1, from_base=True, free=True)
    max_megapixels: float = number(40.0, above=0)  # of an image, 10^6 pixels: larger ones are bad records
    # of an animated file, taken as images with times; 0: the first alone
    frames: int = number(0, at_least=0, from_base=True, free=True)
    image_field: str = "image"  # of TensorFlow Datasets records
    caption_field: str = "caption"  # of TensorFlow Datasets and of the JSON of tar shards
    # what is given of a conversation, {} standing for the text
    user_format: str = given("{}\n", from_base=True, free=True)
    # what is answered, after what stands before {}; the end of the document follows
    assistant_format: str = given("{}", from_base=True, free=True)
    # of the records read, that may be bad and left out; ten may where it is above 0
    max_bad_fraction: float = number(0.01, at_least=0, at_most=1)


@dataclasses.dataclass
class ObjectiveConfig:
    """What is to be predicted."""

    name: str = "next_token"  # one of train.objectives.table.OBJECTIVES
    corruption: float = number(0.15, above=0, below=1, of=CORRUPTING)  # the share of tokens to predict
    # the mean length of what is cut out
    span_length: float = number(3.0, at_least=1, of={"objective.name": ("span_corruption",)})
    # the mask, or the first sentinel, the others below it; -1: model.vocab_size - 1
    special_token: int = given(-1, of=CORRUPTING)


@dataclasses.dataclass
class LossConfig:
    """Terms of the language-modelling loss."""

    label_smoothing: float = number(0.0, at_least=0, below=1)
    z_loss: float = number(0.0, at_least=0)  # weight of log(Z)^2 (PaLM, arXiv:2204.02311, section 5)
    # weight of the experts' load-balance loss (Switch: 0.01); see train.optimize.balance
    balance_loss: float = number(0.0, at_least=0, of={"model.experts": ()})
    # weight of the routers' z-loss (ST-MoE: 0.001)
    router_z_loss: float = number(0.0, at_least=0, of={"model.experts": ()})
    # tokens whose logits exist at one time; 0: as many as make 64 MiB of logits
    chunk_tokens: int = number(0, at_least=0)


@dataclasses.dataclass
class OptimizerConfig:
    """The update rule and its schedule."""

    name: str = choice("adamw", "adafactor", "lion", "sgd", "muon")
    learning_rate: float = number(1e-3, at_least=0)
    schedule: str = choice("cosine", "linear", "wsd", "constant")  # wsd: warmup-stable-decay
    warmup_steps: int = number(100, at_least=0)
    decay_steps: int = 0  # of wsd; 0: a fifth of run.steps
    # learning rate at the last step, as a share of the highest
    final_fraction: float = number(0.1, at_least=0, at_most=1)
    beta1: float = number(0.9, at_least=0, below=1)  # adamw, lion, muon's adam; momentum of sgd and muon
    beta2: float = number(0.95, at_least=0, below=1)
    eps: float = number(1e-8, above=0)
    weight_decay: float = number(0.1, at_least=0)
    # what the weights that decay lose of their size by the learning rate, down to exactly 0 (train.optimize.l1_penalty)
    l1_penalty: float = number(0.0, at_least=0)
    # weights whose path holds one of these
    no_decay: tuple[str, ...] = ("norm", "bias", "embedding", "_token", "_gate", "latents", "probe", "logit_scale")
    frozen: tuple[str, ...] = ()  # weights whose path one of these patterns is found in stay bitwise as they are
    # variance of the noise on the clipped gradient, which falls as 1 / step^0.55 (arXiv:1511.06807): 0.01 to 1; 0: none
    gradient_noise: float = number(0.0, at_least=0)
    clip_norm: float = number(1.0, at_least=0)  # 0: no clipping
    accumulation: int = number(1, at_least=1)  # micro-batches per step
    ema_decay: float = number(0.0, at_least=0, below=1)  # 0: no moving average of the weights
    # how far a step moves each entry of the routers' biases
    router_bias_rate: float = number(1e-3, at_least=0, of={"model.router_bias": ()})
    offload: bool = False  # keep the optimizer's state in the hosts' memory (TPU, GPU)
    # steps that each copy of the weights along mesh.data takes by itself (DiLoCo); 0: synchronous
    local_steps: int = number(0, at_least=0)
    # of SGD with Nesterov's momentum, on the copies' mean change
    outer_learning_rate: float = number(0.7, above=0, of={"optimizer.local_steps": ()})
    outer_momentum: float = number(0.9, at_least=0, below=1, of={"optimizer.local_steps": ()})


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
    slices: int = number(1, at_least=1)  # parts of the machine with only a slow network between them
    slice_axis: str = choice("data", "fsdp", "stage")  # the axis that they lie along
    # what lies in parts along fsdp. 1: optimizer state; 2: gradients too; 3: weights too
    zero: int = choice(1, 2, 3, default=3)

    def sizes(self) -> dict[str, int]:
        """Size of every axis, in the order in which people read them."""
        return {axis: getattr(self, axis) for axis in ("data", "fsdp", "tensor", "sequence", "expert", "stage")}

    def filled(self, devices: int) -> "MeshConfig":
        """A copy in which -1 is what remains of `devices`. Raises UserError where they do not divide."""
        given = self.sizes()
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

    steps: int = number(1000, at_least=1)
    seed: int = number(0, at_least=0)
    start: tuple[str, ...] = ()  # checkpoints; weights are taken from the first that has the path in that shape
    eval_every: int = number(250, at_least=0)  # 0: only at the end
    eval_batches: int = number(0, at_least=0)  # 0: the whole held-out set
    save_every: int = number(250, at_least=0)  # 0: only at the end
    keep_last: int = number(3, at_least=1)
    keep_every: int = number(0, at_least=0)  # keep every step that is a multiple; 0: none
    keep_best: bool = False  # keep the step with the lowest held-out loss
    log_every: int = number(10, at_least=1)
    # without a step end the process, which tells where it hangs; 0: never
    watchdog_seconds: int = number(3600, at_least=0)
    max_bad_steps: int = number(20, at_least=1)  # non-finite steps in a row that stop the run
    spike_factor: float = number(1.5, above=1)  # a loss this many times its running mean is logged as a spike
    tensorboard: bool = True


@dataclasses.dataclass
class AdapterConfig:
    """What is trained beside frozen weights, by `train.finetune` (see train.adapter.weights)."""

    # bias: BitFit; none: all weights are trained
    kind: str = choice("none", "lora", "dora", "bottleneck", "prefix", "bias")
    targets: tuple[str, ...] = (r"attention\.(query|value)$",)  # of lora, dora: patterns, found in the matrices' paths
    rank: int = number(8, at_least=1, of=LOW_RANK)
    alpha: float = number(16.0, above=0, of=LOW_RANK)  # what is added is scaled by alpha / rank
    rslora: bool = given(False, of=LOW_RANK)  # by alpha / sqrt(rank) instead (arXiv:2312.03732)
    dropout: float = number(0.0, at_least=0, below=1, of=LOW_RANK)  # of what they multiply
    bottleneck_dim: int = number(64, at_least=1, of={"adapter.kind": ("bottleneck",)})
    prefix_tokens: int = number(16, at_least=1, of={"adapter.kind": ("prefix",)})


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

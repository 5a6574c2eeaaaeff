"""The shape of a model as a typed dataclass: defaults, derived fields and the checks that need no array."""

# No postponed annotations here: ml_collections reads the fields' types as they stand.
import dataclasses

from tpu.errors import UserError

CHOICES = {
    "positions": ("rope", "learned", "sinusoidal", "none"),
    "norm": ("layernorm", "rmsnorm"),
    "norm_order": ("pre", "post"),
    "activation": ("gelu", "gelu_tanh", "relu", "swiglu", "geglu"),
    "init": ("gpt2", "normal", "fan_in", "xavier"),
    "weight_dtype": ("float32", "bfloat16"),
    "compute_dtype": ("auto", "float32", "bfloat16"),
    "platform": ("auto", "cpu", "gpu", "tpu"),
    "attention": ("auto", "plain", "chunked", "splash", "cudnn"),
    "context_parallel": ("ring", "ulysses"),
    "layer_loop": ("auto", "scan", "unroll"),
    "remat": (
        "none",
        "full",
        "dots",
        "dots_no_batch",
        "attention",
        "projections",
        "all_but_mlp",
        "offload_projections",
    ),
}

ATTENTION = {"cpu": "chunked", "gpu": "cudnn", "tpu": "splash"}  # what "auto" stands for


@dataclasses.dataclass
class ModelConfig:
    """A decoder-only transformer. Zero in a field marked "0:" means the value named there; `resolved` fills it in."""

    vocab_size: int = 4096
    layers: int = 6
    embed_dim: int = 384
    heads: int = 6
    kv_heads: int = 0  # 0: heads (multi-head); 1: multi-query; between: grouped-query (arXiv:2305.13245)
    head_dim: int = 0  # 0: embed_dim / heads
    mlp_dim: int = 0  # 0: 4 * embed_dim
    activation: str = "gelu_tanh"
    pattern: tuple[str, ...] = ("global",)  # one repeating group of layers: "global" or "local" attention
    window: int = 0  # keys a "local" layer sees, itself included
    positions: str = "rope"
    max_positions: int = 1024  # rows of the learned table
    rope_theta: float = 10_000.0
    norm: str = "layernorm"
    norm_eps: float = 1e-5
    norm_order: str = "pre"
    qk_norm: bool = False  # RMSNorm over head_dim of queries and keys (arXiv:2302.05442)
    attention_bias: bool = True
    mlp_bias: bool = True
    norm_bias: bool = True  # LayerNorm only
    tied_head: bool = True
    attention_softcap: float = 0.0  # 0: none; else cap * tanh(score / cap) (Gemma 2, arXiv:2408.00118)
    logits_softcap: float = 0.0
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    init: str = "gpt2"
    init_std: float = 0.02  # of "gpt2" and "normal"
    weight_dtype: str = "float32"
    compute_dtype: str = "auto"  # auto: bfloat16 where the hardware multiplies it fast, else float32
    platform: str = "auto"  # what the program is compiled for; auto: where it runs
    attention: str = "auto"  # auto: chunked on CPU, splash on TPU, cudnn on GPU
    context_parallel: str = "ring"  # how attention meets a sequence axis of the mesh: ring or ulysses
    layer_loop: str = "auto"  # auto: unroll on CPU, scan elsewhere
    remat: str = "none"  # what the backward pass finds saved (model.stack.REMAT)
    pipeline_repeats: int = 1  # times that a micro-batch passes the stages of the mesh; more: smaller bubble
    pipeline_microbatches: int = 0  # parts of a batch that follow each other through the stages; 0: mesh.stage

    def resolved(self) -> "ModelConfig":
        """Returns a copy with every derived field filled in. Raises UserError for an impossible shape."""
        config = dataclasses.replace(self)
        for field in ("vocab_size", "layers", "embed_dim", "heads"):
            if getattr(config, field) < 1:
                raise UserError(f"model.{field}={getattr(config, field)}: must be at least 1")
        for field in ("kv_heads", "head_dim", "mlp_dim", "window", "attention_softcap", "logits_softcap"):
            if getattr(config, field) < 0:
                raise UserError(f"model.{field}={getattr(config, field)}: must not be negative")
        if config.head_dim == 0:
            if config.embed_dim % config.heads:
                raise UserError(
                    f"model.heads={config.heads}: does not divide model.embed_dim={config.embed_dim}; "
                    f"valid: {_divisors(config.embed_dim)}, or set model.head_dim"
                )
            config.head_dim = config.embed_dim // config.heads
        config.kv_heads = config.kv_heads or config.heads
        config.mlp_dim = config.mlp_dim or 4 * config.embed_dim
        config._check()
        return config

    def _check(self) -> None:
        for field, valid in CHOICES.items():
            if getattr(self, field) not in valid:
                raise UserError(f"model.{field}={getattr(self, field)!r}: valid: {', '.join(valid)}")
        if self.heads % self.kv_heads:
            raise UserError(
                f"model.kv_heads={self.kv_heads}: does not divide model.heads={self.heads}; "
                f"valid: {_divisors(self.heads)}"
            )
        if self.positions == "rope" and self.head_dim % 2:
            raise UserError(f"model.head_dim={self.head_dim}: rotary positions need an even head_dim")
        if self.positions == "sinusoidal" and self.embed_dim % 2:
            raise UserError(f"model.embed_dim={self.embed_dim}: sinusoidal positions need an even embed_dim")
        if not self.pattern or any(kind not in ("global", "local") for kind in self.pattern):
            raise UserError(f"model.pattern={self.pattern!r}: a tuple of 'global' and 'local', at least one")
        if self.layers % len(self.pattern):
            raise UserError(
                f"model.layers={self.layers}: not a multiple of the {len(self.pattern)} layers of "
                f"model.pattern={self.pattern!r}"
            )
        if "local" in self.pattern and self.window < 1:
            raise UserError(f"model.window={self.window}: a pattern with 'local' needs a window of at least 1")
        if self.positions == "learned" and self.max_positions < 1:
            raise UserError(f"model.max_positions={self.max_positions}: learned positions need at least 1")
        for field in ("embedding_dropout", "attention_dropout", "residual_dropout"):
            if not 0.0 <= getattr(self, field) < 1.0:
                raise UserError(f"model.{field}={getattr(self, field)}: must be at least 0 and below 1")
        for field in ("norm_eps", "rope_theta", "init_std"):
            if getattr(self, field) <= 0:
                raise UserError(f"model.{field}={getattr(self, field)}: must be positive")

    def placed(self, platform: str, fast_dtype: str) -> "ModelConfig":
        """Returns a copy in which every "auto" is decided for `platform` ("cpu", "gpu" or "tpu")."""
        platform = platform if self.platform == "auto" else self.platform
        return dataclasses.replace(
            self,
            platform=platform,
            compute_dtype=fast_dtype if self.compute_dtype == "auto" else self.compute_dtype,
            attention=ATTENTION[platform] if self.attention == "auto" else self.attention,
            layer_loop=("unroll" if platform == "cpu" else "scan") if self.layer_loop == "auto" else self.layer_loop,
        )

    def check_context(self, context: int, field: str) -> None:
        """Raises UserError where `context` positions, asked for by `field`, do not fit the learned table."""
        if self.positions == "learned" and context > self.max_positions:
            raise UserError(
                f"{field}={context}: longer than the learned positions; "
                f"valid: 1 to model.max_positions={self.max_positions}"
            )


def _divisors(number: int) -> str:
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)

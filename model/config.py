"""The shape of a model as a typed dataclass: defaults, derived fields and the checks that need no array."""

# No postponed annotations here: ml_collections reads the fields' types as they stand.
import dataclasses
import math

from model.fields.vision import VisionConfig
from tpu.errors import UserError

CHOICES = {
    "kind": ("decoder", "encoder", "encoder_decoder", "vision"),
    "fusion": ("none", "merge", "cross", "co", "tangled", "contrastive"),
    "head": ("language", "pooled", "token"),
    "positions": ("rope", "learned", "sinusoidal", "relative", "alibi", "none"),
    "norm": ("layernorm", "rmsnorm"),
    "norm_order": ("pre", "post", "sandwich", "reordered"),
    "qk_norm_over": ("head_dim", "projection"),
    "rope_scaling": ("none", "linear", "ntk", "dynamic", "yarn", "llama3"),
    "activation": ("gelu", "gelu_tanh", "quick_gelu", "relu", "swiglu", "geglu", "geglu_erf", "reglu"),
    "router": ("softmax", "sigmoid"),
    "init": ("gpt2", "normal", "fan_in", "xavier"),
    "weight_dtype": ("float32", "bfloat16"),
    "compute_dtype": ("auto", "float32", "bfloat16"),
    "platform": ("auto", "cpu", "gpu", "tpu"),
    "attention": ("auto", "plain", "chunked", "splash", "cudnn"),
    "context_parallel": ("ring", "ulysses"),
    "layer_loop": ("auto", "scan", "unroll"),
    "share_layers": ("none", "all", "groups", "alternate"),
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

GATED = ("swiglu", "geglu", "geglu_erf", "reglu")  # activations of one projection that gate another
LAYERS = ("global", "local", "sparse", "linear", "gated_linear", "knn")  # what model.pattern is made of
DROPOUTS = ("embedding_dropout", "attention_dropout", "residual_dropout")
# Fields of model.vision and the fusions in which they have an effect; vision.offset goes with vision.every.
OF_FUSIONS = {
    "mask": ("merge",),
    **dict.fromkeys(("every", "sees", "gate_per_channel"), ("cross",)),
    "qk_norm": ("cross", "co", "tangled"),
    **dict.fromkeys(("connections", "connection_heads"), ("co", "tangled")),
    **dict.fromkeys(("actions", "tangled"), ("tangled",)),
    **dict.fromkeys(("similarity", "projection_dim", "text_pool"), ("contrastive",)),
}
NOT_NEGATIVE = (
    "kv_heads",
    "head_dim",
    "mlp_dim",
    "window",
    "attention_softcap",
    "logits_softcap",
    "query_scalar",
    "rope_original_context",
    "rope_fast",
    "rope_attention_factor",
    "rope_local_theta",
    "memory",
    "sparse_first",
    "sparse_random",
    "sparse_seed",
    "knn_memory",
)


@dataclasses.dataclass
class ModelConfig:
    """A transformer, decoder-only unless `kind` says otherwise.

    Zero in a field marked "0:" means the value named there; `resolved` fills it in.
    """

    # Shape
    vocab_size: int = 4096
    layers: int = 6
    embed_dim: int = 384
    heads: int = 6
    kv_heads: int = 0  # 0: heads (multi-head); 1: multi-query; between: grouped-query (arXiv:2305.13245)
    head_dim: int = 0  # 0: embed_dim / heads
    mlp_dim: int = 0  # 0: 4 * embed_dim
    activation: str = "gelu_tanh"
    tied_head: bool = True
    scale_embedding: bool = False  # times sqrt(embed_dim) (arXiv:1706.03762, section 3.4; Gemma)

    # What the layers see: attention and memory (docs/attention.md)
    pattern: tuple[str, ...] = ("global",)  # one repeating group of layers, of LAYERS
    window: int = 0  # keys a "local" layer sees, itself included
    attention_sinks: bool = False  # a learned logit per head that takes weight and has no value (gpt-oss)
    attention_softcap: float = 0.0  # 0: none; else cap * tanh(score / cap) (Gemma 2, arXiv:2408.00118)
    query_scalar: float = 0.0  # scores are divided by its square root; 0: head_dim
    qk_norm: bool = False  # RMSNorm of queries and keys (arXiv:2302.05442)
    qk_norm_over: str = "head_dim"  # or "projection": all heads at once (OLMo 2, arXiv:2501.00656)
    sparse_block: int = 64  # tokens of a block of a "sparse" layer (model.attention.block_sparse_attention)
    sparse_newest: int = 3  # blocks it sees that end with the query's own
    sparse_first: int = 1  # blocks it sees at the beginning of the document
    sparse_random: int = 2  # older blocks it sees, drawn
    sparse_seed: int = 0
    memory: int = 0  # tokens before the row that layers see (Transformer-XL, model.memory); needs data.contiguous
    knn_memory: int = 0  # tokens before the row among which "knn" layers look for their nearest neighbours
    knn_neighbours: int = 32  # of them, each query takes so many

    # Positions
    positions: str = "rope"
    max_positions: int = 1024  # rows of the learned table
    rope_theta: float = 10_000.0
    rope_interleaved: bool = False  # turns the pairs (2i, 2i + 1) as GPT-J does, not (i, i + head_dim / 2)
    rope_scaling: str = "none"  # what stretches a trained context (model.positions.rope)
    rope_factor: float = 1.0  # by how much
    rope_original_context: int = 0  # the trained context; of dynamic, yarn and llama3
    rope_slow: float = 1.0  # yarn, llama3: turns in that context up to which a frequency is divided by rope_factor
    rope_fast: float = 0.0  # and from which on it stays; 0: 32 (yarn), 4 (llama3)
    rope_attention_factor: float = 0.0  # yarn: multiplies queries and keys; 0: 0.1 ln(rope_factor) + 1
    rope_local_theta: float = 0.0  # of "local" layers, unscaled (Gemma 3); 0: as the other layers
    # Pairs that turn with a token's time, row and column (M-RoPE, arXiv:2409.12191); (): all with its place in the text
    rope_sections: tuple[int, ...] = ()
    relative_buckets: int = 32  # of positions="relative" (T5): rows of the table of score biases
    relative_distance: int = 128  # from which distance on all share a row

    # Mixtures of experts (model.moe)
    experts: int = 0  # of a mixture-of-experts layer (model.moe); 0: every feed-forward block is dense
    experts_per_token: int = 2
    expert_dim: int = 0  # 0: mlp_dim
    shared_experts: int = 0  # that every token passes beside its own (DeepSeekMoE, arXiv:2401.06066)
    moe_every: int = 1  # the last of so many layers is a mixture; resolved repeats the pattern until it divides
    router: str = "softmax"  # scores over all experts before the choice; or sigmoid of each (DeepSeek-V3)
    router_renormalize: bool = True  # weights of the chosen sum to one (Mixtral, Qwen3; not OLMoE)
    router_scale: float = 1.0  # times those weights (DeepSeek-V3: 2.5)
    router_bias: bool = False  # balance by a bias on the choice (arXiv:2408.15664), moved by optimizer.router_bias_rate
    capacity_factor: float = 0.0  # 0: dropless; else an expert takes this share of a row's even load, and no more

    # Norms, biases, dropout, first weights
    norm: str = "layernorm"
    norm_eps: float = 1e-5
    norm_order: str = "pre"  # pre, post, sandwich (before and after each branch), reordered (after it; OLMo 2)
    norm_unit_offset: bool = False  # norms multiply by 1 + scale (Gemma)
    attention_bias: bool = True
    attention_out_bias: bool = True  # False: attention_bias is of queries, keys and values only (Qwen2)
    mlp_bias: bool = True
    norm_bias: bool = True  # LayerNorm only
    logits_softcap: float = 0.0
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    init: str = "gpt2"
    init_std: float = 0.02  # of "gpt2" and "normal"

    # Shared layers and adapters (docs/adapters.md)
    share_layers: str = "none"  # which layers are one set of weights (model.stack): all, groups, alternate
    share_size: int = 0  # of groups: layers that follow each other and share; of alternate: sets that take turns
    share_rank: int = 0  # of what each layer adds to shared matrices (arXiv:2410.20672); 0: nothing
    bottleneck_dim: int = 0  # width of the adapters after attention and mlp (model.adapters.bottleneck); 0: none
    prefix_tokens: int = 0  # learned keys and values that every token sees (model.adapters.prefix); 0: none

    # Encoders and encoder-decoders (docs/encoders.md)
    kind: str = (
        "decoder"  # decoder, encoder (model.bert), encoder_decoder (model.encoder_decoder), vision (model.vision.vit)
    )
    head: str = "language"  # of an encoder: language (masked tokens), pooled (a label per text), token (one per token)
    labels: int = 0  # outputs of a pooled or token head
    attention_qkv_bias: bool = True  # of an encoder; False: attention_bias is of the output projection only (ViT)
    token_types: int = 0  # of an encoder: kinds of tokens with an embedding of their own (first and second text)
    next_sentence: bool = False  # of an encoder: a second head, for whether the second text follows the first
    decoder_layers: int = 0  # of an encoder_decoder; 0: layers
    output_scale: float = 1.0  # of an encoder_decoder's states before the head; T5 with tied head: 1 / sqrt(embed_dim)
    start_token: int = -1  # with which an encoder_decoder's decoder begins; -1: the end-of-document token

    # Images (docs/sight.md)
    fusion: str = "none"  # how they reach the text: merge, cross, co, tangled or contrastive (model.fusion)
    vision: VisionConfig = dataclasses.field(default_factory=VisionConfig)

    # How it is computed
    weight_dtype: str = "float32"
    compute_dtype: str = "auto"  # auto: bfloat16 where the hardware multiplies it fast, else float32
    platform: str = "auto"  # what the program is compiled for; auto: where it runs
    attention: str = "auto"  # auto: what `attention_for` says
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
        for field in NOT_NEGATIVE:
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
        config.rope_fast = config.rope_fast or {"yarn": 32.0, "llama3": 4.0}.get(config.rope_scaling, 0.0)
        config._check_experts()
        if config.experts:
            config.expert_dim = config.expert_dim or config.mlp_dim
            config.pattern *= math.lcm(len(config.pattern), config.moe_every) // max(1, len(config.pattern))
        config.vision = config.vision.resolved(config.embed_dim)
        if config.fusion == "cross":
            config.pattern *= math.lcm(len(config.pattern), config.vision.every) // max(1, len(config.pattern))
        if config.kind == "encoder_decoder":
            config.decoder_layers = config.decoder_layers or config.layers
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
        if not self.pattern or any(kind not in LAYERS for kind in self.pattern):
            raise UserError(f"model.pattern={self.pattern!r}: a tuple of at least one of {', '.join(LAYERS)}")
        if self.layers % len(self.pattern):
            raise UserError(
                f"model.layers={self.layers}: not a multiple of the {len(self.pattern)} layers of "
                f"model.pattern={self.pattern!r}"
            )
        self._check_sharing()
        if "local" in self.pattern and self.window < 1:
            raise UserError(f"model.window={self.window}: a pattern with 'local' needs a window of at least 1")
        self._check_kinds()
        if self.positions == "learned" and self.max_positions < 1:
            raise UserError(f"model.max_positions={self.max_positions}: learned positions need at least 1")
        for field in DROPOUTS:
            if not 0.0 <= getattr(self, field) < 1.0:
                raise UserError(f"model.{field}={getattr(self, field)}: must be at least 0 and below 1")
        self._check_kind()
        self._check_fusion()
        self._check_effects()
        for field in ("norm_eps", "rope_theta", "rope_slow", "init_std", "output_scale"):
            if getattr(self, field) <= 0:
                raise UserError(f"model.{field}={getattr(self, field)}: must be positive")
        if self.rope_factor < 1.0:
            raise UserError(f"model.rope_factor={self.rope_factor}: must be at least 1")
        if self.rope_scaling in ("dynamic", "yarn", "llama3") and self.rope_original_context < 1:
            raise UserError(
                f"model.rope_original_context={self.rope_original_context}: model.rope_scaling="
                f"{self.rope_scaling!r} needs the context that the model was trained with"
            )
        if self.rope_scaling in ("yarn", "llama3") and self.rope_slow >= self.rope_fast:
            raise UserError(f"model.rope_slow={self.rope_slow}: must be below model.rope_fast={self.rope_fast}")
        if self.rope_scaling == "dynamic" and self.rope_local_theta:
            raise UserError(f"model.rope_local_theta={self.rope_local_theta}: not with model.rope_scaling='dynamic'")
        if self.rope_scaling in ("ntk", "dynamic") and self.head_dim < 4:
            raise UserError(f"model.head_dim={self.head_dim}: model.rope_scaling={self.rope_scaling!r} needs 4 or more")

    def _check_experts(self) -> None:
        for field in ("experts", "expert_dim", "shared_experts", "capacity_factor"):
            if getattr(self, field) < 0:
                raise UserError(f"model.{field}={getattr(self, field)}: must not be negative")
        if self.moe_every < 1:
            raise UserError(f"model.moe_every={self.moe_every}: must be at least 1")
        if not self.experts:
            for field in ("expert_dim", "shared_experts", "router_bias", "capacity_factor"):
                if value := getattr(self, field):
                    raise UserError(f"model.{field}={value}: has no effect with model.experts=0; give model.experts")
            return
        # Of other models nobody reads what the routers did, so that nothing would balance them.
        if self.kind != "decoder":
            raise UserError(f"model.experts={self.experts}: only with model.kind='decoder', not {self.kind!r}")
        if self.fusion == "contrastive":
            raise UserError(f"model.experts={self.experts}: not with model.fusion='contrastive'")
        if not 1 <= self.experts_per_token <= self.experts:
            raise UserError(
                f"model.experts_per_token={self.experts_per_token}: valid: 1 to model.experts={self.experts}"
            )
        if self.router_scale <= 0:
            raise UserError(f"model.router_scale={self.router_scale}: must be positive")
        if self.mlp_bias:
            raise UserError(f"model.mlp_bias=True: experts have none; with model.experts={self.experts} give False")

    def mixes(self, layer: int) -> bool:
        """Whether layer number `layer` of a group is a mixture of experts."""
        return self.experts > 0 and (layer + 1) % self.moe_every == 0

    def looks(self, layer: int) -> bool:
        """Whether layer number `layer` of a group has cross-attention to images before it."""
        return self.fusion == "cross" and layer % self.vision.every == self.vision.offset

    def _check_fusion(self) -> None:
        """Raises UserError where images, their encoder and the text do not go together."""
        sees = self.vision.encoder != "none"
        if sees != (self.fusion != "none" or self.kind == "vision"):
            raise UserError(
                f"model.vision.encoder={self.vision.encoder!r}: with model.fusion={self.fusion!r} and "
                f"model.kind={self.kind!r} " + ("images reach nothing; set model.fusion" if sees else "it must be set")
            )
        if self.fusion != "none" and self.kind != "decoder" and (self.fusion, self.kind) != ("contrastive", "encoder"):
            raise UserError(f"model.fusion={self.fusion!r}: not with model.kind={self.kind!r}")
        pooled = self.vision.pool != "none"
        if sees and pooled != (self.kind == "vision" or self.fusion == "contrastive"):
            raise UserError(
                f"model.vision.pool={self.vision.pool!r}: "
                + (
                    "only with model.fusion='contrastive' or model.kind='vision'"
                    if pooled
                    else "one of class, mean, map"
                )
            )
        if self.fusion == "merge" and self.vision.mask != "causal" and (self.remembers or "sparse" in self.pattern):
            raise UserError(f"model.vision.mask={self.vision.mask!r}: not with memory or 'sparse' layers")
        if self.fusion in ("cross", "co", "tangled") and self.remembers:
            raise UserError(f"model.fusion={self.fusion!r}: not with a model that remembers")
        if self.fusion == "merge" and self.vision.connector == "none":
            width = self.vision.embed_dim if self.vision.encoder == "vit" else self.vision.widths[-1]
            if width != self.embed_dim:
                raise UserError(
                    f"model.vision.connector='none': leaves vectors of width {width}, which do not fit a text of "
                    f"model.embed_dim={self.embed_dim}; valid: linear, or another that gives them that width"
                )
        if self.fusion in ("co", "tangled"):
            if self.vision.connection_dim % self.vision.connection_heads:
                raise UserError(
                    f"model.vision.connection_heads={self.vision.connection_heads}: does not divide "
                    f"model.vision.connection_dim={self.vision.connection_dim}"
                )
            if self.fusion == "tangled" and self.vision.vectors % self.vision.actions:
                raise UserError(
                    f"model.vision.actions={self.vision.actions}: does not divide the {self.vision.vectors} vectors of "
                    f"an image"
                )
            if len(self.pattern) * self.vision.connections > self.layers or self.share_layers != "none":
                raise UserError(
                    f"model.vision.connections={self.vision.connections}: needs as many repetitions of "
                    f"model.pattern, with weights of their own (model.share_layers='none')"
                )
            if self.pipeline_repeats > 1:
                raise UserError(
                    f"model.pipeline_repeats={self.pipeline_repeats}: not with model.fusion={self.fusion!r}"
                )
        if self.rope_sections and (len(self.rope_sections) != 3 or 2 * sum(self.rope_sections) != self.head_dim):
            raise UserError(
                f"model.rope_sections={self.rope_sections}: needs three numbers whose sum is half of "
                f"model.head_dim={self.head_dim}"
            )

    def _check_effects(self) -> None:
        """Raises UserError for a field of a model that sees that is no default and changes nothing there."""
        if self.vision.encoder == "none":
            return
        plain = VisionConfig()
        for field, fusions in OF_FUSIONS.items():
            value = getattr(self.vision, field)
            if self.fusion not in fusions and value != getattr(plain, field):
                raise UserError(
                    f"model.vision.{field}={value!r}: has no effect with model.fusion={self.fusion!r}, only with "
                    f"{', '.join(fusions)}"
                )
        if self.kind == "vision" or self.fusion == "contrastive":
            named = "model.kind='vision'" if self.kind == "vision" else "model.fusion='contrastive'"
            for field in DROPOUTS:
                if value := getattr(self, field):
                    raise UserError(f"model.{field}={value}: has no effect with {named}; valid: 0")

    def _check_kind(self) -> None:
        """Raises UserError for a field that the kind of model does not have, or not like this."""
        for field in ("decoder_layers", "labels", "token_types"):
            if getattr(self, field) < 0:
                raise UserError(f"model.{field}={getattr(self, field)}: must not be negative")
        plain = ModelConfig()
        only = {
            "encoder": ("head", "labels", "token_types", "next_sentence", "attention_qkv_bias"),
            "encoder_decoder": ("decoder_layers", "output_scale", "start_token"),
        }
        for kind, fields in only.items():
            for field in fields:
                of_vision = self.kind == "vision" and field == "labels"
                if self.kind != kind and not of_vision and getattr(self, field) != getattr(plain, field):
                    raise UserError(f"model.{field}={getattr(self, field)!r}: only with model.kind={kind!r}")
        if self.kind == "vision":
            if self.labels < 1:
                raise UserError(f"model.labels={self.labels}: model.kind='vision' needs at least 1")
        elif (self.head == "language") != (self.labels == 0):
            raise UserError(
                f"model.labels={self.labels}: model.head={self.head!r} needs "
                f"{'none' if self.head == 'language' else 'at least 1'}"
            )
        if self.next_sentence and self.head != "language":
            raise UserError(f"model.next_sentence=True: needs model.head='language', not {self.head!r}")
        if self.kind != "decoder" and self.pattern != ("global",):
            raise UserError(f"model.pattern={self.pattern!r}: model.kind={self.kind!r} has global layers only")
        if self.kind == "encoder_decoder" and self.positions in ("rope", "learned"):
            raise UserError(
                f"model.positions={self.positions!r}: model.kind='encoder_decoder' takes relative, sinusoidal or none"
            )
        if self.positions == "relative":
            if self.kind != "encoder_decoder":
                raise UserError("model.positions='relative': only with model.kind='encoder_decoder'")
            if self.relative_buckets < 4 or self.relative_buckets % 2:
                raise UserError(f"model.relative_buckets={self.relative_buckets}: must be even and at least 4")
            if self.relative_distance <= self.relative_buckets // 2:
                raise UserError(
                    f"model.relative_distance={self.relative_distance}: must be above half of "
                    f"model.relative_buckets={self.relative_buckets}"
                )

    def _check_kinds(self) -> None:
        """Raises UserError for layers, memories and kernels that do not go together."""
        for field in ("sparse_block", "sparse_newest", "knn_neighbours"):
            if getattr(self, field) < 1:
                raise UserError(f"model.{field}={getattr(self, field)}: must be at least 1")
        if self.attention in ("splash", "cudnn"):
            platform = {"splash": "tpu", "cudnn": "gpu"}[self.attention]
            found, why = self.attention_for(platform, "bfloat16")
            if found != self.attention:
                raise UserError(f"model.attention={self.attention}: {why}; give model.attention=auto")
        if ("knn" in self.pattern) != (self.knn_memory > 0):
            raise UserError(
                f"model.knn_memory={self.knn_memory}: above 0 where model.pattern holds 'knn', and 0 elsewhere"
            )
        remembers = "memory" if self.memory else "knn_memory" if self.knn_memory else ""
        if remembers and self.positions in ("learned", "sinusoidal"):
            raise UserError(
                f"model.{remembers}={getattr(self, remembers)}: needs positions that count from key to query; give "
                "model.positions=rope, alibi or none"
            )
        if remembers and "sparse" in self.pattern:
            raise UserError(f"model.{remembers}={getattr(self, remembers)}: not with 'sparse' layers in model.pattern")
        if "knn" in self.pattern and (self.attention_sinks or self.attention_softcap or self.attention_dropout):
            raise UserError("model.pattern: 'knn' layers have no attention_sinks, attention_softcap, attention_dropout")

    def _check_sharing(self) -> None:
        for field in ("share_size", "share_rank", "bottleneck_dim", "prefix_tokens"):
            if getattr(self, field) < 0:
                raise UserError(f"model.{field}={getattr(self, field)}: must not be negative")
        groups = self.layers // len(self.pattern)
        needs_size = self.share_layers in ("groups", "alternate")
        if needs_size and (self.share_size < 1 or groups % self.share_size):
            raise UserError(
                f"model.share_size={self.share_size}: with model.share_layers={self.share_layers!r} it must divide the "
                f"{groups} repetitions of model.pattern; valid: {_divisors(groups)}"
            )
        if self.share_size and not needs_size:
            raise UserError(
                f"model.share_size={self.share_size}: has no effect with model.share_layers={self.share_layers!r}; "
                "valid: 0"
            )
        if self.share_rank and self.share_layers == "none":
            raise UserError(f"model.share_rank={self.share_rank}: needs shared layers; set model.share_layers")
        if self.share_layers != "none" and self.pipeline_repeats > 1:
            raise UserError(
                f"model.pipeline_repeats={self.pipeline_repeats}: a pipeline needs layers of their own; give 1, or "
                "model.share_layers='none'"
            )

    def layer_sets(self) -> int:
        """The number of sets of weights of a repetition of `pattern`: as many as repetitions, unless they share."""
        groups = self.layers // len(self.pattern)
        sets = {"none": groups, "all": 1, "groups": groups // max(1, self.share_size), "alternate": self.share_size}
        return sets[self.share_layers]

    def placed(self, platform: str, fast_dtype: str) -> "ModelConfig":
        """Returns a copy in which every "auto" is decided for `platform` ("cpu", "gpu" or "tpu")."""
        platform = platform if self.platform == "auto" else self.platform
        return dataclasses.replace(
            self,
            platform=platform,
            compute_dtype=fast_dtype if self.compute_dtype == "auto" else self.compute_dtype,
            attention=self.attention_for(platform, fast_dtype)[0] if self.attention == "auto" else self.attention,
            layer_loop=("unroll" if platform == "cpu" else "scan") if self.layer_loop == "auto" else self.layer_loop,
        )

    @property
    def remembers(self) -> bool:
        """Whether a training step hands a memory to the next one (`model.memory`)."""
        return self.memory > 0 or self.knn_memory > 0

    @property
    def needs_whole_rows(self) -> str:
        """The first field for whose sake a row may not be cut along a mesh axis; "" where there is none."""
        kinds = [kind for kind in self.pattern if kind not in ("global", "local")]
        found = {
            f"model.pattern={self.pattern!r}": kinds,
            "model.positions=alibi": self.positions == "alibi",
            "model.attention_sinks=True": self.attention_sinks,
            f"model.memory={self.memory}": self.memory,
            f"model.vision.mask={self.vision.mask!r}": self.fusion == "merge" and self.vision.mask != "causal",
            f"model.fusion={self.fusion!r}": self.fusion in ("co", "tangled", "contrastive"),
        }
        return next((name for name, given in found.items() if given), "")

    @property
    def needs_one_size(self) -> str:
        """The first field for whose sake all images of a row must have one size; "" where there is none."""
        vision = self.vision
        found = {
            f"model.fusion={self.fusion!r}": self.fusion != "merge",
            f"model.vision.encoder={vision.encoder!r}": vision.encoder != "vit",
            f"model.vision.stem={vision.stem!r}": vision.stem != "patches",
            "model.vision.class_token=True": vision.class_token,
            f"model.vision.connector={vision.connector!r}": vision.connector == "perceiver",
            f"model.vision.image_positions={vision.image_positions}": vision.image_positions,
        }
        return next((name for name, given in found.items() if given), "")

    def keys_seen(self, kind: str, context: int) -> int:
        """Keys that a query at the end of a row of `context` tokens meets in a layer of that kind.

        Linear layers meet a state instead, which costs as much as head_dim keys.
        """
        sparse = self.sparse_block * (self.sparse_newest + self.sparse_first + self.sparse_random)
        return {
            "global": context + self.memory,
            "local": min(context + self.memory, self.window),
            "sparse": min(context, sparse),
            "knn": context + self.knn_memory,
        }.get(kind, self.head_dim)

    def attention_for(self, platform: str, dtype: str) -> tuple[str, str]:
        """The implementation that "auto" stands for on a platform ("cpu", "gpu", "tpu"), and why.

        dtype: of the operands, where model.compute_dtype is "auto".
        """
        dtype = dtype if self.compute_dtype == "auto" else self.compute_dtype
        head_dim = self.head_dim or self.embed_dim // self.heads
        if platform == "cpu":
            return "chunked", "there are no flash kernels for CPUs"
        if self.positions == "alibi":
            return "chunked", "the flash kernels take no ALiBi bias that is not a matrix of all pairs"
        if self.fusion == "merge" and self.vision.mask != "causal":
            return "chunked", "the flash kernels hide what comes later, and model.vision.mask shows some of it"
        if self.memory:
            return "chunked", "the flash kernels want as many queries as keys, and model.memory adds keys"
        if platform == "tpu":
            return "splash", "a TPU, and splash has every mask of this model"
        for given, why in (
            (self.attention_softcap, "cuDNN has no model.attention_softcap"),
            (self.attention_sinks, "cuDNN through jax has no model.attention_sinks"),
            (dtype == "float32", "cuDNN takes operands of 16 bits, and model.compute_dtype is float32"),
            (
                head_dim % 8 or head_dim > 128,
                f"cuDNN wants a head_dim up to 128 that is a multiple of 8, not {head_dim}",
            ),
        ):
            if given:
                return "chunked", why
        return "cudnn", "an NVIDIA GPU, and cuDNN has every mask of this model"

    def check_context(self, context: int, field: str) -> None:
        """Raises UserError where `context` positions, asked for by `field`, do not fit the learned table."""
        if self.positions == "learned" and context > self.max_positions:
            raise UserError(
                f"{field}={context}: longer than the learned positions; "
                f"valid: 1 to model.max_positions={self.max_positions}"
            )


def _divisors(number: int) -> str:
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)

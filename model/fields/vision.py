"""What sees, and how what it sees reaches the text: typed fields, their defaults and checks; no array is needed."""

# No postponed annotations here: ml_collections reads the fields' types as they stand.
import dataclasses
import math

from tpu.errors import UserError

CHOICES = {
    "encoder": ("none", "vit", "cnn", "resnet"),
    "normalization": ("none", "half", "imagenet", "clip"),
    "norm": ("layernorm", "rmsnorm"),
    "activation": ("gelu", "gelu_tanh", "quick_gelu", "relu", "swiglu", "geglu", "geglu_erf"),
    "positions": ("learned", "sincos", "rope", "none"),
    "connector_activation": ("gelu", "gelu_tanh", "relu"),
    "conv_activation": ("relu", "gelu", "gelu_tanh"),
    "stem": ("patches", "resnet"),
    "block": ("basic", "bottleneck"),
    "conv_norm": ("group", "batch"),
    "pool": ("none", "class", "mean", "map"),
    "init": ("gpt2", "normal", "fan_in", "xavier"),
    "connector": ("none", "linear", "mlp", "perceiver", "pixel_shuffle", "average_pool", "merger"),
    "mask": ("causal", "prefix", "images"),
    "sees": ("last", "all"),
    "tangled": ("code", "paper"),
    "similarity": ("softmax", "sigmoid"),
    "text_pool": ("end", "last"),
}
# Mean and standard deviation per channel of pixels in [0, 1].
NORMALIZATIONS = {
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # to [-1, 1]: google-research/vision_transformer, big_vision (SigLIP)
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # torchvision's models
    # openai/CLIP, clip/clip.py; LLaVA, Flamingo and Qwen2-VL take over its tower or its numbers
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}


@dataclasses.dataclass
class VisionConfig:
    """The encoder of images, the connector behind it, and the fields of `model.fusion`."""

    # The encoder: images to a grid of vectors
    encoder: str = "none"  # none: text alone; vit, cnn (model.vision.convolution) or resnet
    image_size: int = 64  # pixels of a side, where images are made one size
    image_width: int = 0  # of images that are not square, whose height image_size is then; 0: image_size
    channels: int = 3  # or 1, grey
    normalization: str = "half"  # of pixels 0 to 255 (NORMALIZATIONS)
    patch_size: int = 16  # of a vit
    patch_width: int = 0  # of patches that are not square, whose height patch_size is then; 0: patch_size
    temporal_patch: int = 1  # of a vit: images one after the other in a patch (Qwen2-VL: 2, a still one twice)
    stem: str = "patches"  # of a vit: what makes its input, pixels or a resnet's vectors (hybrid, arXiv:2010.11929)
    layers: int = 4
    embed_dim: int = 128
    heads: int = 4
    mlp_dim: int = 0  # 0: 4 * embed_dim
    activation: str = "gelu_tanh"
    attention_bias: bool = True
    qkv_bias: bool = True  # of a vit; False: attention_bias is of the output projection only
    norm: str = "layernorm"
    norm_eps: float = 1e-6
    init: str = "xavier"
    positions: str = "learned"  # learned, none; of a vit also sincos and rope (both in two dimensions)
    position_slack: float = 0.0  # added to the patches of a side where learned positions are resampled (Idefics: 0.1)
    rope_theta: float = 10_000.0
    class_token: bool = False
    patch_bias: bool = True
    embedding_norm: bool = False  # before the layers (CLIP)
    final_norm: bool = True
    final_norm_eps: float = 0.0  # 0: norm_eps
    unused_layers: int = 0  # last layers that have weights and are not computed, as is the final norm then (LLaVA)
    unused_norm: bool = False  # the final norm alone has weights and is not computed
    keep_class: bool = False  # whether the class token's vector is one of those for the text
    pool: str = "none"  # one vector per image: none, class, mean, map (attention of a learned probe)
    widths: tuple[int, ...] = (32, 64, 128)  # of a cnn's or a resnet's stages
    depths: tuple[int, ...] = (2, 2, 2, 2)  # of a resnet: blocks of each stage
    block: str = "basic"  # of a resnet
    stem_width: int = 64  # of a resnet
    conv_activation: str = "relu"  # of a resnet: after the stem and every sum; inside a block it is ReLU
    first_stride: int = 1  # of a resnet: of its first stage
    reduces_first: bool = False  # of a bottleneck: the stride is in its first convolution, not in that of 3 x 3
    conv_norm: str = "group"  # of a resnet: group (with standardised kernels; trainable), batch (fixed statistics)

    # The connector: vectors of the encoder to those of the text
    connector: str = "linear"
    connector_dim: int = 0  # inner width of mlp, merger and of a perceiver's layers; 0: model.embed_dim
    connector_factor: int = 2  # of pixel_shuffle, average_pool and merger: neighbours along a side that become one
    connector_bias: bool = True
    connector_activation: str = "gelu"
    connector_eps: float = 1e-5  # of a perceiver's, an average_pool's and a merger's norms
    connector_qk_norm: bool = False  # of a perceiver: LayerNorm of queries and keys
    latents: int = 64  # of a perceiver: vectors of an image
    connector_layers: int = 2
    connector_heads: int = 8
    connector_head_dim: int = 64
    image_positions: int = 0  # rows of a learned table, added to what the n-th image of a text gives; 0: none

    # The fusion
    image_token: int = -1  # of merge and cross: the id in a text that stands for an image's vector; -1: none
    mask: str = "causal"  # of merge: what is also seen ahead; prefix: what is given before any answer; images: each
    every: int = 1  # of cross: one of so many layers of the text has cross-attention before it
    offset: int = -1  # which of them; -1: the last
    sees: str = "all"  # of cross: which of the images before a token: all, or the last
    qk_norm: bool = False  # of cross, co and tangled: RMSNorm of queries and keys
    gate_per_channel: bool = False  # of cross: gates are vectors
    connections: int = 2  # of co and tangled: how many, before so many last layers of the text
    connection_heads: int = 8
    connection_dim: int = 0  # of co and tangled: width of all heads; 0: model.embed_dim
    actions: int = 1  # of tangled: of an image; each begins as the mean of as many of its vectors
    tangled: str = "code"  # what ActBERT's text (paper) or published code (code) says
    similarity: str = "softmax"  # of contrastive: CLIP's loss, or sigmoid (SigLIP)
    projection_dim: int = 128  # of contrastive
    text_pool: str = "end"  # of contrastive: the vector of a text: at its end token, or at the row's last position

    def resolved(self, embed_dim: int) -> "VisionConfig":
        """Returns a copy with derived fields filled in, for a text of width `embed_dim`. Raises UserError."""
        vision = dataclasses.replace(self)
        if self.encoder == "none":
            vision._check()
            return vision
        vision.mlp_dim = vision.mlp_dim or 4 * vision.embed_dim
        vision.connector_dim = vision.connector_dim or embed_dim
        vision.connection_dim = vision.connection_dim or embed_dim
        vision.final_norm_eps = vision.final_norm_eps or vision.norm_eps
        vision.offset = vision.every - 1 if vision.offset == -1 else vision.offset
        vision._check()
        return vision

    def _check(self) -> None:
        for field, valid in CHOICES.items():
            if getattr(self, field) not in valid:
                raise UserError(f"model.vision.{field}={getattr(self, field)!r}: valid: {', '.join(valid)}")
        for field in (
            "image_size",
            "patch_size",
            "temporal_patch",
            "layers",
            "embed_dim",
            "heads",
            "connector_factor",
            "latents",
            "connector_layers",
            "connector_heads",
            "connector_head_dim",
            "every",
            "connections",
            "connection_heads",
            "actions",
            "projection_dim",
            "stem_width",
        ):
            if getattr(self, field) < 1:
                raise UserError(f"model.vision.{field}={getattr(self, field)}: must be at least 1")
        for field, valid in (("channels", (1, 3)), ("first_stride", (1, 2))):
            if getattr(self, field) not in valid:
                raise UserError(f"model.vision.{field}={getattr(self, field)}: valid: {', '.join(map(str, valid))}")
        whole = ("unused_layers", "image_positions", "mlp_dim", "connector_dim", "connection_dim")
        for field in (*whole, "image_width", "patch_width", "position_slack", "final_norm_eps"):
            if getattr(self, field) < 0:
                raise UserError(f"model.vision.{field}={getattr(self, field)}: must not be negative")
        for field in ("norm_eps", "connector_eps", "rope_theta"):
            if getattr(self, field) <= 0:
                raise UserError(f"model.vision.{field}={getattr(self, field)}: must be positive")
        if self.image_token < -1:
            raise UserError(f"model.vision.image_token={self.image_token}: must be a token, or -1 for none")
        if self.encoder == "none":
            return
        if not self.widths or min(self.widths) < 1:
            raise UserError(f"model.vision.widths={self.widths}: needs at least one width of at least 1")
        resnet = self.encoder == "resnet" or self.stem == "resnet"
        if resnet and (len(self.depths) != len(self.widths) or min(self.depths) < 1):
            raise UserError(f"model.vision.depths={self.depths}: needs one number for each of model.vision.widths")
        if resnet and self.block == "bottleneck" and any(width % 4 for width in self.widths):
            raise UserError(f"model.vision.widths={self.widths}: model.vision.block='bottleneck' needs multiples of 4")
        if not 0 <= self.offset < self.every:
            raise UserError(f"model.vision.offset={self.offset}: valid: 0 to model.vision.every - 1 = {self.every - 1}")
        # Patches leave out what is too little for one of them at the right and below (SigLIP: 384 by 14).
        cut = self.encoder == "vit" and self.stem == "patches" and min(self.grid, self.columns) > 0
        if self.image_size % self.reduction and not cut:
            raise UserError(
                f"model.vision.image_size={self.image_size}: not a multiple of the {self.reduction} pixels of a vector"
            )
        width = self.sides[1]
        if width % self.reduction_across and not cut:
            raise UserError(
                f"model.vision.image_width={width}: not a multiple of the {self.reduction_across} pixels of a vector"
            )
        self._check_vit()
        if self.pools and self.keep_class:
            raise UserError(f"model.vision.keep_class=True: not with model.vision.connector={self.connector!r}")
        if self.pools and (self.grid % self.shrink or self.columns % self.shrink):
            raise UserError(
                f"model.vision.connector_factor={self.connector_factor}: does not divide the {self.grid} x "
                f"{self.columns} vectors of an image"
            )

    def _check_vit(self) -> None:
        if self.encoder != "vit":
            if self.class_token or self.pool == "class":
                field = "class_token" if self.class_token else "pool"
                raise UserError(
                    f"model.vision.{field}={getattr(self, field)!r}: only with model.vision.encoder='vit', not "
                    f"{self.encoder!r}"
                )
            if self.positions not in ("learned", "none"):
                raise UserError(
                    f"model.vision.positions={self.positions!r}: only with model.vision.encoder='vit'; "
                    f"{self.encoder!r} takes learned and none"
                )
            if self.patch_width:
                raise UserError(f"model.vision.patch_width={self.patch_width}: only with model.vision.encoder='vit'")
            return
        if self.embed_dim % self.heads:
            raise UserError(f"model.vision.heads={self.heads}: does not divide model.vision.embed_dim={self.embed_dim}")
        if self.positions == "rope" and self.embed_dim // self.heads % 4:
            raise UserError(
                f"model.vision.heads={self.heads}: positions='rope' in two dimensions needs a head of a multiple of 4 "
                f"of model.vision.embed_dim={self.embed_dim}"
            )
        if self.positions == "sincos" and self.embed_dim % 4:
            raise UserError(f"model.vision.embed_dim={self.embed_dim}: positions='sincos' needs a multiple of 4")
        if (self.pool == "class" or self.keep_class) and not self.class_token:
            raise UserError("model.vision.class_token=False: model.vision.pool='class' and keep_class need it")
        if self.unused_layers >= self.layers:
            raise UserError(
                f"model.vision.unused_layers={self.unused_layers}: must be below model.vision.layers={self.layers}"
            )
        if self.class_token and self.positions == "rope":
            raise UserError("model.vision.positions='rope': a class token has no place; give class_token=False")

    @property
    def pools(self) -> bool:
        """Whether the connector makes one vector of several neighbours."""
        return self.connector in ("pixel_shuffle", "average_pool", "merger")

    @property
    def shrink(self) -> int:
        """Neighbours along a side that the connector makes one vector of."""
        return self.connector_factor if self.pools else 1

    @property
    def reduction(self) -> int:
        """Pixels along a side for each of the encoder's vectors."""
        of_resnet = 4 * self.first_stride * 2 ** (len(self.widths) - 1)
        if self.encoder == "vit":
            return self.patch_size if self.stem == "patches" else of_resnet
        return of_resnet if self.encoder == "resnet" else 2 ** len(self.widths)

    @property
    def reduction_across(self) -> int:
        """As `reduction`, along the width."""
        return self.patch_width or self.reduction

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width of an image in pixels."""
        return self.image_size, self.image_width or self.image_size

    @property
    def grid(self) -> int:
        """The encoder's vectors along a side, or, where it is not square, the height, of an image of image_size."""
        return self.image_size // self.reduction

    @property
    def columns(self) -> int:
        """The encoder's vectors along the width of an image of image_size."""
        return self.sides[1] // self.reduction_across

    @property
    def vectors(self) -> int:
        """Vectors that an image of image_size gives to the text."""
        return self.vectors_of(*self.sides)

    def vectors_of(self, height: int, width: int) -> int:
        """Vectors that an image of so many pixels gives to the text."""
        if self.connector == "perceiver":
            return self.latents
        sides = height // self.reduction, width // self.reduction_across
        return math.prod(side // self.shrink for side in sides) + self.keep_class

"""The layers of a vision transformer (model.vision.vit), and what any encoder makes of its vectors."""

import dataclasses

from model.fields.limits import choice, number
from tpu.errors import UserError


@dataclasses.dataclass
class Vit:
    """Shape and details of a vit's layers; positions and pool are of every encoder."""

    layers: int = number(4, at_least=1)
    embed_dim: int = number(128, at_least=1)
    heads: int = number(4, at_least=1)
    mlp_dim: int = number(0, at_least=0)  # 0: 4 * embed_dim
    activation: str = choice(
        "gelu", "gelu_tanh", "quick_gelu", "relu", "swiglu", "geglu", "geglu_erf", default="gelu_tanh"
    )
    attention_bias: bool = True
    qkv_bias: bool = True  # only with vit; False: attention_bias is of the output projection only
    norm: str = choice("layernorm", "rmsnorm")
    norm_eps: float = number(1e-6, above=0)
    init: str = choice("gpt2", "normal", "fan_in", "xavier", default="xavier")
    # learned, none; only with vit also sincos and rope (both in two dimensions)
    positions: str = choice("learned", "sincos", "rope", "none")
    # added to the patches of a side where learned positions are resampled (Idefics: 0.1)
    position_slack: float = number(0.0, at_least=0)
    rope_theta: float = number(10_000.0, above=0)
    class_token: bool = False
    patch_bias: bool = True
    embedding_norm: bool = False  # before the layers (CLIP)
    final_norm: bool = True
    final_norm_eps: float = number(0.0, at_least=0)  # 0: norm_eps
    # last layers that have weights and are not computed, as is the final norm then (LLaVA)
    unused_layers: int = number(0, at_least=0)
    unused_norm: bool = False  # the final norm alone has weights and is not computed
    keep_class: bool = False  # whether the class token's vector is one of those for the text
    # one vector per image; map: attention of a learned probe
    pool: str = choice("none", "class", "mean", "map")

    def derive(self) -> None:
        """Fills in mlp_dim and final_norm_eps."""
        self.mlp_dim = self.mlp_dim or 4 * self.embed_dim
        self.final_norm_eps = self.final_norm_eps or self.norm_eps

    def check(self) -> None:
        """Raises UserError for a vit that cannot be, and for what only a vit has."""
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

"""How large a model is."""

import dataclasses

from model.fields.limits import choice, number
from tpu.errors import UserError

GATED = ("swiglu", "geglu", "geglu_erf", "reglu")  # activations of one projection that gate another


@dataclasses.dataclass
class Shape:
    """Sizes of a model's parts; zero in a field marked "0:" means the value named there."""

    vocab_size: int = number(4096, at_least=1)
    layers: int = number(6, at_least=1)
    embed_dim: int = number(384, at_least=1)
    heads: int = number(6, at_least=1)
    # 0: heads (multi-head); 1: multi-query; between: grouped-query (arXiv:2305.13245)
    kv_heads: int = number(0, at_least=0)
    head_dim: int = number(0, at_least=0)  # 0: embed_dim / heads
    mlp_dim: int = number(0, at_least=0)  # 0: 4 * embed_dim
    activation: str = choice("gelu", "gelu_tanh", "quick_gelu", "relu", *GATED, default="gelu_tanh")
    tied_head: bool = True
    scale_embedding: bool = False  # times sqrt(embed_dim) (arXiv:1706.03762, section 3.4; Gemma)

    def derive(self) -> None:
        """Fills in the fields marked "0:". Raises UserError where heads do not divide the width."""
        if self.head_dim == 0:
            if self.embed_dim % self.heads:
                raise UserError(
                    f"model.heads={self.heads}: does not divide model.embed_dim={self.embed_dim}; "
                    f"valid: {divisors(self.embed_dim)}, or set model.head_dim"
                )
            self.head_dim = self.embed_dim // self.heads
        self.kv_heads = self.kv_heads or self.heads
        self.mlp_dim = self.mlp_dim or 4 * self.embed_dim

    def check(self) -> None:
        """Raises UserError where key heads do not divide the heads."""
        if self.heads % self.kv_heads:
            raise UserError(
                f"model.kv_heads={self.kv_heads}: does not divide model.heads={self.heads}; "
                f"valid: {divisors(self.heads)}"
            )


def divisors(number: int) -> str:
    """All divisors of a number, for people."""
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)

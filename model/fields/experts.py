"""Mixtures of experts (model.moe)."""

import dataclasses

from model.fields.attention import repeated
from model.fields.limits import choice, given, number
from tpu.errors import UserError

EXPERTS = {"model.experts": ()}


@dataclasses.dataclass
class Experts:
    """How many experts, how a token finds its own, and how they are kept busy."""

    experts: int = number(0, at_least=0)  # of a mixture-of-experts layer; 0: every feed-forward block is dense
    experts_per_token: int = 2
    expert_dim: int = number(0, at_least=0, of=EXPERTS)  # 0: mlp_dim
    # that every token passes in addition to its own (DeepSeekMoE, arXiv:2401.06066)
    shared_experts: int = number(0, at_least=0, of=EXPERTS)
    # the last of so many layers is a mixture; resolved repeats the pattern until it divides
    moe_every: int = number(1, at_least=1)
    router: str = choice("softmax", "sigmoid")  # scores over all experts before the choice; or of each (DeepSeek-V3)
    router_renormalize: bool = True  # weights of the chosen sum to one (Mixtral, Qwen3; not OLMoE)
    router_scale: float = number(1.0, above=0)  # times those weights (DeepSeek-V3: 2.5)
    # balance by a bias on the choice (arXiv:2408.15664), moved by optimizer.router_bias_rate
    router_bias: bool = given(False, of=EXPERTS)
    # 0: dropless; else an expert takes this share of a row's even load, and no more
    capacity_factor: float = number(0.0, at_least=0, of=EXPERTS)

    def derive(self) -> None:
        """Fills in expert_dim, and repeats the pattern until moe_every divides its length."""
        if self.experts:
            self.expert_dim = self.expert_dim or self.mlp_dim
            self.pattern = repeated(self.pattern, self.moe_every)

    def check(self) -> None:
        """Raises UserError where experts do not go with the rest of the model, or nothing goes with them."""
        if not self.experts:
            return
        # Of other models nobody reads what the routers did, so that nothing would balance them.
        if self.kind != "decoder":
            raise UserError(f"model.experts={self.experts}: only with model.kind='decoder', not {self.kind!r}")
        if self.pairs:
            raise UserError(f"model.experts={self.experts}: not with model.fusion='contrastive'")
        if not 1 <= self.experts_per_token <= self.experts:
            raise UserError(
                f"model.experts_per_token={self.experts_per_token}: valid: 1 to model.experts={self.experts}"
            )
        if self.mlp_bias:
            raise UserError(f"model.mlp_bias=True: experts have none; with model.experts={self.experts} give False")

    def mixes(self, layer: int) -> bool:
        """Whether layer number `layer` of a group is a mixture of experts."""
        return self.experts > 0 and (layer + 1) % self.moe_every == 0

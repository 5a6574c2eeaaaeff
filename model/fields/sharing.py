"""Shared layers, and what adapters add to a layer (docs/adapters.md)."""

import dataclasses

from model.fields.limits import choice, number
from model.fields.shape import divisors
from tpu.errors import UserError


@dataclasses.dataclass
class Sharing:
    """Which layers are one set of weights, and what each has of its own."""

    share_layers: str = choice("none", "all", "groups", "alternate")  # which layers are one set (model.stack)
    # groups: layers that follow each other and share; alternate: sets that take turns
    share_size: int = number(0, at_least=0)
    # of what each layer adds to shared matrices (arXiv:2410.20672); 0: nothing
    share_rank: int = number(0, at_least=0)
    # width of the adapters after attention and mlp (model.adapters.bottleneck); 0: none
    bottleneck_dim: int = number(0, at_least=0)
    prefix_tokens: int = number(0, at_least=0)  # learned keys and values that every token sees; 0: none

    def check(self) -> None:
        """Raises UserError where layers cannot be shared like this."""
        groups = self.layers // len(self.pattern)
        needs_size = self.share_layers in ("groups", "alternate")
        if needs_size and (self.share_size < 1 or groups % self.share_size):
            raise UserError(
                f"model.share_size={self.share_size}: with model.share_layers={self.share_layers!r} it must divide the "
                f"{groups} repetitions of model.pattern; valid: {divisors(groups)}"
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

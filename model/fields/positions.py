"""Where a token is (model.positions)."""

import dataclasses

from model.fields.limits import choice, given, number
from tpu.errors import UserError

SCALINGS = ("linear", "ntk", "dynamic", "yarn", "llama3")
SCALED, BANDS = {"model.rope_scaling": SCALINGS}, {"model.rope_scaling": ("yarn", "llama3")}
RELATIVE = {"model.positions": ("relative",)}


@dataclasses.dataclass
class Positions:
    """How a model knows the order of tokens, and what stretches the context that it was trained with."""

    positions: str = choice("rope", "learned", "sinusoidal", "relative", "alibi", "none")
    max_positions: int = 1024  # rows of the learned table
    rope_theta: float = number(10_000.0, above=0)
    rope_interleaved: bool = False  # turns the pairs (2i, 2i + 1) as GPT-J does, not (i, i + head_dim / 2)
    # what stretches a trained context (model.positions.rope)
    rope_scaling: str = choice("none", *SCALINGS)
    rope_factor: float = number(1.0, at_least=1, of=SCALED)  # by how much
    rope_original_context: int = number(0, at_least=0)  # the trained context; of dynamic, yarn and llama3
    # yarn, llama3: turns in that context up to which a frequency is divided by rope_factor
    rope_slow: float = number(1.0, above=0, of=BANDS)
    rope_fast: float = number(0.0, at_least=0, of=BANDS)  # and from which on it stays; 0: 32 (yarn), 4 (llama3)
    # yarn: multiplies queries and keys; 0: 0.1 ln(rope_factor) + 1
    rope_attention_factor: float = number(0.0, at_least=0, of={"model.rope_scaling": ("yarn",)})
    rope_local_theta: float = number(0.0, at_least=0)  # of "local" layers, unscaled (Gemma 3); 0: as the other layers
    # Pairs that turn with a token's time, row and column (M-RoPE, arXiv:2409.12191); (): all with its place in the text
    rope_sections: tuple[int, ...] = ()
    # only with positions="relative" (T5): rows of the table of score biases
    relative_buckets: int = given(32, of=RELATIVE)
    relative_distance: int = given(128, of=RELATIVE)  # from which distance on all share a row

    def derive(self) -> None:
        """Fills in rope_fast."""
        self.rope_fast = self.rope_fast or {"yarn": 32.0, "llama3": 4.0}.get(self.rope_scaling, 0.0)

    def check(self) -> None:
        """Raises UserError for positions that the model's sizes do not allow."""
        if self.positions == "rope" and self.head_dim % 2:
            raise UserError(f"model.head_dim={self.head_dim}: rotary positions need an even head_dim")
        if self.positions == "sinusoidal" and self.embed_dim % 2:
            raise UserError(f"model.embed_dim={self.embed_dim}: sinusoidal positions need an even embed_dim")
        if self.positions == "learned" and self.max_positions < 1:
            raise UserError(f"model.max_positions={self.max_positions}: learned positions need at least 1")
        if self.positions == "relative":
            self._check_relative()
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
        if self.rope_sections and (len(self.rope_sections) != 3 or 2 * sum(self.rope_sections) != self.head_dim):
            raise UserError(
                f"model.rope_sections={self.rope_sections}: needs three numbers whose sum is half of "
                f"model.head_dim={self.head_dim}"
            )

    def _check_relative(self) -> None:
        if self.kind != "encoder_decoder":
            raise UserError("model.positions='relative': only with model.kind='encoder_decoder'")
        if self.relative_buckets < 4 or self.relative_buckets % 2:
            raise UserError(f"model.relative_buckets={self.relative_buckets}: must be even and at least 4")
        if self.relative_distance <= self.relative_buckets // 2:
            raise UserError(
                f"model.relative_distance={self.relative_distance}: must be above half of "
                f"model.relative_buckets={self.relative_buckets}"
            )

    def check_context(self, context: int, field: str) -> None:
        """Raises UserError where `context` positions, asked for by `field`, do not fit the learned table."""
        if self.positions == "learned" and context > self.max_positions:
            raise UserError(
                f"{field}={context}: longer than the learned positions; "
                f"valid: 1 to model.max_positions={self.max_positions}"
            )

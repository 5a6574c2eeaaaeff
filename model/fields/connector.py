"""From the vectors of an encoder to those of the text (model.vision.connector)."""

import dataclasses
import math

from model.fields.limits import choice, number
from tpu.errors import UserError


@dataclasses.dataclass
class Connector:
    """How many vectors of an image reach the text, and of which width."""

    connector: str = choice(
        "none", "linear", "mlp", "perceiver", "pixel_shuffle", "average_pool", "merger", default="linear"
    )
    # inner width of mlp, merger and of a perceiver's layers; 0: model.embed_dim
    connector_dim: int = number(0, at_least=0)
    # only with pixel_shuffle, average_pool and merger: neighbours along a side that become one
    connector_factor: int = number(2, at_least=1)
    connector_bias: bool = True
    connector_activation: str = choice("gelu", "gelu_tanh", "relu")
    connector_eps: float = number(1e-5, above=0)  # of a perceiver's, an average_pool's and a merger's norms
    connector_qk_norm: bool = False  # only with perceiver: LayerNorm of queries and keys
    latents: int = number(64, at_least=1)  # only with perceiver: vectors of an image
    connector_layers: int = number(2, at_least=1)
    connector_heads: int = number(8, at_least=1)
    connector_head_dim: int = number(64, at_least=1)
    # rows of a learned table, added to what the n-th image of a text gives; 0: none
    image_positions: int = number(0, at_least=0)

    def check(self) -> None:
        """Raises UserError where neighbours that become one do not divide an image."""
        if self.pools and self.keep_class:
            raise UserError(f"model.vision.keep_class=True: not with model.vision.connector={self.connector!r}")
        if self.pools and (self.grid % self.shrink or self.columns % self.shrink):
            raise UserError(
                f"model.vision.connector_factor={self.connector_factor}: does not divide the {self.grid} x "
                f"{self.columns} vectors of an image"
            )

    @property
    def pools(self) -> bool:
        """Whether the connector makes one vector of several neighbours."""
        return self.connector in ("pixel_shuffle", "average_pool", "merger")

    @property
    def shrink(self) -> int:
        """Neighbours along a side that the connector makes one vector of."""
        return self.connector_factor if self.pools else 1

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

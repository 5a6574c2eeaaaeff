"""The stages of a convolutional encoder (model.vision.convolution, model.vision.resnet)."""

import dataclasses

from model.fields.limits import choice, number
from tpu.errors import UserError


@dataclasses.dataclass
class Convolutions:
    """Widths, depths and details of the stages of a cnn, a resnet, or a vit's stem that is one."""

    widths: tuple[int, ...] = (32, 64, 128)  # of a cnn's or a resnet's stages
    depths: tuple[int, ...] = (2, 2, 2, 2)  # only with resnet: blocks of each stage
    block: str = choice("basic", "bottleneck")  # of a resnet
    stem_width: int = number(64, at_least=1)  # of a resnet
    # only with resnet: after the stem and every sum; inside a block it is ReLU
    conv_activation: str = choice("relu", "gelu", "gelu_tanh")
    first_stride: int = choice(1, 2)  # of a resnet's first stage
    reduces_first: bool = False  # of a bottleneck: the stride is in its first convolution, not in that of 3 x 3
    # only with resnet: group (with standardised kernels; trainable), batch (fixed statistics)
    conv_norm: str = choice("group", "batch")

    def check(self) -> None:
        """Raises UserError where stages and their blocks do not go together."""
        if not self.widths or min(self.widths) < 1:
            raise UserError(f"model.vision.widths={self.widths}: needs at least one width of at least 1")
        resnet = self.encoder == "resnet" or self.stem == "resnet"
        if resnet and (len(self.depths) != len(self.widths) or min(self.depths) < 1):
            raise UserError(f"model.vision.depths={self.depths}: needs one number for each of model.vision.widths")
        if resnet and self.block == "bottleneck" and any(width % 4 for width in self.widths):
            raise UserError(f"model.vision.widths={self.widths}: model.vision.block='bottleneck' needs multiples of 4")

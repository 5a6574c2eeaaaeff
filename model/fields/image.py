"""Images, and what an encoder makes of each: a grid of vectors."""

import dataclasses

from model.fields.limits import choice, number
from tpu.errors import UserError

# Mean and standard deviation per channel of pixels in [0, 1].
NORMALIZATIONS = {
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # to [-1, 1]: google-research/vision_transformer, big_vision (SigLIP)
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # torchvision's models
    # openai/CLIP, clip/clip.py; LLaVA, Flamingo and Qwen2-VL take over its tower or its numbers
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}


@dataclasses.dataclass
class Image:
    """The encoder's kind, the size of images, and the pixels of a vector."""

    # none: text alone; vit, cnn (model.vision.convolution) or resnet
    encoder: str = choice("none", "vit", "cnn", "resnet")
    image_size: int = number(64, at_least=1)  # pixels of a side, where images are made one size
    # of images that are not square, whose height image_size is then; 0: image_size
    image_width: int = number(0, at_least=0)
    channels: int = choice(1, 3, default=3)  # 1: grey
    normalization: str = choice(*NORMALIZATIONS, default="half")  # of pixels 0 to 255
    patch_size: int = number(16, at_least=1)  # of a vit
    # of patches that are not square, whose height patch_size is then; 0: patch_size
    patch_width: int = number(0, at_least=0)
    # only with vit: images one after the other in a patch (Qwen2-VL: 2, a still one twice)
    temporal_patch: int = number(1, at_least=1)
    # only with vit: what makes its input, pixels or a resnet's vectors (hybrid, arXiv:2010.11929)
    stem: str = choice("patches", "resnet")

    def check(self) -> None:
        """Raises UserError where the pixels of a vector do not divide an image."""
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
        if self.patch_width and self.encoder != "vit":
            raise UserError(f"model.vision.patch_width={self.patch_width}: only with model.vision.encoder='vit'")

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
    def encoder_width(self) -> int:
        """The width of the encoder's vectors."""
        return self.embed_dim if self.encoder == "vit" else self.widths[-1]

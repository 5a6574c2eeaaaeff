"""The fields of images' vectors meeting the text (model.fusion)."""

import dataclasses

from model.fields.limits import choice, given, number
from tpu.errors import UserError

CONTRASTIVE = "contrastive"  # images and texts are encoded apart, and meet in the loss alone
LATE = "late"  # one vector of an image and one of a text meet behind both encoders (model.fusion.late)
FUSIONS = ("none", "merge", "cross", "co", "tangled", CONTRASTIVE, LATE)
MERGE, CROSS = {"model.fusion": ("merge",)}, {"model.fusion": ("cross",)}
CONNECTED, TANGLED = {"model.fusion": ("co", "tangled")}, {"model.fusion": ("tangled",)}
PAIRS = {"model.fusion": (CONTRASTIVE,)}


@dataclasses.dataclass
class Fusion:
    """What some values of model.fusion ask for; the others refuse it."""

    # the id in a text that stands for an image's vector; -1: none
    image_token: int = number(-1, at_least=-1, of={"model.fusion": ("merge", "cross")})
    # what is also seen ahead; prefix: what is given before any answer; images: each
    mask: str = choice("causal", "prefix", "images", of=MERGE)
    every: int = number(1, at_least=1, of=CROSS)  # one of so many layers of the text has cross-attention before it
    offset: int = -1  # which of them; -1: the last
    sees: str = choice("last", "all", default="all", of=CROSS)  # which of the images before a token
    # RMSNorm of queries and keys
    qk_norm: bool = given(False, of={"model.fusion": ("cross", "co", "tangled")})
    gate_per_channel: bool = given(False, of=CROSS)  # gates are vectors
    connections: int = number(2, at_least=1, of=CONNECTED)  # how many, before so many last layers of the text
    connection_heads: int = number(8, at_least=1, of=CONNECTED)
    # width of all heads; 0: model.embed_dim
    connection_dim: int = number(0, at_least=0, of=CONNECTED, zero=("model.embed_dim",))
    # of an image; each begins as the mean of as many of its vectors
    actions: int = number(1, at_least=1, of=TANGLED)
    tangled: str = choice("code", "paper", of=TANGLED)  # what ActBERT's text (paper) or published code (code) says
    similarity: str = choice("softmax", "sigmoid", of=PAIRS)  # CLIP's loss, or SigLIP's
    projection_dim: int = number(128, at_least=1, of=PAIRS)
    # the vector of a text: at its end token, or at the row's last position
    text_pool: str = choice("end", "last", of=PAIRS)
    # both vectors side by side, or their sum with learned weights for every feature
    combine: str = choice("concatenation", "average", of={"model.fusion": (LATE,)})

    def derive(self) -> None:
        """Fills in offset."""
        self.offset = self.every - 1 if self.offset == -1 else self.offset

    def check(self) -> None:
        """Raises UserError where no layer has the cross-attention."""
        if not 0 <= self.offset < self.every:
            raise UserError(f"model.vision.offset={self.offset}: valid: 0 to model.vision.every - 1 = {self.every - 1}")

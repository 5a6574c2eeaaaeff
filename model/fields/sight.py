"""How images reach the text (docs/sight.md)."""

import dataclasses

from model.fields.attention import repeated
from model.fields.fusion import CONTRASTIVE, FUSIONS, LATE
from model.fields.limits import choice
from model.fields.norms import DROPOUTS
from model.fields.vision import VisionConfig
from tpu.errors import UserError


@dataclasses.dataclass
class Sight:
    """The fusion of images and text, and the encoder of images."""

    # how images reach the text (model.fusion)
    fusion: str = choice(*FUSIONS)
    vision: VisionConfig = dataclasses.field(default_factory=VisionConfig)

    def derive(self) -> None:
        """Resolves the encoder, and repeats the pattern until vision.every divides its length. Raises UserError."""
        self.vision = self.vision.resolved(self.embed_dim)
        if self.fusion == "cross":
            self.pattern = repeated(self.pattern, self.vision.every)

    def check(self) -> None:
        """Raises UserError where images, their encoder and the text do not go together."""
        sees = self.vision.encoder != "none"
        if sees != (self.fusion != "none" or self.kind == "vision"):
            raise UserError(
                f"model.vision.encoder={self.vision.encoder!r}: with model.fusion={self.fusion!r} and "
                f"model.kind={self.kind!r} " + ("images reach nothing; set model.fusion" if sees else "it must be set")
            )
        kinds = {CONTRASTIVE: ("decoder", "encoder"), LATE: ("encoder",)}.get(self.fusion, ("decoder",))
        if self.fusion != "none" and self.kind not in kinds:
            raise UserError(
                f"model.fusion={self.fusion!r}: not with model.kind={self.kind!r}; valid: {', '.join(kinds)}"
            )
        if self.fusion == LATE and self.head != "pooled":
            raise UserError(f"model.head={self.head!r}: model.fusion='late' needs 'pooled'")
        pooled = self.vision.pool != "none"
        if sees and pooled != (self.kind == "vision" or self.fusion in (CONTRASTIVE, LATE)):
            valid = (
                "only with model.fusion='contrastive' or 'late', or model.kind='vision'"
                if pooled
                else "one of class, mean, map"
            )
            raise UserError(f"model.vision.pool={self.vision.pool!r}: {valid}")
        if self.fusion == "merge" and self.vision.mask != "causal" and (self.remembers or "sparse" in self.pattern):
            raise UserError(f"model.vision.mask={self.vision.mask!r}: not with memory or 'sparse' layers")
        if self.fusion in ("cross", "co", "tangled") and self.remembers:
            raise UserError(f"model.fusion={self.fusion!r}: not with a model that remembers")
        if self.fusion == "merge" and self.source_width != self.embed_dim:
            raise UserError(
                f"model.vision.connector='none': leaves vectors of width {self.source_width}, which do not fit a text "
                f"of model.embed_dim={self.embed_dim}; valid: linear, or another that gives them that width"
            )
        if self.fusion in ("co", "tangled"):
            self._check_connections()
        if sees and (self.kind == "vision" or self.pairs):
            named = "model.kind='vision'" if self.kind == "vision" else "model.fusion='contrastive'"
            for field in DROPOUTS:
                if value := getattr(self, field):
                    raise UserError(f"model.{field}={value}: has no effect with {named}; valid: 0")

    def _check_connections(self) -> None:
        if self.vision.connection_dim % self.vision.connection_heads:
            raise UserError(
                f"model.vision.connection_heads={self.vision.connection_heads}: does not divide "
                f"model.vision.connection_dim={self.vision.connection_dim}"
            )
        if self.fusion == "tangled" and self.vision.vectors % self.vision.actions:
            raise UserError(
                f"model.vision.actions={self.vision.actions}: does not divide the {self.vision.vectors} vectors of "
                "an image"
            )
        if len(self.pattern) * self.vision.connections > self.layers or self.share_layers != "none":
            raise UserError(
                f"model.vision.connections={self.vision.connections}: needs as many repetitions of "
                f"model.pattern, with weights of their own (model.share_layers='none')"
            )
        if self.pipeline_repeats > 1:
            raise UserError(f"model.pipeline_repeats={self.pipeline_repeats}: not with model.fusion={self.fusion!r}")

    def looks(self, layer: int) -> bool:
        """Whether layer number `layer` of a group has cross-attention to images before it."""
        return self.fusion == "cross" and layer % self.vision.every == self.vision.offset

    @property
    def pairs(self) -> bool:
        """Whether images and texts are encoded apart and compared (CLIP)."""
        return self.fusion == CONTRASTIVE

    @property
    def pooled_width(self) -> int:
        """The width of the vector that a pooled head reads."""
        beside = self.fusion == LATE and self.vision.combine == "concatenation"
        return 2 * self.embed_dim if beside else self.embed_dim

    @property
    def source_width(self) -> int:
        """The width of the vectors that leave the connector."""
        keeps = self.vision.connector == "none" or (self.vision.connector == "perceiver" and self.fusion != "merge")
        return self.vision.encoder_width if keeps else self.embed_dim

    @property
    def needs_one_size(self) -> str:
        """The first field for whose sake all images of a row must have one size; "" where there is none."""
        vision = self.vision
        found = {
            f"model.fusion={self.fusion!r}": self.fusion != "merge",
            f"model.vision.encoder={vision.encoder!r}": vision.encoder != "vit",
            f"model.vision.stem={vision.stem!r}": vision.stem != "patches",
            "model.vision.class_token=True": vision.class_token,
            f"model.vision.connector={vision.connector!r}": vision.connector == "perceiver",
            f"model.vision.image_positions={vision.image_positions}": vision.image_positions,
        }
        return next((name for name, there in found.items() if there), "")

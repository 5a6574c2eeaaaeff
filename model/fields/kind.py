"""Decoders, encoders, encoder-decoders and image classifiers (docs/encoders.md)."""

import dataclasses

from model.fields.limits import choice, given, number
from tpu.errors import UserError

ENCODER = {"model.kind": ("encoder",)}
ENCODER_DECODER = {"model.kind": ("encoder_decoder",)}


@dataclasses.dataclass
class Kind:
    """What a model is, and the fields that only some kinds have."""

    # decoder, encoder (model.bert), encoder_decoder (model.encoder_decoder), vision (model.vision.vit)
    kind: str = choice("decoder", "encoder", "encoder_decoder", "vision")
    # language (masked tokens), pooled (a label per text), token (one per token)
    head: str = choice("language", "pooled", "token", of=ENCODER)
    # outputs of a pooled or token head, or of an image classifier
    labels: int = number(0, at_least=0, of={"model.kind": ("encoder", "vision")})
    attention_qkv_bias: bool = given(True, of=ENCODER)  # False: attention_bias is of the output projection only (ViT)
    # kinds of tokens with an embedding of their own (first and second text)
    token_types: int = number(0, at_least=0, of=ENCODER)
    next_sentence: bool = given(False, of=ENCODER)  # a second head, for whether the second text follows the first
    decoder_layers: int = number(0, at_least=0, of=ENCODER_DECODER)  # 0: layers
    # times the states before the head; T5 with tied head: 1 / sqrt(embed_dim)
    output_scale: float = number(1.0, above=0, of=ENCODER_DECODER)
    start_token: int = given(-1, of=ENCODER_DECODER)  # with which the decoder begins; -1: the end-of-document token

    def derive(self) -> None:
        """Fills in decoder_layers."""
        if self.kind == "encoder_decoder":
            self.decoder_layers = self.decoder_layers or self.layers

    def check(self) -> None:
        """Raises UserError for what the kind of model does not have, or not like this."""
        if self.kind == "vision":
            if self.labels < 1:
                raise UserError(f"model.labels={self.labels}: model.kind='vision' needs at least 1")
        elif (self.head == "language") != (self.labels == 0):
            raise UserError(
                f"model.labels={self.labels}: model.head={self.head!r} needs "
                f"{'none' if self.head == 'language' else 'at least 1'}"
            )
        if self.next_sentence and self.head != "language":
            raise UserError(f"model.next_sentence=True: needs model.head='language', not {self.head!r}")
        if self.kind != "decoder" and self.pattern != ("global",):
            raise UserError(f"model.pattern={self.pattern!r}: model.kind={self.kind!r} has global layers only")
        if self.kind == "encoder_decoder" and self.positions in ("rope", "learned"):
            raise UserError(
                f"model.positions={self.positions!r}: model.kind='encoder_decoder' takes relative, sinusoidal or none"
            )

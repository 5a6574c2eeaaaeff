"""The batch: what one step consumes, as a dictionary of arrays. Each array is declared once, with all that follows from
the declaration: how it lies on a mesh, what fills up the last batch, what a random batch holds.

Legend: B rows, T tokens per row, N images or M patches per row, H, W pixels along their sides.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from model.config import ModelConfig
from train.config import DataConfig

Batch = dict[str, Any]  # numpy arrays on the host, jax arrays in the step; a single row has the same names, without [B]


class Field(NamedTuple):
    """One array of a batch."""

    shape: tuple[int, ...]  # [B, ...], of the global batch
    dtype: str
    axes: tuple[str, ...]  # logical axes of the first dimensions; the others are never cut
    padding: float = 0  # what rows hold that fill up the last batch
    random: int | str = 2  # random batches hold whole numbers below this, "ones", or "steps": 0, 1, ... along the row


Layout = dict[str, Field]


def by_token(rows: int, tokens: int, dtype: str = "int32", **more: Any) -> Field:
    """A field [B, T]."""
    return Field((rows, tokens), dtype, ("batch", "sequence"), **more)


def text_layout(rows: int, tokens: int, vocab_size: int) -> Layout:
    """Packed rows of tokens."""
    return {
        "tokens": by_token(rows, tokens, random=vocab_size),
        "targets": by_token(rows, tokens, random=vocab_size),  # the token that follows
        "loss_weights": by_token(rows, tokens, "float32", random="ones"),  # 0 where there is nothing to predict
        # 1, 2, ... per document of the row, 0 for padding; attention stays inside a segment
        "segments": by_token(rows, tokens, random="ones"),
        "positions": by_token(rows, tokens, random="steps"),  # counted from 0 in every segment
    }


def encoder_layout(rows: int, inputs: int, vocab_size: int) -> Layout:
    """What the encoder of an encoder-decoder reads; the decoder's are the fields of `text_layout`."""
    return {
        "inputs": Field((rows, inputs), "int32", ("batch",), random=vocab_size),
        "input_segments": Field((rows, inputs), "int32", ("batch",), random="ones"),
    }


def image_layout(rows: int, count: int, model: ModelConfig, data: DataConfig) -> Layout:
    """`count` images a row, or packed patches of them with data.image_fit="native"; nothing for a blind model."""
    vision = model.vision
    if vision.encoder == "none":
        return {}
    native = data.image_fit == "native"
    count, sides = (data.patches, (vision.patch_size,) * 2) if native else (count, vision.sides)
    found = {
        # [B, N, H, W, channels], 0 where there is none; or patches [B, M, H, W, channels]
        "images": Field((rows, count, *sides, vision.channels), "uint8", ("batch",), random=256),
        # the segment that an image belongs to, 0: none; or a patch's image
        "image_segments": Field((rows, count), "int32", ("batch",), random="ones"),
    }
    # row and column of a packed patch in its image
    return found | ({"image_positions": Field((rows, count, 2), "int32", ("batch",))} if native else {})


def sight_layout(rows: int, tokens: int, turned: bool = False) -> Layout:
    """Where images stand among the tokens of their row; `turned` with model.rope_sections."""
    # time, row and column of a token
    found = {"rope_positions": Field((rows, tokens, 3), "int32", ("batch", "sequence"))} if turned else {}
    return found | {
        "image_slots": by_token(rows, tokens, padding=-1),  # which of the row's image vectors stands at a token, or -1
        "images_seen": by_token(rows, tokens),  # images of the row up to and with this token
        "given": by_token(rows, tokens),  # 1 before the first token of a document that is to be answered
    }

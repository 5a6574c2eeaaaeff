"""The batch: what one step consumes. A NamedTuple, so that it is a pytree to jax and to Grain without importing either.

Legend: B rows, T tokens per row, N images or M patches per row, H, W pixels along their sides.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Batch(NamedTuple):
    """Packed rows of tokens, as numpy arrays on the host and as jax arrays in the step."""

    tokens: Any  # [B, T] int32
    targets: Any  # [B, T] int32, the token that follows, or a label; [B, T, L] float32 where there are L numbers
    loss_weights: Any  # [B, T] float32, 0 where there is nothing to predict
    segments: Any  # [B, T] int32, 1, 2, ... per document of the row, 0 for padding; attention stays inside a segment
    positions: Any  # [B, T] int32, counted from 0 in every segment
    token_types: Any = None  # [B, T] int32, 0 or 1: of which of two texts (encoders)
    next_sentence: Any = None  # [B, 1] int32, 1 where the second text is not what follows the first (encoders)
    inputs: Any = None  # [B, S] int32, the encoder's tokens; the fields above are the decoder's (encoder-decoders)
    input_segments: Any = None  # [B, S] int32
    images: Any = None  # [B, N, H, W, channels] uint8, 0 where there is none; or patches [B, M, H, W, channels], packed
    image_segments: Any = None  # [B, N] int32, the segment that an image belongs to, 0: none; [B, M], a patch's image
    image_positions: Any = None  # [B, M, 2] int32, row and column of a packed patch in its image
    image_slots: Any = None  # [B, T] int32, which of the row's image vectors stands at a token, -1 for none (merge)
    images_seen: Any = None  # [B, T] int32, images of the row up to and with this token
    rope_positions: Any = None  # [B, T, 3] int32, time, row and column of a token (model.rope_sections)
    given: Any = None  # [B, T] int32, 1 before the first token of a document that is to be answered


BY_TOKEN = (
    "tokens",
    "targets",
    "loss_weights",
    "segments",
    "positions",
    "token_types",
    "image_slots",
    "images_seen",
    "rope_positions",
    "given",
)  # fields with a second dimension T

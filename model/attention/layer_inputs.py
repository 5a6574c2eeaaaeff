"""What is alike for all layers of a stack, in one tuple."""

from __future__ import annotations

from typing import Any, NamedTuple

from model.attention.cross_attention import Source
from model.place import Place


class LayerInputs(NamedTuple):
    """What every layer of a stack is given beside its hidden states.

    place: of the T tokens. slots: of the keys (with a cache, those of it) where they stand elsewhere; None: the tokens
      are all that there is, and what a cache held before is not looked at.
    rotation: `model.positions.rope.rotations` of the positions, or None.
    bias: `model.positions.relative_positions.RelativeBias` of queries and keys, or None.
    source: what cross-attention looks at, or None.
    """

    place: Place
    slots: Place | None = None
    rotation: Any = None
    bias: Any = None
    source: Source | None = None

"""Where tokens of texts, images and videos stand in time, row and column (M-RoPE, Qwen2-VL, arXiv:2409.12191, section
2.1). Plain numpy: rows of data are made without jax.

Legend: T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def turns(runs: Sequence[int | tuple[int, int, int]]) -> np.ndarray:
    """Time, row and column that every token of a text is turned by, [T, 3] int32.

    Tokens of text count on in all three. An image that begins at p has (p + time, p + row, p + column) at its vectors,
    and what follows goes on at p + the larger side of its grid, whatever its time came to.

    runs: so many tokens of text, or the grid of an image or a video: times, rows and columns of its vectors.
    """
    parts, begin = [np.zeros((0, 3), np.int64)], 0
    for run in runs:
        if isinstance(run, int):
            parts.append(begin + np.repeat(np.arange(run)[:, None], 3, 1))
            begin += run
        else:
            parts.append(begin + np.indices(run).reshape(3, math.prod(run)).T)
            begin += max(run[1:])
    return np.concatenate(parts).astype(np.int32)


def shift(turned: np.ndarray) -> int:
    """How far the token after those `turned` [T, 3] is turned ahead of its number in the text, T."""
    return int(turned.max(initial=-1)) + 1 - len(turned)

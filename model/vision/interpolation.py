"""Resampling along one axis as a matrix [out, in] whose rows sum to 1; a resize is one for each side. numpy only.

With antialias the kernel widens with the ratio, as in Pillow and torch. Without, every output looks at the nearest two
or four inputs, as torch's `F.interpolate(align_corners=False)`; `jax.image.resize` has another cubic kernel (a = -0.5).
"""

from __future__ import annotations

import numpy as np


def _cubic(distance: np.ndarray, a: float) -> np.ndarray:
    """Keys' kernel ("Cubic convolution interpolation for digital image processing", 1981, equation 4)."""
    x = np.abs(distance)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _linear(distance: np.ndarray) -> np.ndarray:
    return np.maximum(0.0, 1 - np.abs(distance))


def antialiased(size: int, out: int, method: str) -> np.ndarray:
    """The kernel around each output's centre, as wide as the output's own pixel is; what lies outside is left out."""
    scale = size / out
    distance = (np.arange(size) + 0.5 - scale * (np.arange(out) + 0.5)[:, None]) / max(scale, 1.0)
    weights = _cubic(distance, -0.5) if method == "bicubic" else _linear(distance)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def interpolated(size: int, out: int, method: str, slack: float = 0.0) -> np.ndarray:
    """Two or four pixels around each output's centre; those outside are the border's.

    slack: added to `out`, as some do to be safe from rounding: the outputs then lie a little nearer.
    """
    centres = size / (out + slack) * (np.arange(out) + 0.5) - 0.5
    taps = np.arange(-1, 3) if method == "bicubic" else np.arange(2)
    near = np.floor(centres)[:, None] + taps
    distance = centres[:, None] - near
    weights = np.zeros((out, size))
    kernel = _cubic(distance, -0.75) if method == "bicubic" else _linear(distance)
    columns = np.clip(near, 0, size - 1).astype(int)
    np.add.at(weights, (np.arange(out)[:, None], columns), kernel)
    return weights.astype(np.float32)

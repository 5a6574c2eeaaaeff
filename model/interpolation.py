"""Resampling along one axis as a matrix: a resized array is its product with one matrix per axis. numpy only.

Output i of m is centred at (i + 1/2) n / m - 1/2 of the n inputs, and inputs beyond the edge are the edge's, as torch
has it with align_corners=False. Bicubic weights are Keys' kernel (IEEE TASSP 29:1153, equation 15).
"""

from __future__ import annotations

import numpy as np

BICUBIC = -0.75  # the kernel's parameter a in torch; jax.image.resize takes -0.5


def bicubic(inputs: int, outputs: int, a: float = BICUBIC, slack: float = 0.0) -> np.ndarray:
    """[outputs, inputs] float64: cubic convolution over four neighbours, without antialiasing.

    slack: added to the m above, as some do to be safe from rounding: the outputs then lie a little nearer.
    """
    centres = (np.arange(outputs) + 0.5) * inputs / (outputs + slack) - 0.5
    first = np.floor(centres).astype(int) - 1
    matrix = np.zeros((outputs, inputs))
    for neighbour in range(4):
        x = np.abs(centres - (first + neighbour))
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
        weights = np.where(x <= 1, near, np.where(x < 2, far, 0.0))
        np.add.at(matrix, (np.arange(outputs), np.clip(first + neighbour, 0, inputs - 1)), weights)
    return matrix

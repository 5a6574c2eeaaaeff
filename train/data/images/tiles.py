"""Sizes and cuts of an image: patches at its native resolution, or tiles.

Native resolution is Qwen2-VL's (Wang et al. 2024, arXiv:2409.12191, section 2.1); tiles are LLaVA-NeXT's any resolution
(Liu et al. 2024; select_best_resolution in its llava/mm_utils.py).

Legend: H, W height and width in pixels, h, w in patches, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tpu.errors import UserError
from train.data.images.resize import fit

Grid = tuple[int, int]  # rows, columns


def smart_resize(
    height: int,
    width: int,
    factor: int = 28,
    min_pixels: int = 4 * 28 * 28,
    max_pixels: int = 16384 * 28 * 28,
) -> tuple[int, int]:
    """The (height, width) nearest to the image's in which both are multiples of `factor` and the pixels within bounds.

    As Qwen2-VL's: sides are rounded, and where that leaves the bounds, scaled by the square root of what is wrong and
    rounded to the inside. A side of less than half a factor counts as too few pixels, and loses the shape. A side is
    never less than `factor`, which outranks `max_pixels`. Raises UserError for a side above 200 times the other.
    """
    if height < 1 or width < 1:
        raise UserError(f"height={height} width={width}: must be at least 1")
    if factor < 1 or not 1 <= min_pixels <= max_pixels:
        given = f"factor={factor} min_pixels={min_pixels} max_pixels={max_pixels}"
        raise UserError(f"{given}: must be at least 1, and min_pixels at most max_pixels")
    if max(height, width) > 200 * min(height, width):
        raise UserError(f"height={height} width={width}: one side is more than 200 times the other; crop or split it")
    h, w = round(height / factor) * factor, round(width / factor) * factor
    if h * w > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        h = max(factor, math.floor(height / shrink / factor) * factor)
        w = max(factor, math.floor(width / shrink / factor) * factor)
    elif h * w < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        h = math.ceil(height * grow / factor) * factor
        w = math.ceil(width * grow / factor) * factor
    return h, w


def patches(image: np.ndarray, patch: int) -> tuple[np.ndarray, Grid]:
    """[H, W, C] to ([h * w, patch * patch * C], (h, w)), of the same dtype.

    Patches are ordered row by row; so are the pixels in each, channels last. Raises UserError where `patch` does not
    divide both sides.
    """
    if image.ndim != 3 or patch < 1 or image.shape[0] % patch or image.shape[1] % patch or 0 in image.shape:
        raise UserError(f"patch={patch}: must divide both sides of [H, W, C], here {list(image.shape)}")
    H, W, C = image.shape
    h, w = H // patch, W // patch
    cut = image.reshape(h, patch, w, patch, C).swapaxes(1, 2)
    return cut.reshape(h * w, patch * patch * C), (h, w)


def best_grid(height: int, width: int, grids: Sequence[Grid], tile: int) -> Grid:
    """Of `grids` of tiles (rows, columns) the one that keeps most of the image's pixels, then wastes fewest of its own.

    Pixels kept are those of the image scaled to lie inside the grid, but no more than it has: enlarging adds none. Of
    equals the first wins. Raises UserError where there is none to choose.
    """
    if not grids or min(min(grid) for grid in grids) < 1 or min(height, width, tile) < 1:
        given = f"height={height} width={width} grids={list(grids)} tile={tile}"
        raise UserError(f"{given}: must be at least 1, and at least one (rows, columns)")

    def merit(grid: Grid) -> tuple[int, int]:
        rows, columns = grid[0] * tile, grid[1] * tile
        scale = min(columns / width, rows / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - rows * columns

    return max(grids, key=merit)


def tiles(
    image: np.ndarray, tile: int, grids: Sequence[Grid], fill: float | Sequence[float] = 0, method: str = "bicubic"
) -> list[np.ndarray]:
    """[H, W, C] to a list of [tile, tile, C]: first the whole, squashed, then the tiles of `best_grid` row by row.

    The tiles are cut from the image padded with `fill` to the grid's size, its shape kept. Raises UserError.
    """
    whole = fit(image, tile, tile, "squash", method=method)
    rows, columns = best_grid(*image.shape[:2], grids, tile)
    large = fit(image, rows * tile, columns * tile, "pad", fill, method)
    cut = large.reshape(rows, tile, columns, tile, -1).swapaxes(1, 2)
    return [whole, *cut.reshape(rows * columns, tile, tile, -1)]

"""Resizing and fitting images [H, W, C] as the models' own training did.

A resize is one matrix of weights per side (interpolation). With antialias uint8 is left to Pillow itself, which
is exact by definition and faster. "nearest" is the pixel under the centre (the later of two): Pillow's, and torch's
"nearest-exact".

Legend: H, W height and width given, h, w wanted, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from model.vision.interpolation import antialiased, interpolated
from tpu.errors import UserError

METHODS = ("bicubic", "bilinear", "nearest")
MOST_TO_CROP = 40_000_000  # pixels of an image made as large as to fill what it is cropped to
FITS = ("squash", "pad", "crop")
_PILLOW = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def resize(image: np.ndarray, height: int, width: int, method: str = "bicubic", antialias: bool = True) -> np.ndarray:
    """[H, W, C] uint8 or float32 to [height, width, C] of the same dtype; uint8 is rounded and clipped.

    The cubic kernel has a = -0.5 with antialias, as Pillow's, and -0.75 without, as torch's. Raises UserError.
    """
    _check(image, height, width)
    if method not in METHODS:
        raise UserError(f"method={method!r}: unknown; valid: {', '.join(METHODS)}")
    H, W, C = image.shape
    if method == "nearest":
        return image[_nearest(H, height)][:, _nearest(W, width)]
    if image.dtype == np.uint8 and antialias:
        return _by_pillow(image, height, width, _PILLOW[method])
    weights = antialiased if antialias else interpolated
    rows, columns = weights(H, height, method), weights(W, width, method)
    out = (rows @ image.astype(np.float32).reshape(H, W * C)).reshape(height, W, C)
    out = np.matmul(columns, out)  # [w, W] x [h, W, C]
    return np.clip(np.rint(out), 0, 255).astype(np.uint8) if image.dtype == np.uint8 else out


def fit(
    image: np.ndarray,
    height: int,
    width: int,
    how: str = "squash",
    fill: float | Sequence[float] = 0,
    method: str = "bicubic",
) -> np.ndarray:
    """[H, W, C] to [height, width, C], with antialias: shape changed, or kept by borders of `fill`, or by cutting.

    "squash" resizes both sides. "pad" keeps all of the image, in the middle (LLaVA-1.5 and LLaVA-NeXT). "crop" fills
    the whole and cuts what sticks out on both sides (CLIP). `fill` is one value, or one per channel. Raises UserError.
    """
    _check(image, height, width)
    if how not in FITS:
        raise UserError(f"how={how!r}: unknown; valid: {', '.join(FITS)}")
    if how == "squash":
        return resize(image, height, width, method)
    H, W, C = image.shape
    if how == "crop":
        # The shorter side exactly, the longer rounded down and the odd pixel to even, as torchvision does.
        h, w = (height, W * height // H) if W * height >= H * width else (H * width // W, width)
        if h * w > MOST_TO_CROP:
            raise UserError(
                f"{H} x {W} pixels (height x width) would be made {h} x {w} before they are cropped to {height} x "
                f"{width}; at most {MOST_TO_CROP / 1e6:g} megapixels: crop or split the image"
            )
        top, left = round((h - height) / 2), round((w - width) / 2)
        return resize(image, h, w, method)[top : top + height, left : left + width]
    h, w = padded_size(H, W, height, width)
    top, left = (height - h) // 2, (width - w) // 2
    if np.ndim(fill) and np.shape(fill) != (C,):
        raise UserError(f"fill={fill}: must be one value or one for each of {C} channels")
    out = np.empty((height, width, C), image.dtype)
    out[:] = fill
    out[top : top + h, left : left + w] = resize(image, h, w, method)
    return out


def padded_size(H: int, W: int, height: int, width: int) -> tuple[int, int]:
    """The (height, width) that an image H x W has inside height x width with its shape kept, rounded up."""
    across, down = width / W, height / H
    if across < down:
        return min(math.ceil(H * across), height), width
    return height, min(math.ceil(W * down), width)


def _check(image: np.ndarray, height: int, width: int) -> None:
    if image.ndim != 3 or 0 in image.shape or image.dtype not in (np.uint8, np.float32):
        raise UserError(f"image={image.dtype} {list(image.shape)}: must be uint8 or float32 [H, W, C], none of them 0")
    if height < 1 or width < 1:
        raise UserError(f"height={height} width={width}: must be at least 1")


def _by_pillow(image: np.ndarray, height: int, width: int, kernel: Image.Resampling) -> np.ndarray:
    """RGB at once; else channel by channel, for Pillow would take four for colour and opacity."""

    def resized(part: np.ndarray) -> np.ndarray:
        return np.array(Image.fromarray(np.ascontiguousarray(part)).resize((width, height), kernel))

    C = image.shape[-1]
    return resized(image) if C == 3 else np.stack([resized(image[..., c]) for c in range(C)], axis=-1)


def _nearest(size: int, out: int) -> np.ndarray:
    """floor((i + 1/2) size / out), in integers."""
    return (2 * np.arange(out) + 1) * size // (2 * out)

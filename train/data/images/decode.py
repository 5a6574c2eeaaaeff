"""Images in: whatever holds one becomes uint8 [H, W, 3] RGB, upright and over white, and then the numbers models take.

The header is read before pixels are. What is too large, broken, cut off or of another format is refused in one line.

Legend: H height, W width in pixels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from tpu.errors import UserError

Source = bytes | str | Path | np.ndarray | Image.Image

# What a file begins with, and its reader. Readers are called by name, not through Image.open: no other format is ever
# tried, and a size that Pillow would refuse by a limit of its own can be named against ours.
FORMATS = {
    "PNG": (rb"\x89PNG\r\n\x1a\n", PngImageFile),
    "JPEG": (rb"\xff\xd8\xff", JpegImageFile),
    "WEBP": (rb"(?s)RIFF....WEBP", WebPImageFile),
    "GIF": (rb"GIF8[79]a", GifImageFile),
    "BMP": (rb"BM", BmpImageFile),
    "TIFF": (rb"II[*+]\0|MM\0[*+]", TiffImageFile),
}
TURNS = {  # EXIF's orientation (2.3, tag 0x0112): what makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDE = 2**16 - 1  # pixels, JPEG's own limit: Pillow's time for one long line grows with its square
ANIMATED = ("GIF", "PNG", "WEBP")  # pages of a TIFF have no times


@dataclasses.dataclass(frozen=True)
class Limits:
    """The most that is decoded: a small file can ask for any amount of memory and time."""

    megapixels: float = 40.0  # of one image, 10^6 pixels
    animation_megapixels: float = 1000.0  # of all frames of an animation together


def decode(source: Source, limits: Limits = Limits(), name: str = "image") -> np.ndarray:
    """One image as uint8 [H, W, 3] RGB: upright as its EXIF says, alpha over white, 16-bit greyscale scaled to 8.

    `source` is a file's bytes or path (PNG, JPEG, WEBP, GIF, BMP or TIFF; of an animation the first frame), an image of
    Pillow, or uint8 [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], which is shared where it is already right. `name` and
    the path open every message. Raises UserError for what cannot be read whole or exceeds `limits`.
    """
    name = _named(source, name)
    if isinstance(source, np.ndarray):
        return _from_array(source, limits, name)
    with _opened(source, limits, name) as image:
        return _pixels(image)


def size(source: Source, limits: Limits = Limits(), name: str = "image") -> tuple[int, int]:
    """The two sides of an image as they are in its file, from the header alone: height and width, or the other way
    round where EXIF turns it. Raises UserError as `decode` does for a header."""
    if isinstance(source, np.ndarray):
        return source.shape[:2]
    with _opened(source, limits, _named(source, name)) as image:
        return image.height, image.width


def frames(
    source: Source, count: int, limits: Limits = Limits(), name: str = "image"
) -> tuple[list[np.ndarray], list[float]]:
    """`count` frames of an animated GIF, PNG or WEBP, as `decode` gives them, and when each begins, in seconds.

    They are those nearest to `count` instants spread evenly from the first frame to the last; an animation with fewer
    frames repeats some, a still image itself. A frame without a duration lasts 0.1 s. Raises UserError as `decode`.
    """
    name = _named(source, name)
    if count < 1:
        raise UserError(f"{name}: count={count} frames: must be at least 1")
    if isinstance(source, np.ndarray):
        return [_from_array(source, limits, name)] * count, [0.0] * count
    with _opened(source, limits, name) as image:
        total = getattr(image, "n_frames", 1) if image.format in ANIMATED else 1
        if total == 1:
            return [_pixels(image)] * count, [0.0] * count
        if (millions := total * image.width * image.height / 1e6) > limits.animation_megapixels:
            most = f"at most {limits.animation_megapixels:g} in all"
            raise UserError(f"{name}: {total} frames of {millions / total:.8g} megapixels are {millions:.8g}; {most}")
        first = int(getattr(image, "default_image", False))  # an APNG's picture for readers that know no animation
        starts = _starts(image, range(first, total), limits, name)
        instants = np.linspace(0, starts[-1], count)
        chosen = np.abs(starts[:, None] - instants).argmin(0).tolist()
        found = {}
        for index in sorted(set(chosen)):
            _seek(image, first + index, limits, name)
            found[index] = _pixels(image)
        return [found[index] for index in chosen], [float(starts[index]) for index in chosen]


# Opening


def _named(source: Source, name: str) -> str:
    return f"{name} {str(source)!r:.200}" if isinstance(source, (str, Path)) else name


@contextlib.contextmanager
def _opened(source: bytes | str | Path | Image.Image, limits: Limits, name: str) -> Iterator[Image.Image]:
    """The image with its header read and its size within limits; what fails until the end becomes a UserError."""
    kind = "image"
    with contextlib.ExitStack() as stack:
        try:
            if isinstance(source, Image.Image):
                image = source
            else:
                stream = stack.enter_context(_stream(source, name))
                kind = _format(stream, name)
                with _quiet():
                    image = stack.enter_context(FORMATS[kind][1](stream))
            _check_size(*image.size, limits, name)
            yield image
        except UserError:
            raise
        except Image.DecompressionBombError as error:
            most = f"at most {limits.megapixels:g} (data.max_megapixels)"
            raise UserError(f"{name}: more megapixels than Pillow reads; {most}: {error}") from error
        except Exception as error:  # Pillow's readers let anything through, from struct.error to ZeroDivisionError.
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{name}: not a whole {kind} that can be read: {reason}") from error


def _stream(source: bytes | str | Path, name: str) -> io.BufferedIOBase:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if not isinstance(source, (str, Path)):
        raise UserError(f"{name}: is {type(source).__name__}; valid: bytes, a path, a numpy array, an image of Pillow")
    try:
        return open(source, "rb")
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: cannot be opened: {getattr(error, 'strerror', error)}") from error


def _format(stream: io.BufferedIOBase, name: str) -> str:
    head = stream.read(16)
    stream.seek(0)
    for kind, (beginning, _) in FORMATS.items():
        if re.match(beginning, head):
            return kind
    raise UserError(f"{name}: no image that can be read (begins with {head!r}); valid: {', '.join(FORMATS)}")


def _check_size(width: int, height: int, limits: Limits, name: str) -> None:
    if width < 1 or height < 1:
        raise UserError(f"{name}: {height} x {width} pixels (height x width): there are none")
    if (millions := height * width / 1e6) > limits.megapixels:
        asked = f"{height} x {width} pixels (height x width) are {millions:.8g} megapixels"
        raise UserError(f"{name}: {asked}; at most {limits.megapixels:g} (data.max_megapixels)")
    if max(height, width) > SIDE:
        raise UserError(f"{name}: {height} x {width} pixels (height x width); a side is at most {SIDE}")


_FILTERS = threading.Lock()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Pillow's warnings: of sizes, which are refused, and of EXIF. One thread at a time: filters are global."""
    with _FILTERS, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# Frames


def _starts(image: Image.Image, which: range, limits: Limits, name: str) -> np.ndarray:
    """When each of the frames begins, in seconds from the first."""
    milliseconds = [0.0]
    for index in which:  # The last too, though nothing follows: Pillow rewinds an animated PNG only from there.
        _seek(image, index, limits, name)
        image.load()  # WEBP knows the duration only then.
        milliseconds.append(image.info.get("duration") or 100.0)
    return np.cumsum(milliseconds[:-1]) / 1000


def _seek(image: Image.Image, index: int, limits: Limits, name: str) -> None:
    with _quiet():
        image.seek(index)
    _check_size(*image.size, limits, name)  # A frame of a GIF may be larger than the file's header says.


# Pixels


def _pixels(image: Image.Image) -> np.ndarray:
    """uint8 [H, W, 3] of an image of any mode. Raises ValueError for values that have no scale."""
    bits = getattr(image, "tag_v2", {}).get(258, (16,))[0]  # TIFF's BitsPerSample
    image = _upright(image)
    if image.mode == "F":
        raise ValueError("its values are float, of unknown range")
    if image.mode.startswith("I"):
        return np.repeat(_grey(image, 12 if bits == 12 else 16)[..., None], 3, axis=-1)
    if image.mode == "La":  # Pillow goes from there to no other mode
        image = image.convert("LA")
    if image.has_transparency_data:
        return _over_white(np.asarray(image.convert("RGBA")))
    return np.array(image.convert("RGB"))


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    try:
        with _quiet():
            orientation = image.getexif().get(0x0112)
    except Exception:  # What EXIF says may be broken where the image is whole.
        return image
    return image.transpose(TURNS[orientation]) if orientation in TURNS else image


def _grey(image: Image.Image, bits: int) -> np.ndarray:
    """uint8 [H, W] from integers of 12 or 16 bits, which Pillow would clip rather than scale."""
    values, most = np.asarray(image).astype(np.int64), 2**bits - 1
    if values.min() < 0 or values.max() > most:
        raise ValueError(f"its greyscale values are {values.min()} to {values.max()}; at most 0 to {most} is known")
    levels = (values * 255 + most // 2) // most
    if (clear := image.info.get("transparency")) is not None:
        levels[values == clear] = 255
    return levels.astype(np.uint8)


def _from_array(array: np.ndarray, limits: Limits, name: str) -> np.ndarray:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or array.shape[2:] not in ((), (1,), (3,), (4,)):
        valid = "uint8 [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]"
        raise UserError(f"{name}: an array {array.dtype} {list(array.shape)}; valid: {valid}")
    _check_size(array.shape[1], array.shape[0], limits, name)
    array = array[..., None] if array.ndim == 2 else array
    if array.shape[-1] == 4:
        return _over_white(array)
    return np.repeat(array, 3, axis=-1) if array.shape[-1] == 1 else np.ascontiguousarray(array)


def _over_white(image: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 4] to uint8 [H, W, 3]: colour * alpha + white * (1 - alpha), rounded."""
    colour, alpha = image[..., :3].astype(np.uint16), image[..., 3:].astype(np.uint16)
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)

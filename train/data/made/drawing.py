"""What the pictures made here share: seeds, splits, colours, shapes with smooth edges, and letters.

A picture is a pure function of (seed, task, split, index). What is on it irrespective of jitter, its composition,
belongs to one split for ever, decided by a hash; a picture is redrawn until its composition is of the split asked for.

Legend: S side of a picture in pixels, n side of a stamp; "parts" are parts of the side, x to the right, y downwards.
"""

from __future__ import annotations

import functools
import hashlib
import zlib
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from tpu.errors import UserError

T = TypeVar("T")
RGB = tuple[int, int, int]

SPLITS = ("train", "test")
TEST_SHARE = 0.2
SMALLEST = 32  # pixels; below it shapes can no longer be told apart
LEGIBLE = 64  # pixels; below it the dots of letters run together

COLOURS: dict[str, RGB] = {
    "red": (214, 40, 40),
    "green": (34, 150, 70),
    "blue": (38, 84, 212),
    "yellow": (238, 196, 20),
    "purple": (138, 52, 178),
    "orange": (242, 124, 18),
}
BACKGROUNDS: tuple[RGB, ...] = ((250, 250, 250), (236, 240, 244), (244, 240, 232), (238, 244, 238))
INK: RGB = (50, 54, 60)
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")

_STAR = [((1.0, 0.46)[k % 2] * np.sin(k * np.pi / 5), (-1.0, -0.46)[k % 2] * np.cos(k * np.pi / 5)) for k in range(10)]
_ARM, _END = 0.3, 0.92
_CORNERS = {  # (x, y) in radii
    "square": [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)],
    "triangle": [(0.0, -0.95), (1.0, 0.8), (-1.0, 0.8)],
    "star": _STAR,
    "cross": [(-_ARM, -_END), (_ARM, -_END), (_ARM, -_ARM), (_END, -_ARM), (_END, _ARM), (_ARM, _ARM)]
    + [(_ARM, _END), (-_ARM, _END), (-_ARM, _ARM), (-_END, _ARM), (-_END, -_ARM), (-_ARM, -_ARM)],
    "diamond": [(0.0, -1.0), (0.78, 0.0), (0.0, 1.0), (-0.78, 0.0)],
}


def generator(seed: int, task: str, split: str, index: int) -> np.random.Generator:
    """The random numbers of one record. Raises UserError for a split that is none, or negative numbers."""
    if split not in SPLITS:
        raise UserError(f"split={split!r}: no such split; valid: {', '.join(SPLITS)}")
    if seed < 0 or index < 0:
        raise UserError(f"seed={seed}, index={index}: must not be negative; valid: 0, 1, ...")
    return np.random.default_rng((seed, zlib.crc32(task.encode()), SPLITS.index(split), index))


def pick(rng: np.random.Generator, choices: Sequence[T]) -> T:
    """One of `choices`, each as likely as another."""
    return choices[int(rng.integers(len(choices)))]


def split_of(composition: str) -> str:
    """The split that a composition belongs to, in every process and for every seed; TEST_SHARE of all are "test"."""
    digest = hashlib.blake2b(composition.encode(), digest_size=8).digest()
    return SPLITS[int.from_bytes(digest, "big") < TEST_SHARE * 2**64]


def named(colour: str, shape: str) -> str:
    """ "a red circle", "an orange star"."""
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape}"


def fitting(split: str, draw: Callable[[], T | None], composition: Callable[[T], str]) -> T:
    """Calls `draw` until it gives something (None: it failed) whose composition is of the split."""
    while True:
        found = draw()
        if found is not None and split_of(composition(found)) == split:
            return found


def canvas(size: int, background: RGB, least: int = SMALLEST) -> np.ndarray:
    """An empty picture, uint8 [S, S, 3]. Raises UserError where S is below `least`."""
    if size < least:
        raise UserError(f"size={size}: too small to make out what is drawn; valid: {least} pixels or more")
    return _ground(size, background).copy()


@functools.lru_cache(16)
def _ground(size: int, background: RGB) -> np.ndarray:
    return np.tile(np.array(background, np.uint8), (size, size, 1))


@functools.lru_cache(4096)
def shape_coverage(shape: str, radius: float) -> np.ndarray:
    """How much of each pixel the shape covers, float32 [n, n] in [0, 1]; the centre is in the middle, radius in pixels.

    Whatever the shape, it stays within `radius` to each side, so n = 2 ceil(radius).
    """
    fine, half = 8, int(np.ceil(radius))
    samples = ((np.arange(2 * half * fine) + 0.5) / fine - half) / radius
    x, y = samples[None, :], samples[:, None]
    if shape == "circle":
        inside = x**2 + y**2 < 0.93**2
    else:
        inside = np.zeros((len(samples), len(samples)), bool)
        corners = _CORNERS[shape]
        for (x1, y1), (x2, y2) in zip(corners, corners[1:] + corners[:1], strict=True):
            if y1 != y2:  # even-odd rule: each edge to the right of a sample takes it in or out
                inside ^= ((y1 > y) != (y2 > y)) & (x < x1 + (x2 - x1) * (y - y1) / (y2 - y1))
    return inside.reshape(2 * half, fine, 2 * half, fine).mean((1, 3), dtype=np.float32)


@functools.lru_cache(4096)
def _stamp(shape: str, radius: float, colour: str, background: RGB) -> tuple[np.ndarray, np.ndarray]:
    """The shape on the background, uint8 [n, n, 3], and where it is at all, bool [n, n, 1]."""
    coverage = shape_coverage(shape, radius)[..., None]
    ground = np.array(background, np.float32)
    return np.rint(ground + coverage * (np.array(COLOURS[colour]) - ground)).astype(np.uint8), coverage > 0


def corner(centre: tuple[float, float], radius: float, size: int) -> tuple[int, int]:
    """(top, left) pixel of the stamp of a shape; centre (x, y) and radius in parts."""
    half = int(np.ceil(radius * size))
    return round(centre[1] * size) - half, round(centre[0] * size) - half


def stamp(
    image: np.ndarray, shape: str, colour: str, background: RGB, centre: tuple[float, float], radius: float
) -> None:
    """Draws a shape into image [S, S, 3]; centre and radius in parts. What leaves at a side comes in at the other."""
    size = len(image)
    patch, there = _stamp(shape, radius * size, colour, background)
    (top, left), n = corner(centre, radius, size), len(patch)
    if 0 <= top <= size - n and 0 <= left <= size - n:
        np.copyto(image[top : top + n, left : left + n], patch, where=there)
    else:
        rows, columns = (top + np.arange(n)[:, None]) % size, (left + np.arange(n)) % size
        image[rows, columns] = np.where(there, patch, image[rows, columns])


def span_coverage(size: int, start: np.ndarray | float, stop: np.ndarray | float) -> np.ndarray:
    """How much of each of `size` pixels lies in [start, stop), pixels; [...] and [...] give float32 [..., size]."""
    start, stop = np.asarray(start, np.float32)[..., None], np.asarray(stop, np.float32)[..., None]
    pixels = np.arange(size, dtype=np.float32)
    return np.clip(np.minimum(stop, pixels + 1) - np.maximum(start, pixels), 0, 1)


def text_width(text: str) -> int:
    """Width of a text in dots of the font, which is 7 dots high: glyphs of 5, a dot apart."""
    return 6 * len(text) - 1


def text_coverage(text: str, size: int, left: float, top: float, dot: float) -> np.ndarray:
    """How much of each pixel a text covers, float32 [S, S]; all in pixels, `dot` the side of a dot of the font."""
    dots = np.concatenate([_GLYPHS[character] for character in text], axis=1)  # [7, 6 * characters]
    columns, rows = np.arange(dots.shape[1]), np.arange(7)
    across = span_coverage(size, left + columns * dot, left + (columns + 1) * dot)
    down = span_coverage(size, top + rows * dot, top + (rows + 1) * dot)
    return down.T @ dots @ across


def paint(image: np.ndarray, coverage: np.ndarray, colour: RGB) -> None:
    """Lays a colour over image, float32 [S, S, 3], as far as coverage [S, S] says."""
    rows = np.flatnonzero(coverage.any(1))
    if len(rows):
        band = slice(rows[0], rows[-1] + 1)  # most that is drawn is a small part of the picture
        image[band] += coverage[band, :, None] * (np.array(colour, np.float32) - image[band])


_ROWS = {  # rows of a glyph from the top; # is ink
    "A": ".###. #...# #...# ##### #...# #...# #...#",
    "B": "####. #...# #...# ####. #...# #...# ####.",
    "C": ".###. #...# #.... #.... #.... #...# .###.",
    "D": "####. #...# #...# #...# #...# #...# ####.",
    "E": "##### #.... #.... ####. #.... #.... #####",
    "F": "##### #.... #.... ####. #.... #.... #....",
    "G": ".###. #...# #.... #.### #...# #...# .####",
    "H": "#...# #...# #...# ##### #...# #...# #...#",
    "I": "##### ..#.. ..#.. ..#.. ..#.. ..#.. #####",
    "J": "..### ...#. ...#. ...#. ...#. #..#. .##..",
    "K": "#...# #..#. #.#.. ##... #.#.. #..#. #...#",
    "L": "#.... #.... #.... #.... #.... #.... #####",
    "M": "#...# ##.## #.#.# #.#.# #...# #...# #...#",
    "N": "#...# ##..# #.#.# #.#.# #..## #...# #...#",
    "O": ".###. #...# #...# #...# #...# #...# .###.",
    "P": "####. #...# #...# ####. #.... #.... #....",
    "Q": ".###. #...# #...# #...# #.#.# #..#. .##.#",
    "R": "####. #...# #...# ####. #.#.. #..#. #...#",
    "S": ".#### #.... #.... .###. ....# ....# ####.",
    "T": "##### ..#.. ..#.. ..#.. ..#.. ..#.. ..#..",
    "U": "#...# #...# #...# #...# #...# #...# .###.",
    "V": "#...# #...# #...# #...# #...# .#.#. ..#..",
    "W": "#...# #...# #...# #.#.# #.#.# ##.## #...#",
    "X": "#...# #...# .#.#. ..#.. .#.#. #...# #...#",
    "Y": "#...# #...# .#.#. ..#.. ..#.. ..#.. ..#..",
    "Z": "##### ....# ...#. ..#.. .#... #.... #####",
    "0": ".###. #...# #..## #.#.# ##..# #...# .###.",
    "1": "..#.. .##.. ..#.. ..#.. ..#.. ..#.. .###.",
    "2": ".###. #...# ....# ..##. .#... #.... #####",
    "3": "##### ...#. ..#.. ...#. ....# #...# .###.",
    "4": "...#. ..##. .#.#. #..#. ##### ...#. ...#.",
    "5": "##### #.... ####. ....# ....# #...# .###.",
    "6": "..##. .#... #.... ####. #...# #...# .###.",
    "7": "##### ....# ...#. ..#.. .#... .#... .#...",
    "8": ".###. #...# #...# .###. #...# #...# .###.",
    "9": ".###. #...# #...# .#### ....# ...#. .##..",
}
_GLYPHS = {  # float32 [7, 6], the last column empty
    character: np.array([[dot == "#" for dot in row + "."] for row in rows.split()], np.float32)
    for character, rows in _ROWS.items()
}

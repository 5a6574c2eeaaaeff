"""Words and numbers to read: two to six letters or digits, in a font of our own, somewhere on the picture.

A composition is the text; its colour, size and place are jitter.

Legend: S side of a picture in pixels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tpu.errors import UserError
from train.data.chat.record import IMAGE, Conversation, Turn
from train.data.made import drawing
from train.data.made.drawing import BACKGROUNDS, COLOURS, INK, LEGIBLE, RGB, pick

TASKS = ("read",)
LETTERS, DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789"
SHORTEST, LONGEST = 2, 6
LARGEST = 3.5  # pixels per dot of the font, in a picture of 64
INKS = (INK, *(COLOURS[name] for name in ("red", "green", "blue", "purple")))  # the others are too light to read


class Word(NamedTuple):
    """A text; left, top and the side of a dot of the font in parts of the picture's side."""

    text: str
    left: float
    top: float
    dot: float
    ink: RGB
    background: RGB


def make(task: str, seed: int, split: str, index: int, size: int = 64) -> Conversation:
    """Record `index` of "read", its image uint8 [S, S, 3]. Raises UserError for another task, split or small sizes."""
    if task not in TASKS:
        raise UserError(f"task={task!r}: words have no such task; valid: {', '.join(TASKS)}")
    found = word(seed, split, index)
    turns = (Turn("user", f"{IMAGE}What does it say?"), Turn("assistant", found.text))
    return Conversation(f"words:{task}:{split}:{seed}:{index}", turns, (draw(found, size),), kind="read")


def word(seed: int, split: str, index: int) -> Word:
    """Word or number `index` of the split, half of them each; all lengths are as likely."""
    rng = drawing.generator(seed, "words:read", split, index)
    return drawing.fitting(split, lambda: _drawn(rng), lambda word: f"word {word.text}")


def draw(word: Word, size: int) -> np.ndarray:
    """The picture, uint8 [S, S, 3]. Raises UserError for a size in which it could not be read."""
    image = drawing.canvas(size, word.background, LEGIBLE).astype(np.float32)
    coverage = drawing.text_coverage(word.text, size, word.left * size, word.top * size, word.dot * size)
    drawing.paint(image, coverage, word.ink)
    return np.rint(image).astype(np.uint8)


def _drawn(rng: np.random.Generator) -> Word:
    characters = pick(rng, (LETTERS, DIGITS))
    text = "".join(pick(rng, characters) for _ in range(int(rng.integers(SHORTEST, LONGEST + 1))))
    margin, width = 2 / 64, drawing.text_width(text)
    dot = min((1 - 2 * margin) / width, LARGEST / 64) * rng.uniform(0.8, 1.0)
    left, top = (rng.uniform(margin, 1 - margin - dots * dot) for dots in (width, 7))
    return Word(text, left, top, dot, pick(rng, INKS), pick(rng, BACKGROUNDS))

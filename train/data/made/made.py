"""The image–text data made here, by name: scenes, charts, clips and words, without a file or a download."""

from __future__ import annotations

import hashlib
from pathlib import Path

from tpu.errors import UserError
from train.data.chat.record import Conversation
from train.data.made import charts, clips, scenes, words
from train.data.made.drawing import COLOURS, SHAPES

MAKERS = {"scenes": scenes, "charts": charts, "clips": clips, "words": words}
NAMES = tuple(f"{room}:{task}" for room, maker in MAKERS.items() for task in maker.TASKS)

# Answers, as `answer` has them, of the questions that have few.
OF_SCENE = (*COLOURS, *SHAPES, *map(str, range(scenes.MOST + 1)), "yes", "no")
ANSWERS = {"scenes:question": OF_SCENE, "scenes:dialogue": OF_SCENE}


def make(name: str, seed: int, split: str, index: int, size: int = 64) -> Conversation:
    """Record `index` of "scenes:question" or another of NAMES: a pure function of its arguments.

    Images are uint8 [size, size, 3]. No composition is in both splits, "train" and "test". Raises UserError for another
    name or split, negative numbers, and sizes that are too small.
    """
    if name not in NAMES:
        raise UserError(f"source={name!r}: nothing of that name is made here; valid: {', '.join(NAMES)}")
    room, _, task = name.partition(":")
    return MAKERS[room].make(task, seed, split, index, size)


def digest() -> str:
    """A hash of the code that makes records, which are a function of it and their numbers alone."""
    content = hashlib.blake2b(digest_size=16)
    for module in (*MAKERS, "drawing"):
        content.update(Path(__file__).with_name(f"{module}.py").read_bytes())
    return content.hexdigest()


def answer(text: str) -> str:
    """What counts in a reply: what follows the last "Answer:", or else all of it, lower case, without the full stop."""
    return text.rpartition("Answer:")[2].strip().removesuffix(".").rstrip().lower()

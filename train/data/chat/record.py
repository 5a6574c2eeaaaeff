"""The record of image–text data: images and a conversation about them, whatever source it comes from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

IMAGE = "<image>"  # stands in a turn's text where an image stands, one for each image, in their order


class Turn(NamedTuple):
    """What one side says; what "assistant" says is learned, what "user" says is given."""

    role: str
    text: str


class Conversation(NamedTuple):
    """Images and turns. Text alone is a conversation without images, a caption one without a question."""

    key: str  # names the record in messages
    turns: tuple[Turn, ...]
    images: tuple[Any, ...] = ()  # numpy uint8 [H, W, 3], or encoded bytes as `train.data.images.decode` takes them
    times: tuple[float, ...] = ()  # seconds at which the images were taken, where they are frames of a video
    kind: str = ""  # of question, by which scores are reported apart


@dataclasses.dataclass(frozen=True)
class Side:
    """The training or the held-out records of one source: `length` of them, and the conversation of each."""

    length: int
    read: Callable[[int], Conversation]
    text: Callable[[int], Conversation]  # the same with anything in place of images, which costs less

"""Records as conversations: LLaVA's format (arXiv:2304.08485, section 3), its "messages" spelling, and captions.

{"image": "a/b.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", ...}]}
{"images": ["a.jpg", "b.jpg"], "messages": [{"role": "user", "content": "<image> or <image>?"}, ...]}

"times" and "kind" may stand beside them (`train.data.chat.record`). Texts are taken as they are written: where
"<image>" stands in a turn, and whether a line ends there, is the data set's to say.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from tpu.errors import UserError
from train.config import DataConfig
from train.data.chat.record import IMAGE, Conversation, Turn
from train.data.text.sources import decode

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
TURNS = ("conversations", "messages")  # the fields that may hold the turns


def conversation(record: dict[str, Any], images: tuple[Any, ...], place: str, data: DataConfig) -> Conversation:
    """The conversation of a record in LLaVA's format, named `place`, about its images, or what stands for each of them.

    Raises UserError, beginning with `place`, for turns that cannot be understood or that say nothing, for as many
    placeholders as there are not images, and for "times" or a "kind" of another form.
    """
    field = next((field for field in TURNS if field in record), None)
    if field is None:
        raise UserError(f"{place}: no field 'conversations' or 'messages'; has {', '.join(record) or 'none'}")
    if not isinstance(record[field], list):
        raise UserError(f"{place}: {field!r} holds {type(record[field]).__name__}, not a list of turns")
    turns = tuple(_turn(turn, f"{place}, turn {number}", data) for number, turn in enumerate(record[field], 1))
    times, kind = record.get("times") or [], record.get("kind") or ""
    if not isinstance(times, list) or not all(type(t) in (int, float) and 0 <= t < 1e9 for t in times):
        raise UserError(f"{place}: 'times' holds {times!r:.60}, not a list of seconds")
    if times and len(times) != len(images):
        raise UserError(f"{place}: {len(times)} 'times' for {len(images)} images; give one for each, or none")
    if not isinstance(kind, str):
        raise UserError(f"{place}: 'kind' holds {type(kind).__name__}, not text")
    return _checked(Conversation(place, turns, images, tuple(map(float, times)), kind))


def caption(text: str, images: tuple[bytes, ...], place: str) -> Conversation:
    """Images, encoded, that the user shows, and what the assistant says of them: the caption, without space around it.

    Raises UserError, beginning with `place`, where either is missing.
    """
    if not images:
        raise UserError(f"{place}: a caption without an image")
    return _checked(Conversation(place, (Turn("user", IMAGE * len(images)), Turn("assistant", text.strip())), images))


def image_paths(record: dict[str, Any], place: str) -> tuple[str, ...]:
    """The paths in the fields "image" or "images" of a record; () where it has none.

    Raises UserError, beginning with `place`, for what is no path, or one that could lead out of the record's folder.
    """
    given = [record[field] for field in ("image", "images") if record.get(field) not in (None, "", [])]
    if len(given) == 2:
        raise UserError(f"{place}: has both 'image' and 'images'; give one of them")
    paths = [path for value in given for path in (value if isinstance(value, list) else [value])]
    for path in paths:
        if not isinstance(path, str) or not path or "\0" in path:
            raise UserError(f"{place}: image {path!r:.60} is no path; give one relative to the file's folder")
        parts = re.split(r"[/\\]", path)
        if not parts[0] or ".." in parts or re.match("[A-Za-z]:", path):
            raise UserError(f"{place}: image {path!r} leads out of the file's folder; give a path below it")
    return tuple(paths)


def _turn(turn: Any, place: str, data: DataConfig) -> Turn:
    if not isinstance(turn, dict):
        raise UserError(f"{place}: a JSON {type(turn).__name__}; each turn must be an object")
    role, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if not isinstance(role, str) or role not in ROLES:
        raise UserError(f"{place}: unknown role {role!r:.60}; valid: {', '.join(ROLES)}")
    if not isinstance(text, str):
        raise UserError(f"{place}: 'value' (or 'content') holds {type(text).__name__}, not text")
    # JSON can hold half a surrogate pair, which is invalid UTF-8.
    return Turn(ROLES[role], decode(text.encode(errors="surrogatepass"), data, Counter(), lambda at: place))


def _checked(conversation: Conversation) -> Conversation:
    if not any(turn.role == "assistant" and turn.text.strip() for turn in conversation.turns):
        raise UserError(f"{conversation.key}: an empty conversation, in which the assistant says nothing")
    placeholders, images = sum(turn.text.count(IMAGE) for turn in conversation.turns), len(conversation.images)
    if placeholders != images:
        raise UserError(
            f"{conversation.key}: {placeholders} {IMAGE} in the text and {images} images; there must be one for each"
        )
    return conversation

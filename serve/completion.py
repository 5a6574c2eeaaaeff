"""A request for text, and what is written for it."""

from __future__ import annotations

import dataclasses
import itertools
import math
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tpu.errors import UserError
from train.data.chat.record import IMAGE, Conversation, Turn

if TYPE_CHECKING:
    from train.data.text.tokenizer import Tokenizer


REPLACEMENT = "\ufffd"  # what a decoder puts for bytes that are no character, or not yet one


@dataclasses.dataclass(frozen=True)
class Request:
    """What one row asks for; the fields mean what the flags of the same name do."""

    prompt: str = ""
    images: tuple[str, ...] = ()  # files; they stand where the prompt says <image>, or before it
    number: int = 0  # of the sample: requests that differ only in it give different texts
    seed: int = 0
    max_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises UserError for the first field out of range."""
        for name, valid, words in (
            ("number", 0 <= self.number < 2**32, "between 0 and 2^32 - 1"),
            ("seed", 0 <= self.seed < 2**32, "between 0 and 2^32 - 1"),
            ("max_tokens", 1 <= self.max_tokens < 2**31, "at least 1, and below 2^31"),
            ("temperature", 0 <= self.temperature < math.inf, "at least 0, and finite"),
            ("top_k", 0 <= self.top_k < 2**31, "at least 0 (0: no limit), and below 2^31"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (1: no limit)"),
            ("min_p", 0 <= self.min_p < 1, "at least 0 (0: no limit) and below 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0 (1: none), and finite"),
        ):
            if not valid:
                raise UserError(f"{name}={getattr(self, name)}: must be {words}")
        if "" in self.stop:
            raise UserError("stop='': a stop string must have at least one character")
        try:
            self.prompt.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"prompt={self.prompt!a}: is not valid UTF-8 ({error.reason})") from error


class Completion:
    """The text of one row, growing token by token until a stop string, the end of the document or the length limit.

    `text` is whole characters only, and is cut before the first stop string; `tokens` and `logprobs` are of the tokens
    that have a part in it, without the end-of-document token. `finish_reason` is None, then "stop", "end" or "length".
    """

    def __init__(self, request: Request, prompt_tokens: Sequence[int], tokenizer: Tokenizer):
        self.request = request
        self.text = ""
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.finish_reason: str | None = None
        self._tokenizer = tokenizer
        self._starts: list[int] = []  # length of the text before each token
        # Some tokenizers write a token otherwise at the start of a text, so new tokens are decoded after old ones:
        # `_window` begins with the prompt's last tokens that are text, later with what the last whole characters came
        # from.
        self._window = _last_text(prompt_tokens, tokenizer)
        self._known = len(self._window)  # tokens of the window whose text is in `text[:_base]`
        self._base = 0

    def append(self, token: int, logprob: float) -> None:
        """Takes in the next token. Not to be called after the end."""
        if token in self._tokenizer.ends:
            self._finish("end")
            return
        self._starts.append(len(self.text))
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self._window.append(token)
        new = self._undecided()
        # What comes may make characters of any number of bytes before it: some decoders give up a whole run of them.
        held = len(new) - len(new.rstrip(REPLACEMENT))
        self.text = self.text[: self._base] + new[: len(new) - held]
        if new and not held:
            self._base = len(self.text)
            self._window, self._known = self._window[self._known :], len(self._window) - self._known
        self._cut_at_stop(self._starts[-1])
        if self.finish_reason is None and len(self.tokens) == self.request.max_tokens:
            self._finish("length")

    def certain(self) -> str:
        """The part of `text` that no later token can take back as the beginning of a stop string."""
        if self.finish_reason is not None:
            return self.text
        beginnings = (stop[:n] for stop in self.request.stop for n in range(1, len(stop)))
        held = max((len(beginning) for beginning in beginnings if self.text.endswith(beginning)), default=0)
        return self.text[: len(self.text) - held]

    def token_texts(self) -> list[str]:
        """What each token added to the text; a character of several tokens belongs to the last of them."""
        return [self.text[start:end] for start, end in itertools.pairwise([*self._starts, len(self.text)])]

    def _undecided(self) -> str:
        """The text from `_base` on, with incomplete characters as REPLACEMENT."""
        return self._tokenizer.decode(self._window)[len(self._tokenizer.decode(self._window[: self._known])) :]

    def _finish(self, reason: str) -> None:
        before = len(self.text)
        self.text = self.text[: self._base] + self._undecided()
        self._cut_at_stop(before)
        self.finish_reason = self.finish_reason or reason

    def _cut_at_stop(self, before: int) -> None:
        """Ends the text at the first stop string that is not wholly within its first `before` characters."""
        stops = self.request.stop
        found = [place for stop in stops if (place := self.text.find(stop, max(0, before - len(stop) + 1))) >= 0]
        if found:
            self.text = self.text[: min(found)]
            kept = sum(start < len(self.text) for start in self._starts)
            for values in (self.tokens, self.logprobs, self._starts):
                del values[kept:]
            self.finish_reason = "stop"


def _last_text(tokens: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """The last tokens that decode to any text at all: all of them where none does."""
    for count in range(1, len(tokens)):
        if tokenizer.decode(tokens[-count:]):
            return list(tokens[-count:])
    return list(tokens)


def prompt_tokens(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """What the model reads: a document begins with the end-of-document token (see train.data.text.packing).

    An imported model that was trained with another token there gets that.
    """
    return [tokenizer.beginning, *tokenizer.encode(prompt)]


def conversation(request: Request) -> Conversation:
    """The prompt as what a user says, with its images where it says <image>, or before it. Raises UserError."""
    prompt, placed = request.prompt, request.prompt.count(IMAGE)
    if request.images and not placed:
        prompt = IMAGE * len(request.images) + prompt
    elif placed != len(request.images):
        raise UserError(f"prompt: {placed} {IMAGE} in it, and {len(request.images)} --image; must be as many")
    for path in request.images:
        if not pathlib.Path(path).is_file():
            raise UserError(f"image={path}: no such file")
    return Conversation("prompt", (Turn("user", prompt), Turn("assistant", "")), request.images)

"""Continues a text with a trained model, from nothing but a checkpoint.

    python -m serve.generate --checkpoint=runs/quickstart --prompt="The list is" [--temperature=0.8 --top_p=0.95]

The checkpoint is a run's workdir (its newest good step is taken) or one step directory. One continuation is printed
while it is generated; several (--samples, or --prompt more than once) are generated at once and printed at the end.
What a sample reads depends on the model, its prompt, --seed, its number and the sampling flags, and on nothing else.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from absl import flags

from tpu.errors import UserError
from train import entry
from train.data.conversation import IMAGE, Conversation, Turn

if TYPE_CHECKING:
    from model.config import ModelConfig
    from model.decode import Decoder
    from model.transformer import Weights
    from train.config import DataConfig
    from train.data.tokenizer import Tokenizer

if __name__ == "__main__":
    flags.DEFINE_string("checkpoint", None, "workdir of a run, or one of its step directories")
    flags.DEFINE_string("base", None, "of an adapter's checkpoint: where its base lies now; default: where it was")
    flags.DEFINE_multi_string("prompt", [], "text to continue; may be given several times; none: from the start")
    flags.DEFINE_string("prompt_file", None, "file with one more prompt, taken as it stands; -: standard input")
    flags.DEFINE_multi_string(
        "image", [], "file that the prompt is about; may be given several times, in the order of <image> in the prompt"
    )
    flags.DEFINE_integer("max_tokens", 128, "most tokens to generate")
    flags.DEFINE_integer("samples", 1, "continuations of each prompt")
    flags.DEFINE_float("temperature", 1.0, "divides the logits; 0: always the most probable token")
    flags.DEFINE_integer("top_k", 0, "draw from the k most probable tokens; 0: all")
    flags.DEFINE_float("top_p", 1.0, "draw from the fewest most probable tokens that have this much probability")
    flags.DEFINE_float("min_p", 0.0, "draw from tokens with at least this fraction of the highest probability")
    flags.DEFINE_float("repetition_penalty", 1.0, "above 1: tokens of the prompt and the output become less likely")
    flags.DEFINE_multi_string("stop", [], "text before which to stop; may be given several times")
    flags.DEFINE_integer("seed", 0, "of the draws")
    flags.DEFINE_boolean("logprobs", False, "print every token with its log-probability (nats) under the model")
    flags.DEFINE_boolean("ema", False, "use the moving average of the weights")
    flags.DEFINE_enum(
        "compute_dtype",
        "auto",
        ["auto", "float32", "bfloat16"],
        "number format of the products; auto: float32 on CPU, elsewhere what the model was trained with",
    )
    flags.DEFINE_string("json", None, "also write prompts, texts, tokens and log-probabilities to this file")

log = logging.getLogger(__name__)

REPLACEMENT = "\ufffd"  # what a decoder puts for bytes that are no character, or not yet one
CHUNK = 16  # tokens between looks at the text


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
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
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
        # Some tokenizers write a token otherwise at the start of a text, so new tokens are decoded after an old one:
        # `_window` begins with the prompt's last token, later with what the last whole characters came from.
        self._window = list(prompt_tokens[-1:])
        self._known = 1  # tokens of the window whose text is in `text[:_base]`
        self._base = 0

    def append(self, token: int, logprob: float) -> None:
        """Takes in the next token. Not to be called after the end."""
        if token == self._tokenizer.end_of_document:
            self._finish("end")
            return
        self._starts.append(len(self.text))
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self._window.append(token)
        new = self._undecided()
        # A character has four bytes at most: up to three may be waiting for the next token.
        held = min(3, len(new) - len(new.rstrip(REPLACEMENT)))
        self.text = self.text[: self._base] + new[: len(new) - held]
        if not held:
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


def prompt_tokens(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """What the model reads: a document begins with the end-of-document token (see train.data.packing).

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


def check_length(config: ModelConfig, prompt_length: int, max_tokens: int) -> None:
    """Raises UserError where a prompt of so many tokens and its continuation do not fit the learned positions."""
    if config.positions == "learned" and prompt_length + max_tokens > config.max_positions:
        room = config.max_positions - prompt_length
        raise UserError(
            f"max_tokens={max_tokens} after a prompt of {prompt_length} tokens (one for the start of the document): "
            f"the model has learned {config.max_positions} positions (model.max_positions); "
            + (f"valid: max_tokens up to {room}, or a shorter prompt" if room > 0 else "shorten the prompt")
        )


def complete(
    decoder: Decoder,
    weights: Weights,
    config: ModelConfig,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    show: Callable[[list[Completion]], None] = lambda completions: None,
    chunk: int = CHUNK,
    data: DataConfig | None = None,
) -> list[Completion]:
    """Generates for all requests at once; each result is that of the request alone.

    Args:
      decoder, weights: of `model.decode.make_decoder` and `decoding_weights`, for this config and tokenizer.
      show: called with all completions after every `chunk` tokens, and at the end.
      data: of a model that was trained on conversations, how its rows were made; None: prompts are plain text.

    Raises UserError for a request out of range or too long for the model.
    """
    import numpy as np

    from model.decode import NO_TOKEN, Sight, pad_prompts, row_keys, slots_for
    from model.sampling import Sampling
    from train import answers

    for request in requests:
        request.check()
    if data is None:
        prompts = [prompt_tokens(tokenizer, request.prompt) for request in requests]
    else:
        data = dataclasses.replace(data, images=max(data.images, *(len(request.images) for request in requests)))
        runs, sight = answers.prompts([conversation(request) for request in requests], tokenizer, data, config)
        prompts = [run.ids for run in runs]
    for request, prompt in zip(requests, prompts, strict=True):
        check_length(config, len(prompt), request.max_tokens)

    def column(field: str, dtype: type) -> np.ndarray:
        return np.array([getattr(request, field) for request in requests], dtype)

    tokens, lengths = pad_prompts(prompts, config.max_positions if config.positions == "learned" else None)
    max_tokens = column("max_tokens", np.int32)
    sampling = Sampling(**{f: column(f, np.int32 if f == "top_k" else np.float32) for f in Sampling._fields})
    keys = row_keys(column("seed", np.uint32), column("number", np.uint32))
    slots = slots_for(tokens.shape[1], int((lengths + max_tokens).max()))
    completions = [Completion(*of_row, tokenizer) for of_row in zip(requests, prompts, strict=True)]
    seen = Sight() if data is None else sight(tokens.shape[1])
    rows, drawn, logprobs = decoder.start(weights, tokens, lengths, sampling, keys, max_tokens, slots, seen)
    while True:
        for completion, *of_row in zip(completions, np.asarray(drawn), np.asarray(logprobs), strict=True):
            for token, logprob in zip(*of_row, strict=True):
                if completion.finish_reason is None and token != NO_TOKEN:
                    completion.append(int(token), float(logprob))
        show(completions)
        finished = np.array([completion.finish_reason is not None for completion in completions])
        if finished.all():
            return completions
        rows, drawn, logprobs = decoder.decode(weights, rows._replace(finished=finished), sampling, chunk)


def main() -> int:
    """Generates what the flags ask for, prints it, and writes --json."""
    options = entry.FLAGS
    entry.need(checkpoint=options.checkpoint)
    if options.samples < 1:
        raise UserError(f"samples={options.samples}: must be at least 1")
    entry.need_directory(json=options.json)
    shared = {f.name: getattr(options, f.name) for f in dataclasses.fields(Request) if f.name in options}
    shared["images"] = tuple(options.image)
    prompts = [*options.prompt, *([_read(options.prompt_file)] if options.prompt_file else [])] or [""]
    requests = [
        Request(**(shared | {"prompt": prompt, "stop": tuple(options.stop), "number": number}))
        for prompt in prompts
        for number in range(options.samples)
    ]
    for request in requests:
        request.check()
    # Only now: loading jax and a checkpoint takes seconds.
    from model.decode import decoding_weights, make_decoder
    from model.kinds import build
    from train.restore import open_checkpoint

    trained = open_checkpoint(pathlib.Path(options.checkpoint), "ema" if options.ema else "weights", options.base)
    config, tokenizer, step_dir = trained.experiment.model, trained.tokenizer, trained.step_dir
    if options.compute_dtype != "auto" or config.platform == "cpu":
        # One row at a time, products wait for memory: bfloat16 gains nothing on CPU.
        dtype = "float32" if options.compute_dtype == "auto" else options.compute_dtype
        config = dataclasses.replace(config, compute_dtype=dtype)
    talks = trained.experiment.objective.name == "conversation"
    if options.image and (config.fusion == "none" or not talks):
        raise UserError(f"image={options.image[0]}: the model of {step_dir} answers no questions about images")
    data, context = trained.experiment.data, trained.experiment.data.context
    longest = max(len(prompt_tokens(tokenizer, prompt)) for prompt in prompts) + options.max_tokens
    if longest > context and config.positions != "learned":
        log.warning("up to %d tokens with the prompt, but the model was trained on rows of %d", longest, context)
    decoder = make_decoder(config, build(config)[0], tokenizer.vocab_size, tokenizer.end_of_document)
    weights = decoding_weights(config, trained.weights)
    del trained  # The weights as they were saved would be in memory a second time.
    start = time.monotonic()
    streaming = len(requests) == 1
    show = _streamer() if streaming else lambda completions: None
    completions = complete(decoder, weights, config, tokenizer, requests, show, data=data if talks else None)
    seconds = time.monotonic() - start
    _print(completions, streaming, options.logprobs)
    count = sum(len(completion.tokens) for completion in completions)
    print(f"({count} tokens in {seconds:.1f} s with compilation, from {step_dir})", file=sys.stderr)
    if options.json:
        report = {"checkpoint": str(step_dir), "completions": [_report(completion) for completion in completions]}
        pathlib.Path(options.json).write_text(json.dumps(report, indent=1))
    return 0


def _read(path: str) -> str:
    try:
        return (sys.stdin.buffer.read() if path == "-" else pathlib.Path(path).read_bytes()).decode()
    except OSError as error:
        raise UserError(f"prompt_file={path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"prompt_file={path}: is not valid UTF-8 ({error.reason} at byte {error.start})") from error


def _streamer() -> Callable[[list[Completion]], None]:
    """Prints the prompt of the only completion, and on every call what has become certain of its text since."""
    printed = ""

    def show(completions: list[Completion]) -> None:
        nonlocal printed
        whole = completions[0].request.prompt + completions[0].certain()
        print(whole[len(printed) :], end="", flush=True)
        printed = whole

    return show


def _print(completions: Sequence[Completion], streamed: bool, logprobs: bool) -> None:
    """Ends the streamed text, or prints all texts under headings; then the tokens, where asked for."""
    for number, completion in enumerate(completions, start=1):
        if streamed:
            print()
        else:
            print(f"--- {number} of {len(completions)} ({completion.finish_reason}, {len(completion.tokens)} tokens)")
            print(completion.request.prompt + completion.text)
        if logprobs:
            for text, logprob in zip(completion.token_texts(), completion.logprobs, strict=True):
                print(f"{logprob:10.4f}  {text!r}")


def _report(completion: Completion) -> dict[str, object]:
    return {
        "prompt": completion.request.prompt,
        "sample": completion.request.number,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "tokens": completion.tokens,
        "token_texts": completion.token_texts(),
        "logprobs": completion.logprobs,
    }


if __name__ == "__main__":
    entry.run(main)

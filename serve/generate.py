"""Continues a text with a trained model, from nothing but a checkpoint.

    python -m serve.generate --checkpoint=runs/quickstart --prompt="The list is" [--temperature=0.8 --top_p=0.95]

The checkpoint is a run's workdir (its newest good step is taken) or one step directory. One continuation is printed
while it is generated; several (--samples, or --prompt more than once) are generated at once and printed at the end.
What a sample reads depends on the model, its prompt, --seed, its number and the sampling flags, and on nothing else.
"""

from __future__ import annotations

import dataclasses
import logging
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from absl import flags

from serve.completion import Completion, Request, prompt_tokens
from serve.engine import complete
from tpu.errors import UserError
from train import entry

if TYPE_CHECKING:
    pass

if __name__ == "__main__":
    flags.DEFINE(entry.PATH, "checkpoint", None, "workdir of a run, or one of its step directories")
    flags.DEFINE(entry.PATH, "base", None, "of an adapter's checkpoint: where its base lies now; default: where it was")
    flags.DEFINE_multi_string("prompt", [], "text to continue; may be given several times; none: from the start")
    flags.DEFINE(entry.PATH, "prompt_file", None, "file with one more prompt, taken as it stands; -: standard input")
    flags.DEFINE_multi(
        entry.PATH,
        flags.ArgumentSerializer(),
        "image",
        [],
        "file that the prompt is about; may be given several times, in the order of <image> in the prompt",
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
    flags.DEFINE(entry.PATH, "json", None, "also write prompts, texts, tokens and log-probabilities to this file")

log = logging.getLogger(__name__)


def main() -> int:
    """Generates what the flags ask for, prints it, and writes --json."""
    options = entry.FLAGS
    entry.need(checkpoint=options.checkpoint)
    if options.samples < 1:
        raise UserError(f"samples={options.samples}: must be at least 1")
    entry.need_writable(json=options.json)
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
    from model.generate.decode import decoding_weights, make_decoder
    from model.kinds import build
    from train.objectives.table import objective_of
    from train.restore import open_checkpoint

    trained = open_checkpoint(pathlib.Path(options.checkpoint), "ema" if options.ema else "weights", options.base)
    config, tokenizer, step_dir = trained.experiment.model, trained.tokenizer, trained.step_dir
    if options.compute_dtype != "auto" or config.platform == "cpu":
        # One row at a time, products wait for memory: bfloat16 gains nothing on CPU.
        dtype = "float32" if options.compute_dtype == "auto" else options.compute_dtype
        config = dataclasses.replace(config, compute_dtype=dtype)
    talks = objective_of(trained.experiment).talks
    if options.image and (config.fusion == "none" or not talks):
        raise UserError(f"image={options.image[0]}: the model of {step_dir} answers no questions about images")
    data, context = trained.experiment.data, trained.experiment.data.context
    longest = max(len(prompt_tokens(tokenizer, prompt)) for prompt in prompts) + options.max_tokens
    if longest > context and config.positions != "learned":
        log.warning("up to %d tokens with the prompt, but the model was trained on rows of %d", longest, context)
    decoder = make_decoder(config, build(config)[0], tokenizer.vocab_size, tokenizer.end_of_document, tokenizer.ends)
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
    entry.write_json({"checkpoint": str(step_dir), "completions": [_report(completion) for completion in completions]})
    return 0


def _read(path: str) -> str:
    try:
        return (sys.stdin.buffer.read() if path == "-" else pathlib.Path(path).read_bytes()).decode("utf-8-sig")
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

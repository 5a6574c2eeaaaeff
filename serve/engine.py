"""Completes many requests together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from serve.completion import Completion, Request, conversation, prompt_tokens
from tpu import host
from tpu.errors import UserError

if TYPE_CHECKING:
    from model.config import ModelConfig
    from model.generate.decode import Decoder
    from model.weights import Weights
    from train.config import DataConfig
    from train.data.text.tokenizer import Tokenizer


CHUNK = 16  # tokens between looks at the text


def check_length(config: ModelConfig, prompt_length: int, max_tokens: int) -> None:
    """Raises UserError where a prompt of so many tokens and its continuation do not fit the learned positions."""
    if config.positions == "learned" and prompt_length + max_tokens > config.max_positions:
        room = config.max_positions - prompt_length
        raise UserError(
            f"max_tokens={max_tokens} after a prompt of {prompt_length} tokens (one for the start of the document): "
            f"the model has learned {config.max_positions} positions (model.max_positions); "
            + (f"valid: max_tokens up to {room}, or a shorter prompt" if room > 0 else "shorten the prompt")
        )


def check_memory(config: ModelConfig, rows: int, slots: int) -> None:
    """Raises UserError where the cache of so many rows and slots is larger than the memory that is free."""
    import jax

    from model.attention.cache import empty_cache
    from model.encoder_decoder import decoder_config

    own = decoder_config(config) if config.kind == "encoder_decoder" else config
    unit = jax.eval_shape(lambda: empty_cache(own, rows, 64))
    needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(unit)) * slots // 64
    free = host.free_bytes()
    if free and needed > free:
        raise UserError(
            f"max_tokens: {slots:,} tokens of {rows} text(s) at a time take a cache of {needed / 2**30:,.1f} GiB, and "
            f"{free / 2**30:,.1f} GiB are free; give fewer --max_tokens, or fewer texts"
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
      decoder, weights: of `model.generate.decode.make_decoder` and `decoding_weights`, for this config and tokenizer.
      show: called with all completions after every `chunk` tokens, and at the end.
      data: of a model that was trained on conversations, how its rows were made; None: prompts are plain text.

    Raises UserError for a request out of range, too long for the model, or longer than memory has room for.
    """
    import numpy as np

    from model.generate.decode import NO_TOKEN, pad_prompts, row_keys, slots_for
    from model.generate.prefill import Sight
    from model.generate.sampling import Sampling
    from model.generate.slots import end
    from train.evaluate import answers

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
    slots = slots_for(tokens.shape[1], int((lengths.astype(np.int64) + max_tokens).max()))
    check_memory(config, len(requests), slots)
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
        rows, drawn, logprobs = decoder.decode(weights, end(rows, finished), sampling, chunk)

"""Generation by a compiled program: the prompts in one pass, then token by token with a key-value cache.

`make_decoder` gives two jitted functions. `start` reads the prompts and draws each row's first token; `decode` draws a
chunk of further tokens in one loop on the device, and stops early when every row has ended. Between chunks the host may
look at the text, and end a row by setting `finished`. Chunks of any size give the same tokens, and a row's tokens do
not depend on the rows beside it: its random keys are made of its own key and the position of the token drawn.

Legend: B rows, T tokens of the padded prompts, S slots of the cache, C tokens per chunk, V tokens that may be drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from model.attention.cache import Cache
from model.attention.cross_attention import Source
from model.config import ModelConfig
from model.encoder_decoder import EncoderDecoder
from model.generate.prefill import NOTHING_SEEN, Sight, advance, prefill, prefill_decoder
from model.generate.sampling import Sampling, draw
from model.stack import unstack
from model.transformer import Transformer
from model.weights import Weights, bind, rounded
from tpu.errors import UserError

NO_TOKEN = -1


class Rows(NamedTuple):
    """Rows in the midst of generation: everything that drawing a token changes or needs to know of them."""

    cache: Cache
    tokens: jax.Array  # [B] int32, the newest token, not yet in the cache
    positions: jax.Array  # [B] int32, where it stands
    limits: jax.Array  # [B] int32, the first position that may not be drawn
    finished: jax.Array  # [B] bool
    seen: jax.Array  # [B, V] bool, tokens of prompt and output, for the repetition penalty
    keys: jax.Array  # [B] random keys
    source: Source | None = None  # the place of what an encoder saw or read; its keys and values are in the cache
    shift: jax.Array | None = None  # [B] int32, how far turning is ahead of the order of tokens (M-RoPE)


Drawn = tuple[Rows, jax.Array, jax.Array]  # rows, tokens [B, C] int32, log-probabilities [B, C] float32


class Decoder(NamedTuple):
    """The compiled functions of one model.

    start(weights, tokens, lengths, sampling, keys, max_tokens, slots, sight) -> Drawn, with C = 1:
      tokens [B, T] and lengths [B] from `pad_prompts`, keys [B] from `row_keys`, max_tokens [B] int32 at least 1;
      slots, a Python integer, at least T and the longest length + max_tokens (see `slots_for`); sight, what is seen;
      nothing if left out.
    decode(weights, rows, sampling, chunk) -> Drawn, with C = chunk, a Python integer: `rows` are donated.

    Weights are those of `decoding_weights`. Tokens are NO_TOKEN where a row had ended before. Log-probabilities are
    those of the model's own distribution, without penalty, temperature and filters.
    """

    start: Callable[..., Drawn]
    decode: Callable[..., Drawn]
    reads_prompts: bool  # whether prompts take slots of the cache; an encoder-decoder's do not


def draw_next(rows: Rows, logits: jax.Array, sampling: Sampling, ends: jax.Array) -> Drawn:
    """Draws the token that follows the newest of each row from its logits [B, V]: C = 1, without that dimension.

    A row ends with any of the tokens `ends` [N] int32.
    """
    positions = jnp.where(rows.finished, rows.positions, rows.positions + 1)
    keys = jax.vmap(jax.random.fold_in)(rows.keys, positions)
    tokens = draw(logits[:, : rows.seen.shape[1]], rows.seen, sampling, keys)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    logprobs = chosen - jax.nn.logsumexp(logits, axis=-1)
    drawn = jnp.where(rows.finished, NO_TOKEN, tokens)
    # An ended row goes on reading its last token at its last position.
    tokens = jnp.where(rows.finished, rows.tokens, tokens)
    rows = rows._replace(
        tokens=tokens,
        positions=positions,
        finished=rows.finished | jnp.isin(tokens, ends) | (positions + 1 >= rows.limits),
        seen=rows.seen.at[jnp.arange(len(tokens)), tokens].set(True),
    )
    return rows, drawn, logprobs


def begin(
    model: Transformer | EncoderDecoder,
    config: ModelConfig,
    tokens: jax.Array,
    lengths: jax.Array,
    keys: jax.Array,
    max_tokens: jax.Array,
    slots: int,
    vocab_size: int,
    end_of_document: int,
    sight: Sight = NOTHING_SEEN,
) -> tuple[Rows, jax.Array]:
    """Rows whose prompts have been read, and the logits [B, V] of their first tokens; arguments as `Decoder.start`."""
    b, t = tokens.shape
    if config.kind == "decoder":
        cache, logits, source = prefill(model, config, tokens, lengths, slots, sight)
    else:
        start_token = end_of_document if config.start_token < 0 else config.start_token
        cache, logits, source = prefill_decoder(model, config, tokens, lengths, slots, start_token)
        lengths = jnp.ones_like(lengths)  # The output alone counts from here on.
    in_prompt = (jnp.arange(t)[None] < lengths[:, None]) & (config.kind == "decoder")  # [B, T]
    seen = jnp.zeros((b, vocab_size), bool).at[jnp.arange(b)[:, None], tokens].max(in_prompt)
    rows = Rows(
        cache=cache,
        tokens=jnp.full((b,), end_of_document, jnp.int32),
        positions=lengths - 1,
        limits=lengths + max_tokens,
        finished=jnp.zeros((b,), bool),
        # The token that opens the prompt's document is no part of its text: repeating it would not be penalised.
        seen=seen.at[:, end_of_document].set(False),
        keys=keys,
        source=source,
        shift=sight.shift,
    )
    return rows, logits


def draw_chunk(
    model: Transformer | EncoderDecoder, rows: Rows, sampling: Sampling, chunk: int, ends: jax.Array
) -> Drawn:
    """Draws up to `chunk` tokens of each row, until all have ended."""

    def unfinished(carry: tuple) -> jax.Array:
        index, (rows, _, _) = carry
        return (index < chunk) & ~rows.finished.all()

    def one_token(carry: tuple) -> tuple:
        index, (rows, tokens, logprobs) = carry
        cache, logits = advance(model, rows.cache, rows.tokens, rows.positions, rows.source, rows.shift)
        rows, drawn, logprob = draw_next(rows._replace(cache=cache), logits, sampling, ends)
        return index + 1, (rows, tokens.at[:, index].set(drawn), logprobs.at[:, index].set(logprob))

    b = len(rows.tokens)
    nothing = jnp.full((b, chunk), NO_TOKEN, jnp.int32), jnp.zeros((b, chunk), jnp.float32)
    return jax.lax.while_loop(unfinished, one_token, (jnp.int32(0), (rows, *nothing)))[1]


def make_decoder(
    config: ModelConfig, graphdef: nnx.GraphDef, vocab_size: int, end_of_document: int, ends: Collection[int] = ()
) -> Decoder:
    """The decoder of a `placed` model whose tokenizer has `vocab_size` tokens; more that it may have are never drawn.

    A row ends with the token `end_of_document`, or one of `ends`. An encoder-decoder reads with its encoder. What its
    decoder writes begins after `config.start_token`, at positions of its own. An encoder alone cannot generate.
    """
    if config.kind not in ("decoder", "encoder_decoder") or config.pairs:
        raise UserError(
            f"model.kind={config.kind!r}, model.fusion={config.fusion!r}: generates no text; valid: decoder, "
            "encoder_decoder, and any fusion but contrastive"
        )
    ending = jnp.array(sorted({end_of_document, *ends}), jnp.int32)

    def start(
        weights: Weights,
        tokens: jax.Array,
        lengths: jax.Array,
        sampling: Sampling,
        keys: jax.Array,
        max_tokens: jax.Array,
        slots: int,
        sight: Sight = NOTHING_SEEN,
    ) -> Drawn:
        model = bind(graphdef, weights)
        given = tokens, lengths, keys, max_tokens, slots, vocab_size, end_of_document, sight
        rows, drawn, logprobs = draw_next(*begin(model, config, *given), sampling, ending)
        return rows, drawn[:, None], logprobs[:, None]

    def decode(weights: Weights, rows: Rows, sampling: Sampling, chunk: int) -> Drawn:
        return draw_chunk(bind(graphdef, weights), rows, sampling, chunk, ending)

    return Decoder(
        start=jax.jit(start, static_argnames="slots"),
        decode=jax.jit(decode, static_argnames="chunk", donate_argnames="rows"),
        reads_prompts=config.kind == "decoder",
    )


def decoding_weights(config: ModelConfig, weights: Weights) -> Weights:
    """The weights as the loop reads them best: matrices in the compute dtype, layers apart where they are unrolled.

    Converting or slicing them inside the program would copy all of them for every chunk. The results are the same.
    """
    weights = rounded(weights, config.compute_dtype)
    if config.layer_loop != "unroll":
        return weights
    return jax.jit(unstack, static_argnums=1)(weights, config.pipeline_repeats)


def row_keys(seeds: Sequence[int], numbers: Sequence[int]) -> jax.Array:
    """[B] random keys from each row's seed and number, below 2^32: a row keeps its draws wherever it stands."""
    keys = jax.vmap(jax.random.key)(jnp.array(seeds, jnp.uint32))
    return jax.vmap(jax.random.fold_in)(keys, jnp.array(numbers, jnp.uint32))


def pad_prompts(prompts: Sequence[Sequence[int]], longest: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Prompts of at least one token each as tokens [B, T] and lengths [B], int32, right-padded with 0.

    T is the next power of two, 16 at least, so that few shapes are compiled; `longest`, where there is one, is the
    number of positions the model has, and limits it.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    width = max(16, 1 << (int(lengths.max()) - 1).bit_length())
    tokens = np.zeros((len(prompts), min(width, longest or width)), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, lengths


def slots_for(width: int, longest: int) -> int:
    """Slots for prompts padded to `width` of which the longest may grow to `longest` tokens: a multiple of 64."""
    return -(-max(width, longest) // 64) * 64

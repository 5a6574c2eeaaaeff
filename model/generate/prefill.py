"""Reading: the prompts of generation into its cache, and one token after them.

Legend: B rows, T tokens of the padded prompts, D embed_dim, V vocab_size.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from model.attention.cache import Cache, empty_cache, write_slots
from model.attention.cross_attention import Source
from model.config import ModelConfig
from model.encoder_decoder import EncoderDecoder, decoder_config
from model.place import Place
from model.transformer import Transformer
from model.vision.images import Images


class Sight(NamedTuple):
    """What the prompts show: their images, and with model.rope_sections where their tokens are turned to."""

    images: Images | None = None
    positions: jax.Array | None = None  # [B, T, 3] int32
    shift: jax.Array | None = None  # [B] int32, what follows is turned to its place in the text plus this


NOTHING_SEEN = Sight()
CHUNK = 1024  # tokens of a row that are read at a time


def prefill(
    model: Transformer,
    config: ModelConfig,
    tokens: jax.Array,
    lengths: jax.Array,
    slots: int,
    sight: Sight = NOTHING_SEEN,
    chunk: int = CHUNK,
) -> tuple[Cache, jax.Array, Source | None]:
    """Reads right-padded prompts, tokens [B, T] of lengths [B], `chunk` tokens of a row at a time.

    In parts, prompts of any length take the memory of one, the cache, and scores of one part for a block of keys; up to
    rounding the result is that of one. Where tokens see later ones, or images look at the text, all is one part.

    Returns a cache of `slots`, the last tokens' logits [B, V], and where images are that the next tokens look at.
    """
    t = tokens.shape[1]
    positions = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), tokens.shape)
    # Padding lies in slots of segment 0, which no token sees and which the generated tokens overwrite.
    place = Place((positions < lengths[:, None]).astype(jnp.int32), positions)
    cache = empty_cache(config, tokens.shape[0], slots)
    # Marked as a whole: dynamic scaling turns the keys of every part as the length of the prompt says.
    cache = cache._replace(slots=write_slots(cache.slots, place))
    images, source = sight.images, None if sight.images is None else model.vision(sight.images)
    whole = images is not None and (config.fusion in ("co", "tangled") or config.vision.mask != "causal")
    size = t if whole else min(chunk, t)

    def read(state: tuple, start: Any, size: int, opens: bool = False) -> tuple[jax.Array, Cache]:
        """The part from `start` on: what is known of each row's last token [B, D], and the cache."""
        last, cache = state
        of_part = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size, axis=1)
        seen = None if images is None else images.of_tokens(of_part)
        known = source if opens or source is None or config.fusion == "merge" else source._replace(hidden=None)
        turned = None if sight.positions is None else of_part(sight.positions)
        here = jax.tree.map(of_part, place)
        hidden, cache = model(
            of_part(tokens), here, cache, positions=turned, images=seen, source=known, opens=opens
        )  # [B, C, D]
        at = jnp.clip(lengths - 1 - start, 0, size - 1)[:, None, None]
        here = jnp.take_along_axis(hidden, at, axis=1)[:, 0]
        return jnp.where((lengths > start)[:, None], here, last), cache

    state = read((0.0, cache), 0, size, opens=True)
    if (parts := t // size) > 1:
        needed = jnp.minimum(parts, -(-lengths.max() // size))
        state = jax.lax.fori_loop(1, needed, lambda i, state: read(state, i * size, size), state)
    if t % size:
        state = read(state, parts * size, t % size)
    last, cache = state
    if images is not None and config.fusion != "merge":
        images, ones = images.of_tokens(lambda a: _of_each(a, lengths - 1)), jnp.ones_like(lengths)[:, None]
        return cache, model.head(last), images.looked_at(source._replace(hidden=None), Place(ones, ones))
    return cache, model.head(last), None


def _of_each(a: jax.Array, number: jax.Array) -> jax.Array:
    """The token `number` [B] of every row of a [B, T, ...]: [B, 1, ...]."""
    return jnp.take_along_axis(a, number.reshape(-1, *[1] * (a.ndim - 1)), axis=1)


def prefill_decoder(
    model: EncoderDecoder, config: ModelConfig, tokens: jax.Array, lengths: jax.Array, slots: int, start_token: int
) -> tuple[Cache, jax.Array, Source]:
    """As `prefill` for an encoder-decoder: the encoder reads the prompts, the decoder `start_token`, at position 0."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    source = model.encode(tokens, (positions < lengths[:, None]).astype(jnp.int32))
    cache = empty_cache(decoder_config(config), tokens.shape[0], slots)
    cache, logits = advance(model, cache, jnp.full_like(lengths, start_token), jnp.zeros_like(lengths), source)
    return cache, logits, source._replace(hidden=None)


def advance(
    model: Transformer | EncoderDecoder,
    cache: Cache,
    tokens: jax.Array,
    positions: jax.Array,
    source: Source | None = None,
    shift: jax.Array | None = None,
) -> tuple[Cache, jax.Array]:
    """Reads one token [B] per row at positions [B]: the cache with it, the logits [B, V] of what follows it.

    source, shift: as in `Rows`.
    """
    place = Place(jnp.ones_like(positions)[:, None], positions[:, None])
    read = {} if source is None else {"source": source}
    read |= {} if shift is None else {"positions": (positions + shift)[:, None]}
    hidden, cache = model(tokens[:, None], place, cache, **read)  # [B, 1, D]
    return cache, model.head(hidden[:, 0])

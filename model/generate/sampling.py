"""From logits to the next token: repetition penalty, temperature, top-k, top-p, min-p, and the draw.

Every parameter is an array with one value per row, so rows of one batch may differ and a new value compiles nothing.
What happens to a row depends on that row alone.

Legend: B rows, V tokens that may be drawn.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# A temperature below this is taken as this: logits then differ by a million times as much, and nothing overflows.
LOWEST_TEMPERATURE = 1e-6


class Sampling(NamedTuple):
    """How each row draws, [B] each. The filters apply in this order, each to what the one before has left."""

    repetition_penalty: jax.Array  # float32, above 0; 1: none
    temperature: jax.Array  # float32; 0: the most probable token, whatever the filters
    top_k: jax.Array  # int32; 0: no limit
    top_p: jax.Array  # float32 in (0, 1]; 1: no limit
    min_p: jax.Array  # float32 in [0, 1); 0: no limit


def sampling_of(
    rows: int,
    repetition_penalty: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Sampling:
    """The same for so many `rows`; temperature 0 takes the most probable token."""
    given = (repetition_penalty, temperature, top_k, top_p, min_p)
    types = (np.int32 if name == "top_k" else np.float32 for name in Sampling._fields)
    return Sampling(*(np.full(rows, value, dtype) for value, dtype in zip(given, types, strict=True)))


def penalized(logits: jax.Array, seen: jax.Array, penalty: jax.Array) -> jax.Array:
    """Makes tokens that were `seen` [B, V] less likely (CTRL, arXiv:1909.05858, section 4.1): [B, V].

    A positive logit is divided by the row's penalty [B]; a negative one is multiplied by it, since dividing it would
    make the token more likely.
    """
    penalty = penalty[:, None]
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def filtered(logits: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array) -> jax.Array:
    """logits [B, V], tempered, with minus infinity where a filter removes the token.

    A token stays where
      top-k (arXiv:1805.04833): fewer than k tokens are more probable;
      top-p (arXiv:1904.09751): the tokens more probable than it, after top-k, have less than p of the probability;
      min-p (arXiv:2407.01082): its probability is at least min_p times the highest.
    So the most probable token always stays, and equally probable tokens stay or go together.
    """
    top_k = jnp.where(top_k > 0, top_k.astype(logits.dtype), jnp.inf)
    logits = jnp.where(_is_high(logits, jnp.ones_like(logits), top_k), logits, -jnp.inf)
    top_p = jnp.where(top_p < 1, top_p, jnp.inf)
    logits = jnp.where(_is_high(logits, jax.nn.softmax(logits, axis=-1), top_p), logits, -jnp.inf)
    lowest = logits.max(axis=-1) + jnp.log(min_p)
    return jnp.where(logits >= lowest[:, None], logits, -jnp.inf)


def draw(logits: jax.Array, seen: jax.Array, sampling: Sampling, keys: jax.Array) -> jax.Array:
    """Draws one token per row: [B] int32.

    Args:
      logits: [B, V] float32.
      seen: [B, V] bool, tokens that the repetition penalty is about.
      keys: [B] random keys, a fresh one for every draw of a row.
    """
    logits = penalized(logits, seen, sampling.repetition_penalty)
    highest = logits.max(axis=-1, keepdims=True)
    likeliest = _first(logits == highest)

    def sample() -> jax.Array:
        tempered = (logits - highest) / jnp.maximum(sampling.temperature, LOWEST_TEMPERATURE)[:, None]
        weights = jnp.exp(filtered(tempered, sampling.top_k, sampling.top_p, sampling.min_p))
        # Where one uniform number falls in the cumulative sum: a fraction of the time that noise for every token takes.
        # Sums are rounded, so the token is looked for among those with a weight, and below the greatest of their sums.
        sums = jnp.where(weights > 0, weights.cumsum(axis=-1), 0.0)
        uniform = jax.vmap(jax.random.uniform)(keys)
        return _first(sums > (uniform * sums.max(axis=-1))[:, None])

    drawn = jax.lax.cond(jnp.any(sampling.temperature > 0), sample, lambda: likeliest)
    return jnp.where(sampling.temperature > 0, drawn, likeliest)


def _first(found: jax.Array) -> jax.Array:
    """found [B, V] bool -> [B] int32, the first true, V - 1 where none is. Several times as fast on CPU as argmax."""
    last = found.shape[-1] - 1
    return jnp.where(found, jnp.arange(last + 1, dtype=jnp.int32), last).min(axis=-1)


def _is_high(x: jax.Array, amounts: jax.Array, bound: jax.Array) -> jax.Array:
    """[B, V] bool: whether the `amounts` [B, V] of all greater x of the row add up to less than `bound` [B].

    Finds each row's lowest such x by halving the interval of float32 numbers, 32 times: a sort of the vocabulary would
    take ten times as long on CPU. Does nothing where every bound is infinite.
    """
    # Unsigned integers in the order of the numbers; both zeros are one number.
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    ordered = jnp.where(bits & sign, ~bits, bits | sign)

    def halve(_: int, interval: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = interval  # [B]; what is looked for lies between them, both included
        middle = low + (high - low) // 2
        enough = jnp.where(ordered > middle[:, None], amounts, 0.0).sum(axis=-1) < bound
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    def lowest() -> jax.Array:
        return jax.lax.fori_loop(0, 32, halve, (ordered.min(axis=-1), ordered.max(axis=-1)))[0]

    # The branch is taken for the whole batch; either gives a row without a bound all of its x.
    found = jax.lax.cond(jnp.any(bound < jnp.inf), lowest, lambda: jnp.zeros(len(x), jnp.uint32))
    return ordered >= found[:, None]

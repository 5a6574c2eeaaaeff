"""Generation of which nobody looks at the text before its end: prompts in, tokens and log-probabilities out.

Legend: B rows, T tokens of the padded prompts, N tokens that a row may get.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from model.generate.decode import Decoder, row_keys, slots_for
from model.generate.prefill import NOTHING_SEEN, Sight
from model.generate.sampling import Sampling, sampling_of
from model.weights import Weights


class Generated(NamedTuple):
    """What was drawn for each row."""

    tokens: jax.Array  # [B, N] int32; the token that ends a row is the last, NO_TOKEN after it
    logprobs: jax.Array  # [B, N] float32, nats, under the model itself (see `model.generate.decode.Decoder`)


def generate(
    decoder: Decoder,
    weights: Weights,
    tokens: np.ndarray,
    lengths: np.ndarray,
    max_tokens: int | np.ndarray,
    sampling: Sampling | None = None,
    keys: jax.Array | None = None,
    sight: Sight = NOTHING_SEEN,
) -> Generated:
    """Goes on with every prompt until it ends, or has its most tokens.

    A row's tokens depend on its prompt, its sampling and its key alone. New prompts, limits below the same highest one
    and sampling of the same shapes compile nothing.

    Args:
      decoder, weights: of `make_decoder` and `decoding_weights`.
      tokens, lengths: [B, T] and [B] int32, right-padded prompts of at least one token, as `pad_prompts` gives them.
      max_tokens: at least 1, of all rows or of each, [B] int32; N is the highest.
      sampling: how each row draws; None: the most probable token.
      keys: [B] random keys of `row_keys`; None: of seed 0, numbered by row.
      sight: what the prompts show.
    """
    b, t = tokens.shape
    limits = np.broadcast_to(np.asarray(max_tokens, np.int32), b)
    most = int(limits.max())
    sampling = sampling_of(b, temperature=0.0) if sampling is None else sampling
    keys = row_keys([0] * b, range(b)) if keys is None else keys
    slots = slots_for(t, t + most) if decoder.reads_prompts else slots_for(1, 1 + most)
    rows, *drawn = decoder.start(weights, tokens, lengths, sampling, keys, limits, slots, sight)
    if most == 1:
        return Generated(*drawn)
    _, *rest = decoder.decode(weights, rows, sampling, most - 1)
    return Generated(*(jnp.concatenate(both, axis=1) for both in zip(drawn, rest, strict=True)))

"""Decoders as transformers runs them: arrays named as there, in and out.

Legend: B rows, T tokens, D embed_dim, V vocab_size, N tokens generated.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from model.config import ModelConfig
from model.generate.decode import decoding_weights, make_decoder
from model.generate.generate import generate
from model.generate.prefill import NOTHING_SEEN, Sight
from model.kinds import build
from model.place import Place
from model.transformer import Transformer
from model.weights import Weights, bind
from tpu.errors import UserError

INPUTS = ("input_ids", "attention_mask", "position_ids", "labels")
IGNORED = -100  # a label without a loss


def run(
    config: ModelConfig, weights: Weights, inputs: dict[str, np.ndarray], new_tokens: int, options: dict[str, Any]
) -> dict[str, np.ndarray]:
    """logits [B, T, V] and last_hidden_state [B, T, D] float32; loss with labels; sequences with new_tokens.

    Args:
      config: placed. weights: of `model.kinds.build(config)`.
      inputs: input_ids [B, T] and, if there, attention_mask, position_ids and labels of the same shape, integers.
      options: config.json and, over it, generation_config.json: `eos_token_id` and `pad_token_id`.

    Raises UserError for another name, shape or type, and for tokens outside the vocabulary.
    """
    inputs = checked(config, inputs)
    model = build(config)[0]
    compute = jax.jit(lambda weights, inputs: outputs(bind(model, weights), inputs))
    found = {name: np.asarray(value) for name, value in compute(weights, inputs).items()}
    if new_tokens:
        found["sequences"] = greedy(config, weights, inputs, new_tokens, options)
    return found


def checked(config: ModelConfig, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inputs as int32 arrays. Raises UserError as `run`."""
    if unknown := inputs.keys() - set(INPUTS):
        raise UserError(f"inputs: {sorted(unknown)[0]!r} is not supported; valid: {', '.join(INPUTS)}")
    return integers(config, inputs)


def integers(config: ModelConfig, inputs: dict[str, np.ndarray], tokens: str = "input_ids") -> dict[str, np.ndarray]:
    """Arrays that all have the shape of `tokens`, as int32. Raises UserError as `run`."""
    if tokens not in inputs:
        raise UserError(f"inputs: {tokens} is missing")
    shape = inputs[tokens].shape
    for name, array in inputs.items():
        if array.ndim != 2 or array.shape != shape or array.size == 0 or array.dtype.kind not in "iub":
            raise UserError(
                f"inputs: {name} is {array.dtype}{list(array.shape)}; must be integers [rows, tokens], as all"
            )
    ids = inputs[tokens]
    if ids.min() < 0 or ids.max() >= config.vocab_size:
        raise UserError(f"inputs: {tokens} from {ids.min()} to {ids.max()}: valid: 0 to {config.vocab_size - 1}")
    if "position_ids" in inputs and inputs["position_ids"].min() < 0:
        raise UserError("inputs: position_ids: must not be negative")
    config.check_context(int(inputs.get("position_ids", np.arange(shape[1])).max()) + 1, "inputs: positions")
    return {name: array.astype(np.int32) for name, array in inputs.items()}


def outputs(model: Transformer, inputs: dict[str, Any]) -> dict[str, jax.Array]:
    """What transformers' forward gives for checked inputs; a token that may see nothing is as good as random there."""
    place, keys = places(inputs)
    hidden, _ = model(inputs["input_ids"], place, keys=keys, positions=inputs.get("position_ids"))  # [B, T, D]
    return described(model, hidden, inputs)


def places(inputs: dict[str, Any]) -> tuple[Place, Place | None]:
    """Where checked inputs' tokens stand, and where they stand for those that look at them, if not there."""
    tokens = inputs["input_ids"]
    order = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    segments = jnp.ones_like(tokens)
    if "attention_mask" not in inputs and "position_ids" in inputs:  # Rows are packed where positions start again.
        restarts = jnp.diff(inputs["position_ids"], axis=1) != 1
        segments = segments.at[:, 1:].add(jnp.cumsum(restarts, axis=1, dtype=jnp.int32))
    place = Place(segments, order)
    keys = None
    if "attention_mask" in inputs:  # Padding is not seen, but sees: what stands there counts where it has a label.
        keys = Place(jnp.asarray(inputs["attention_mask"], bool).astype(jnp.int32), order)
    return place, keys


def described(model: Transformer, hidden: jax.Array, inputs: dict[str, Any]) -> dict[str, jax.Array]:
    """The hidden states [B, T, D], their logits and, with labels, their loss, by transformers' names."""
    logits = model.head(hidden)
    found = {"logits": logits, "last_hidden_state": hidden.astype(jnp.float32)}
    if "labels" in inputs:
        found["loss"] = next_token_loss(logits, inputs["labels"])
    return found


def next_token_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy, nats, of logits [B, T, V] with the labels [B, T] of the tokens after them."""
    logits, labels = logits[:, :-1], labels[:, 1:]
    counted = labels != IGNORED
    chosen = jnp.take_along_axis(logits, jnp.where(counted, labels, 0)[..., None], axis=-1)[..., 0]
    nll = jax.nn.logsumexp(logits, axis=-1) - chosen
    return jnp.sum(jnp.where(counted, nll, 0.0)) / jnp.sum(counted, dtype=jnp.float32)


def greedy(
    config: ModelConfig,
    weights: Weights,
    inputs: dict[str, np.ndarray],
    new_tokens: int,
    options: dict[str, Any],
    sight: Sight = NOTHING_SEEN,
) -> np.ndarray:
    """sequences [B, T + N] int64: input_ids and the most probable tokens after them, through our cache.

    Padding is to lie on the left, but in `sight`, which is of rows as `moved` leaves them. A row that has ended is
    padded on; N is below `new_tokens` where all rows end before.
    """
    tokens = inputs["input_ids"]
    lengths = prompt_lengths(inputs, options)
    config.check_context(int(lengths.max()) + new_tokens, "inputs: tokens with those to generate")
    prompts = moved(tokens, lengths, 0)
    decoder = make_decoder(config, build(config)[0], config.vocab_size, -1)
    found = generate(decoder, decoding_weights(config, weights), prompts, lengths, new_tokens, sight=sight)
    new = np.asarray(found.tokens)
    return np.concatenate([tokens, ended(new, options)], axis=1).astype(np.int64)


def prompt_lengths(inputs: dict[str, np.ndarray], options: dict[str, Any]) -> np.ndarray:
    """[B] int32, how many tokens of checked inputs are no padding. Raises UserError for padding not on the left."""
    mask = inputs.get("attention_mask", _seen(inputs["input_ids"], options)) != 0
    if not mask[:, -1].all() or (np.diff(mask.astype(int), axis=1) < 0).any():
        raise UserError("inputs: attention_mask: new_tokens needs all padding on the left")
    return mask.sum(1).astype(np.int32)


def moved(array: np.ndarray, lengths: np.ndarray, padding: int) -> np.ndarray:
    """[B, T, ...] with what is at the right of each row at its left: in our cache slot 0 has a row's first token."""
    found = np.full_like(array, padding)
    for row, (values, length) in enumerate(zip(array, lengths, strict=True)):
        found[row, :length] = values[len(values) - length :]
    return found


def _seen(tokens: np.ndarray, options: dict[str, Any]) -> np.ndarray:
    """The mask of tokens [B, T] that came without one: as transformers has it, padding on the left is not seen."""
    padding, ends = options.get("pad_token_id"), _ends(options)
    if padding is None or padding in ends:
        return np.ones_like(tokens)
    seen = np.cumsum(tokens != padding, axis=1) > 0
    return np.where(seen[:, -1:], seen, True)


def _ends(options: dict[str, Any]) -> list[int]:
    ends = options.get("eos_token_id")
    return [] if ends is None else ends if isinstance(ends, list) else [ends]


def ended(new: np.ndarray, options: dict[str, Any]) -> np.ndarray:
    """Generated tokens [B, N] with padding after the first that ends a row, cut where all have ended."""
    if not (ends := _ends(options)):
        return new
    after = np.cumsum(np.isin(new, ends), axis=1) - np.isin(new, ends) > 0
    padding = options.get("pad_token_id")
    new = np.where(after, ends[0] if padding is None else padding, new)
    return new[:, : int((~after).any(0).sum())]

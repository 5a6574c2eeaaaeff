"""Decoders that see images among their tokens, as transformers runs them: arrays named as there, in and out.

Legend: B rows, T tokens, D embed_dim, N images of a row, A images of all rows, P vectors of an image.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from model.config import ModelConfig, VisionConfig
from model.families import causal
from model.families.causal import INPUTS, described, integers, moved, places, prompt_lengths
from model.families.mapping import Peer
from model.families.options import filled, get
from model.families.vit import pixels
from model.generate.prefill import Sight
from model.kinds import build
from model.vision.images import Images
from model.weights import Weights, bind
from tpu.errors import UserError

BY_TOKEN = {"slots": -1, "seen": 0, "given": 0}  # of `Images`, [B, T] each, and what padding has
# Names of files before transformers 5, and of its modules.
RENAMED = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^(?:model\.)?(vision_tower|multi_modal_projector)\.(?:vision_model\.)?", r"\1."),
)


def language_model(table: dict[str, str | Peer]) -> dict[str, str | Peer]:
    """A decoder's table for a decoder that is part of a model."""
    rows = {ours: Peer(row) if isinstance(row, str) else row for ours, row in table.items()}
    return {ours: row._replace(name=f"language_model.{row.name}") for ours, row in rows.items()}


def image_token(config: dict[str, Any], default: int) -> int:
    """The id in a text that stands for an image's vector. Raises UserError for one that no token has."""
    name = "image_token_id" if config.get("image_token_index") is None else "image_token_index"
    token = get(config, name, int, default)
    if token < 0:
        raise UserError(f"config.json: {name}={token}: must be the id of a token")
    return token


def write_image_token(vision: VisionConfig) -> dict[str, Any]:
    """The option that `image_token` reads, if there is an id."""
    return {"image_token_index": vision.image_token} if vision.image_token >= 0 else {}


def run(
    config: ModelConfig,
    weights: Weights,
    inputs: dict[str, np.ndarray],
    new_tokens: int,
    options: dict[str, Any],
    flat: bool = False,
) -> dict[str, np.ndarray]:
    """As `model.families.causal.run`, and image_hidden_states [A, P, D] float32 where there are images.

    Args:
      inputs: as there, and pixel_values [A, channels, H, W], floats: images in the order of their tokens, row by row.
        Where vision.mask is not "causal" also token_type_ids [B, T]: 0 for what is given and 1 for the answer
        ("prefix"), or 1 for an image's tokens and 0 elsewhere ("images"); without them the mask is causal.
      flat: whether image_hidden_states are [A P, D].

    Raises UserError as there, and where tokens and images are not of equal number.
    """
    arrays = checked(config, inputs, options)
    compute = jax.jit(functools.partial(outputs, config))
    found = {name: np.asarray(value) for name, value in compute(weights, arrays).items()}
    if flat and "image_hidden_states" in found:
        found["image_hidden_states"] = found["image_hidden_states"].reshape(-1, config.embed_dim)
    if new_tokens:
        ends = filled(options, options.get("text_config") or {})  # Of what the model does not say its text may.
        found["sequences"] = greedy(config, weights, arrays, new_tokens, ends)
    return found


def checked(config: ModelConfig, inputs: dict[str, np.ndarray], options: dict[str, Any]) -> dict[str, np.ndarray]:
    """The inputs as `outputs` takes them: the fields of `model.vision.Images`, and where each image lies in `pixels`.
    Raises UserError as `run`."""
    vision = config.vision
    valid = (*INPUTS, *(("token_type_ids",) if vision.mask != "causal" else ()), "pixel_values")
    if unknown := inputs.keys() - set(valid):
        raise UserError(f"inputs: {sorted(unknown)[0]!r} is not supported; valid: {', '.join(valid)}")
    text = {name: inputs[name] for name in valid[:-1] if name in inputs}
    stands = text.get("input_ids", np.zeros((0, 0))) == vision.image_token
    if "input_ids" in text:  # The id of an image's token may be outside of the vocabulary.
        text["input_ids"] = np.where(stands, 0, text["input_ids"])
    arrays = integers(config, text)
    types = arrays.pop("token_type_ids", None)
    arrays["slots"] = np.where(stands, np.cumsum(stands, axis=1) - 1, -1).astype(np.int32)
    arrays["given"] = np.zeros_like(arrays["input_ids"])
    arrays["seen"] = np.zeros_like(arrays["input_ids"])
    if vision.mask == "prefix" and types is not None:
        arrays["given"] = (types == 0).astype(np.int32)
    if vision.mask == "images" and types is not None:
        if not np.array_equal(types == 1, stands):
            raise UserError(
                f"inputs: token_type_ids: must be 1 where input_ids are {vision.image_token}, an image's token, and 0 "
                "elsewhere"
            )
        # Images with nothing between them see each other.
        begins = stands & ~np.pad(stands, ((0, 0), (1, 0)))[:, :-1]
        arrays["seen"] = np.cumsum(begins, axis=1, dtype=np.int32)
    return arrays | _arranged(config, stands, inputs)


def _arranged(config: ModelConfig, stands: np.ndarray, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Images as `pixels` [B, N, H, W, channels] and `segments` [B, N]; `rows` and `numbers` [A], where each is there.

    stands: [B, T] bool, where an image's vector does. Text alone has an empty place for an image in every row.
    """
    vision = config.vision
    vectors, wanted = vision.vectors, int(stands.sum())
    images = np.zeros((0, vision.image_size, vision.image_size, vision.channels), np.float32)
    images = pixels(config, inputs, False) if "pixel_values" in inputs else images
    if wanted != len(images) * vectors:
        raise UserError(
            f"inputs: input_ids has {wanted} image tokens ({config.vision.image_token}), and pixel_values gives "
            f"{len(images) * vectors} ({len(images)} images of {vectors}); must be as many"
        )
    each = stands.sum(1)
    if (each % vectors).any():
        row = int(np.argmax(each % vectors > 0))
        raise UserError(
            f"inputs: input_ids: row {row} has {each[row]} image tokens, which are no whole images of {vectors}"
        )
    counts = each // vectors
    rows = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    numbers = np.concatenate([np.arange(count, dtype=np.int32) for count in counts])
    placed = np.zeros((len(counts), max(1, counts.max()), *images.shape[1:]), np.float32)
    placed[rows, numbers] = images
    segments = np.zeros(placed.shape[:2], np.int32)
    segments[rows, numbers] = 1
    return {"pixels": placed, "segments": segments, "rows": rows, "numbers": numbers}


def images_of(inputs: dict[str, Any]) -> Images:
    """The images among checked inputs."""
    return Images(inputs["pixels"], inputs["segments"], **{name: inputs[name] for name in BY_TOKEN})


def outputs(config: ModelConfig, weights: Weights, inputs: dict[str, Any]) -> dict[str, jax.Array]:
    """As `run`, of checked inputs, to be compiled."""
    model, images = bind(build(config)[0], weights), images_of(inputs)
    place, keys = places(inputs)
    keys = keys if keys is None else keys._replace(blocks=images.blocks(config.vision.mask, place))
    hidden, _ = model(inputs["input_ids"], place, keys=keys, positions=inputs.get("position_ids"), images=images)
    found = described(model, hidden, inputs)
    if len(inputs["rows"]):
        vectors = model.vision(images).hidden.astype(jnp.float32)
        vectors = vectors.reshape(*images.segments.shape, -1, vectors.shape[-1])
        found["image_hidden_states"] = vectors[inputs["rows"], inputs["numbers"]]
    return found


def greedy(
    config: ModelConfig, weights: Weights, inputs: dict[str, np.ndarray], new_tokens: int, options: dict[str, Any]
) -> np.ndarray:
    """As `model.families.causal.greedy`, of checked inputs: what images and prefixes see both ways they see when they
    are read; what is generated sees all before it."""
    lengths = prompt_lengths(inputs, options)
    turned = {name: moved(inputs[name], lengths, padding) for name, padding in BY_TOKEN.items()}
    sequences = causal.greedy(config, weights, inputs, new_tokens, options, Sight(images_of(inputs | turned)))
    width = inputs["slots"].shape[1]
    sequences[:, :width] = np.where(inputs["slots"] >= 0, config.vision.image_token, sequences[:, :width])
    return sequences

"""CLIP and SigLIP as transformers runs them: arrays named as there, in and out.

Legend: B texts, A images, T tokens, P vectors of an image, D and C the towers' widths, E projection_dim.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from model.config import ModelConfig
from model.families.causal import integers
from model.families.options import filled
from model.families.towers import CLIP_TEXTS, without_norm
from model.families.vit import pixels
from model.fusion.contrastive import unit
from model.kinds import build
from model.linear import exact_matmul
from model.place import Place
from model.weights import Weights, bind
from tpu.errors import UserError

TEXTS = ("input_ids", "attention_mask")
FLAGS = ("return_loss", "interpolate_pos_encoding")
LAST = 2  # the eos_token_id that stands for the largest id of a text, in CLIP's first files


def run(
    config: ModelConfig, weights: Weights, inputs: dict[str, np.ndarray], new_tokens: int, options: dict[str, Any]
) -> dict[str, np.ndarray]:
    """What transformers' forward gives, float32.

    logits_per_image [A, B], logits_per_text [B, A], image_embeds [A, E], text_embeds [B, E]; of each tower
    last_hidden_state [B, T, D] or [A, P, C] and pooler_output; the loss with return_loss.

    Args:
      config: placed. weights: of `model.kinds.build(config)`.
      inputs: input_ids [B, T] and, if there, attention_mask of the same shape, integers; pixel_values [A, channels, H,
        W], floats; return_loss and interpolate_pos_encoding, which images of another size than the model's need, single
        booleans.
      options: config.json, for the id that ends a text.

    Raises UserError for another name, shape or type, tokens outside the vocabulary, and for `new_tokens`.
    """
    if new_tokens:
        raise UserError(f"new_tokens={new_tokens}: this model generates no text; leave it out")
    arrays = checked(config, inputs, options)
    compute = jax.jit(functools.partial(outputs, config))
    return {name: np.asarray(value) for name, value in compute(weights, arrays).items()}


def checked(config: ModelConfig, inputs: dict[str, np.ndarray], options: dict[str, Any]) -> dict[str, np.ndarray]:
    """The inputs as `outputs` takes them: the texts' `ends` [B] too, `loss` where it is asked for."""
    valid = (*TEXTS, "pixel_values", *FLAGS)
    if unknown := inputs.keys() - set(valid):
        raise UserError(f"inputs: {sorted(unknown)[0]!r} is not supported; valid: {', '.join(valid)}")
    for name in FLAGS:
        if name in inputs and (inputs[name].shape != () or inputs[name].dtype != bool):
            raise UserError(f"inputs: {name} is {inputs[name].dtype}{list(inputs[name].shape)}; must be one boolean")
    arrays = integers(config, {name: inputs[name] for name in TEXTS if name in inputs})
    any_size = bool(inputs.get("interpolate_pos_encoding", False))
    arrays["pixel_values"] = pixels(config, inputs, any_size)
    arrays["ends"] = _ends(arrays["input_ids"], options)
    if inputs.get("return_loss", False):
        texts, pictures = len(arrays["input_ids"]), len(arrays["pixel_values"])
        if texts != pictures:
            raise UserError(f"inputs: return_loss: needs as many images as texts, not {pictures} and {texts}")
        arrays["loss"] = np.zeros(())
    return arrays


def _ends(tokens: np.ndarray, options: dict[str, Any]) -> np.ndarray:
    """[B] int32, where CLIP's texts of tokens [B, T] end: at the first eos_token_id, or at the largest id."""
    end = filled(options.get("text_config") or {}, CLIP_TEXTS)["eos_token_id"]
    return (tokens if end == LAST else tokens == end).argmax(1).astype(np.int32)


def outputs(config: ModelConfig, weights: Weights, inputs: dict[str, Any]) -> dict[str, jax.Array]:
    """As `run`, of checked inputs, to be compiled."""
    model, pictures = bind(build(config)[0], weights), inputs["pixel_values"]
    tokens = inputs["input_ids"]
    order = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    place = Place(jnp.ones_like(order), order)
    keys = None
    if "attention_mask" in inputs:  # Padding is not seen, but sees: SigLIP's texts are read there.
        keys = Place((inputs["attention_mask"] != 0).astype(jnp.int32), order)
    read = model.read(tokens, place, keys)
    texts, images = model.project_texts(read, inputs["ends"]), model.project_images(pictures)
    # CLIP's norm comes after what is called the last hidden state.
    tower = config if model.sigmoid else without_norm(config)
    seen = bind(build(tower)[0], weights).vision.encoder(pictures)[0]
    found = {
        "text_embeds": unit(texts),
        "image_embeds": unit(images),
        "text_model_output.last_hidden_state": read.astype(jnp.float32),
        "text_model_output.pooler_output": texts,
        "vision_model_output.last_hidden_state": seen.astype(jnp.float32),
        "vision_model_output.pooler_output": images,
    }
    # Not `model.logits`: transformers has no largest scale.
    similarity = exact_matmul(found["text_embeds"], found["image_embeds"].T)  # [B, B]
    similarity = similarity * jnp.exp(model.logit_scale.get_value())[None]
    similarity = similarity if model.logit_bias is None else similarity + model.logit_bias.get_value()[None]
    found |= {"logits_per_text": similarity, "logits_per_image": similarity.T}
    if "loss" in inputs:
        found["loss"] = (_sigmoid_loss if model.sigmoid else _softmax_loss)(similarity)
    return found


def _softmax_loss(similarity: jax.Array) -> jax.Array:
    """The mean of both directions' cross-entropies, nats, of similarity [B, B] (arXiv:2103.00020, figure 3)."""
    losses = [-jnp.diag(jax.nn.log_softmax(s, axis=-1)).mean() for s in (similarity, similarity.T)]
    return sum(losses) / 2


def _sigmoid_loss(similarity: jax.Array) -> jax.Array:
    """-log sigmoid of every pair, summed over one side and averaged over the other (arXiv:2303.15343, equation 1)."""
    signs = 2 * jnp.eye(len(similarity)) - 1
    return -jax.nn.log_sigmoid(signs * similarity).sum(-1).mean()

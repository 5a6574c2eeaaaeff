"""The vision transformer with a label per image (arXiv:2010.11929): a class token whose vector is classified.

Legend: R images, H, W pixels along their sides, L labels.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from model.config import ModelConfig, VisionConfig
from model.families.mapping import Family, Peer
from model.families.options import ACTIVATIONS, choice, get, only, word
from model.kinds import build
from model.weights import Weights, bind
from tpu.errors import UserError

VIT = "vision.encoder.vit"
OURS, THEIRS = f"{VIT}.stack.groups.layer", "vit.encoder.layer.{layer}"
TABLE = {
    f"{VIT}.class_token": Peer("vit.embeddings.cls_token", rank=3),
    f"{VIT}.position_embedding": Peer("vit.embeddings.position_embeddings", rank=3),
    f"{VIT}.patch.kernel": Peer("vit.embeddings.patch_embeddings.projection.weight", convolution=True),
    f"{VIT}.patch.bias": "vit.embeddings.patch_embeddings.projection.bias",
    f"{OURS}.attention_norm": f"{THEIRS}.layernorm_before",
    f"{OURS}.attention.query": f"{THEIRS}.attention.attention.query",
    f"{OURS}.attention.key": f"{THEIRS}.attention.attention.key",
    f"{OURS}.attention.value": f"{THEIRS}.attention.attention.value",
    f"{OURS}.attention.out": Peer(f"{THEIRS}.attention.output.dense", inputs=2),
    f"{OURS}.mlp_norm": f"{THEIRS}.layernorm_after",
    f"{OURS}.mlp.up": f"{THEIRS}.intermediate.dense",
    f"{OURS}.mlp.down": f"{THEIRS}.output.dense",
    f"{VIT}.final_norm": "vit.layernorm",
    "head": "classifier",
}
INPUTS = ("pixel_values", "labels", "interpolate_pos_encoding")


def read(config: dict[str, Any]) -> ModelConfig:
    """config.json -> ModelConfig."""
    only(config, quantization_config=None, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    (height, width), (rows, columns) = _sides(config, "image_size", 224), _sides(config, "patch_size", 16)
    return ModelConfig(
        kind="vision",
        labels=read_labels(config),
        init="normal",
        init_std=get(config, "initializer_range", float, 0.02),
        vision=VisionConfig(
            encoder="vit",
            image_size=height,
            image_width=0 if width == height else width,
            patch_size=rows,
            patch_width=0 if columns == rows else columns,
            channels=get(config, "num_channels", int, 3),
            normalization="half",
            layers=get(config, "num_hidden_layers", int, 12),
            embed_dim=get(config, "hidden_size", int, 768),
            heads=get(config, "num_attention_heads", int, 12),
            mlp_dim=get(config, "intermediate_size", int, 3072),
            activation=choice(config, "hidden_act", ACTIVATIONS, "gelu"),
            norm_eps=get(config, "layer_norm_eps", float, 1e-12),
            qkv_bias=get(config, "qkv_bias", bool, True),
            positions="learned",
            class_token=True,
            pool="class",
            init="normal",
        ),
    ).resolved()


def _sides(config: dict[str, Any], name: str, default: int) -> tuple[int, int]:
    """Height and width, which are one number where they are equal."""
    value = get(config, name, (int, list), default)
    sides = (value, value) if isinstance(value, int) else tuple(value)
    if len(sides) != 2 or any(type(side) is not int or side < 1 for side in sides):
        raise UserError(f"config.json: {name}={value!r}: must be one side in pixels, or height and width")
    return sides


def read_labels(config: dict[str, Any]) -> int:
    """How many labels an image may have."""
    return len(get(config, "id2label", dict, dict.fromkeys(range(get(config, "num_labels", int, 2)))))


def write(model: ModelConfig) -> dict[str, Any]:
    """ModelConfig -> config.json."""
    vision = model.vision
    image, patch = (vision.image_size, vision.image_width), (vision.patch_size, vision.patch_width)
    return write_labels(model) | {
        "image_size": list(image) if image[1] else image[0],
        "patch_size": list(patch) if patch[1] else patch[0],
        "num_channels": vision.channels,
        "num_hidden_layers": vision.layers,
        "hidden_size": vision.embed_dim,
        "num_attention_heads": vision.heads,
        "intermediate_size": vision.mlp_dim,
        "hidden_act": word(ACTIVATIONS, vision.activation),
        "layer_norm_eps": vision.norm_eps,
        "qkv_bias": vision.qkv_bias,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": model.init_std,
    }


def write_labels(model: ModelConfig) -> dict[str, Any]:
    """The labels' names, which are numbers; one of a model that has none, and that is then found to be another."""
    names = {str(i): f"LABEL_{i}" for i in range(max(1, model.labels))}
    return {"id2label": names, "label2id": {name: int(i) for i, name in names.items()}}


def run(
    config: ModelConfig, weights: Weights, inputs: dict[str, np.ndarray], new_tokens: int, options: dict[str, Any]
) -> dict[str, np.ndarray]:
    """logits [R, L] and last_hidden_state [R, 1 + patches, D] float32; loss with labels.

    Args:
      config, weights: as `model.families.causal.run` takes them.
      inputs: pixel_values [R, channels, H, W] floats, normalised; if there, labels [R] integers and the flag
        interpolate_pos_encoding, without which images have the size of the configuration.
      options: config.json, for `problem_type`.

    Raises UserError for another name, shape or type, labels that are none, and for `new_tokens`.
    """
    refuse_tokens(config, new_tokens)
    arrays = checked(config, inputs, options)
    compute = jax.jit(functools.partial(outputs, config))
    return {name: np.asarray(value) for name, value in compute(weights, arrays).items()}


def refuse_tokens(config: ModelConfig, new_tokens: int) -> None:
    """Raises UserError where text is asked for."""
    if new_tokens:
        raise UserError(f"new_tokens={new_tokens}: model.kind={config.kind!r} generates no text; leave it out")


def checked(config: ModelConfig, inputs: dict[str, np.ndarray], options: dict[str, Any]) -> dict[str, np.ndarray]:
    """The arrays as the model takes them: pixel_values [R, H, W, channels]. Raises UserError as `run`."""
    named(inputs, INPUTS)
    arrays = {"pixel_values": pixels(config, inputs, flag(inputs, "interpolate_pos_encoding"))}
    return arrays | labels(config, inputs, options)


def named(inputs: dict[str, np.ndarray], names: tuple[str, ...]) -> None:
    """Raises UserError for an array that is none of `names`."""
    if unknown := inputs.keys() - set(names):
        raise UserError(f"inputs: {sorted(unknown)[0]!r} is not supported; valid: {', '.join(names)}")


def flag(inputs: dict[str, np.ndarray], name: str) -> bool:
    """Whether the flag is given and set."""
    value = inputs.get(name, np.False_)
    if np.shape(value) != () or np.asarray(value).dtype.kind != "b":
        raise UserError(f"inputs: {name} is {value.dtype}{list(value.shape)}; must be one true or false")
    return bool(value)


def pixels(
    config: ModelConfig, inputs: dict[str, np.ndarray], any_size: bool, lead: tuple[str, ...] = ("images",)
) -> np.ndarray:
    """pixel_values [*lead, channels, H, W] as [*lead, H, W, channels] float32.

    A ResNet takes any size, a ViT with `any_size` any that holds a patch, and else that of the configuration. Raises
    UserError for other shapes and types.
    """
    vision = config.vision
    if "pixel_values" not in inputs:
        raise UserError("inputs: pixel_values is missing")
    array, vit = inputs["pixel_values"], vision.encoder == "vit"
    full = vision.sides if vit and not any_size else ()
    least = (vision.patch_size, vision.reduction_across) if vit else (1, 1)
    wanted = ", ".join(map(str, (*lead, vision.channels, *(full or ("rows", "columns")))))
    right = array.ndim == len(lead) + 3 and array.shape[-3] == vision.channels and array.dtype.kind == "f"
    size = array.shape[-2:]
    if not right or not array.size or (full and size != full) or size[0] < least[0] or size[1] < least[1]:
        raise UserError(f"inputs: pixel_values is {array.dtype}{list(array.shape)}; must be floats [{wanted}]")
    return np.ascontiguousarray(np.moveaxis(array, -3, -1), np.float32)


def labels(config: ModelConfig, inputs: dict[str, np.ndarray], options: dict[str, Any]) -> dict[str, np.ndarray]:
    """The labels [R] int32, where there are any. Raises UserError for other shapes and types, and for other tasks."""
    if "labels" not in inputs:
        return {}
    array, rows = inputs["labels"], len(inputs["pixel_values"])
    kind = options.get("problem_type") or "single_label_classification"
    if config.labels == 1 or kind != "single_label_classification":
        raise UserError(
            f"inputs: labels: problem_type={kind!r} with {config.labels} labels is not supported; "
            "valid: 'single_label_classification' with several"
        )
    if array.shape != (rows,) or array.dtype.kind not in "iu":
        raise UserError(f"inputs: labels is {array.dtype}{list(array.shape)}; must be integers [{rows}]")
    if array.min() < 0 or array.max() >= config.labels:
        raise UserError(f"inputs: labels from {array.min()} to {array.max()}: valid: 0 to {config.labels - 1}")
    return {"labels": array.astype(np.int32)}


def outputs(config: ModelConfig, weights: Weights, inputs: dict[str, Any]) -> dict[str, jax.Array]:
    """As `run`, of checked inputs, to be compiled."""
    model = bind(build(config)[0], weights)
    hidden, _ = model.vision.encoder(jnp.asarray(inputs["pixel_values"]))
    logits = model.head(hidden[:, 0], "float32")
    return {"logits": logits, "last_hidden_state": hidden.astype(jnp.float32)} | loss(logits, inputs)


def loss(logits: jax.Array, inputs: dict[str, Any]) -> dict[str, jax.Array]:
    """Mean cross-entropy, nats, of logits [R, L] with labels [R], where there are any."""
    if "labels" not in inputs:
        return {}
    chosen = jnp.take_along_axis(logits, jnp.asarray(inputs["labels"])[:, None], axis=-1)[:, 0]
    return {"loss": jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen)}


FAMILY = Family(
    architectures=("ViTForImageClassification",),
    model_type="vit",
    paper="arXiv:2010.11929",
    table=TABLE,
    read=read,
    write=write,
    run=run,
    prefix="vit.",
    ignored=r"vit\.pooler\.dense\.(weight|bias)",
    objective="image_classification",
    image_processor="ViT",
)

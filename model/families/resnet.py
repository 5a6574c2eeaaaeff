"""Residual networks with a label per image (arXiv:1512.03385), with the statistics of their batch normalisation.

Legend: R images, H, W pixels along their sides, C channels, L labels.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from model.config import ModelConfig, VisionConfig
from model.families.mapping import Family, Peer
from model.families.options import choice, get, only, word
from model.families.vit import labels, loss, named, pixels, read_labels, refuse_tokens, write_labels
from model.kinds import build
from model.weights import Weights, bind

RESNET, LAYER = "vision.encoder.resnet", "resnet.encoder.stages.{0}.layers.{1}"
UNITS = {
    "stem": "resnet.embedder.embedder",
    "stage_#_#.unit_#": f"{LAYER}.layer.{{2}}",
    "stage_#_#.shortcut": f"{LAYER}.shortcut",
}
TABLE: dict[str, str | Peer] = {"head": "classifier.1"}
for ours, theirs in UNITS.items():
    TABLE[f"{RESNET}.{ours}.convolution"] = Peer(f"{theirs}.convolution", convolution=True)
    TABLE[f"{RESNET}.{ours}.norm"] = f"{theirs}.normalization"
ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
BLOCKS = {"basic": "basic", "bottleneck": "bottleneck"}
INPUTS = ("pixel_values", "labels")


def read(config: dict[str, Any]) -> ModelConfig:
    """config.json -> ModelConfig."""
    only(config, quantization_config=None)
    widths = tuple(get(config, "hidden_sizes", list, [256, 512, 1024, 2048]))
    vision = VisionConfig(
        encoder="resnet",
        channels=get(config, "num_channels", int, 3),
        normalization="imagenet",
        widths=widths,
        depths=tuple(get(config, "depths", list, [3, 4, 6, 3])),
        block=choice(config, "layer_type", BLOCKS, "bottleneck"),
        stem_width=get(config, "embedding_size", int, 64),
        conv_activation=choice(config, "hidden_act", ACTIVATIONS, "relu"),
        first_stride=2 if get(config, "downsample_in_first_stage", bool, False) else 1,
        reduces_first=get(config, "downsample_in_bottleneck", bool, False),
        conv_norm="batch",
        pool="mean",
    )
    vision.image_size = 7 * vision.reduction  # Any would do: the file does not say. With four stages it is 224.
    return ModelConfig(kind="vision", labels=read_labels(config), vision=vision).resolved()


def write(model: ModelConfig) -> dict[str, Any]:
    """ModelConfig -> config.json."""
    vision = model.vision
    return write_labels(model) | {
        "num_channels": vision.channels,
        "hidden_sizes": list(vision.widths),
        "depths": list(vision.depths[: len(vision.widths)]),  # A model that is no ResNet may have more.
        "layer_type": vision.block,
        "embedding_size": vision.stem_width,
        "hidden_act": word(ACTIVATIONS, vision.conv_activation),
        "downsample_in_first_stage": vision.first_stride == 2,
        "downsample_in_bottleneck": vision.reduces_first,
    }


def run(
    config: ModelConfig, weights: Weights, inputs: dict[str, np.ndarray], new_tokens: int, options: dict[str, Any]
) -> dict[str, np.ndarray]:
    """logits [R, L], last_hidden_state [R, C, h, w] and pooler_output [R, C, 1, 1] float32; loss with labels.

    Arguments as `model.families.vit.run`; images may have any size. Raises UserError as it does.
    """
    refuse_tokens(config, new_tokens)
    arrays = checked(config, inputs, options)
    compute = jax.jit(functools.partial(outputs, config))
    return {name: np.asarray(value) for name, value in compute(weights, arrays).items()}


def checked(config: ModelConfig, inputs: dict[str, np.ndarray], options: dict[str, Any]) -> dict[str, np.ndarray]:
    """The arrays as the model takes them: pixel_values [R, H, W, channels]. Raises UserError as `run`."""
    named(inputs, INPUTS)
    return {"pixel_values": pixels(config, inputs, True)} | labels(config, inputs, options)


def outputs(config: ModelConfig, weights: Weights, inputs: dict[str, Any]) -> dict[str, jax.Array]:
    """As `run`, of checked inputs, to be compiled."""
    model = bind(build(config)[0], weights)
    hidden, grid = model.vision.encoder(jnp.asarray(inputs["pixel_values"]))  # [R, h w, C]
    pooled = hidden.mean(1)
    logits = model.head(pooled, "float32")
    found = {
        "logits": logits,
        "last_hidden_state": hidden.swapaxes(1, 2).reshape(len(hidden), -1, *grid),
        "pooler_output": pooled[..., None, None],
    }
    return {name: array.astype(jnp.float32) for name, array in found.items()} | loss(logits, inputs)


FAMILY = Family(
    architectures=("ResNetForImageClassification",),
    model_type="resnet",
    paper="arXiv:1512.03385",
    table=TABLE,
    read=read,
    write=write,
    run=run,
    prefix="resnet.",
    ignored=r".*\.num_batches_tracked",
    objective="image_classification",
    image_processor="ConvNext",
)

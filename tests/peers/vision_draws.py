"""The vision models that record_vision.py draws, and the inputs that test them; multimodal_draws.py has the others.

Inputs are named as transformers names them. Images are noise of few bits, so that they take little room.

Legend: B rows, T tokens, C channels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import transformers

FIRST_WORD = 3
LAST = 4
Arrays = dict[str, np.ndarray]
Options = dict[str, Any]


class Drawn(NamedTuple):
    """A configuration, the arrays of a forward pass, and those of a generation where the model speaks."""

    config: transformers.PreTrainedConfig
    inputs: Arrays
    prompt: Arrays | None


def pixels(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Images that are noise, in eighths, float32."""
    return (np.round(8 * rng.normal(size=shape)) / 8).astype(np.float32)


def padded(rows: list[np.ndarray], left: bool) -> tuple[np.ndarray, np.ndarray]:
    """Rows and their attention mask, [B, T] both, padded with 0 to the longest."""
    width = max(map(len, rows))
    sides = [(width - len(row), 0) if left else (0, width - len(row)) for row in rows]
    return (
        np.stack([np.pad(row, side) for row, side in zip(rows, sides, strict=True)]),
        np.stack([np.pad(np.ones_like(row), side) for row, side in zip(rows, sides, strict=True)]),
    )


def words(rng: np.random.Generator, vocab: int, number: int) -> np.ndarray:
    """Ordinary tokens: those below are for padding and ends, the last ones for placeholders."""
    return rng.integers(FIRST_WORD, vocab - LAST, number)


def tower(rng: np.random.Generator, draw: int, image: int, patch: int) -> Options:
    """Options that all vision transformers and CLIP's text transformer share."""
    hidden, heads = [(16, 2), (18, 3), (20, 5)][draw % 3]
    return {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "intermediate_size": int(rng.integers(20, 40)),
        "num_hidden_layers": 2,
        "hidden_act": ["quick_gelu", "gelu", "gelu_pytorch_tanh"][draw % 3],
        "layer_norm_eps": [1e-5, 1e-3, 1e-12][draw % 3],
        "image_size": image,
        "patch_size": patch,
    }


def vit(rng: np.random.Generator, draw: int) -> Drawn:
    """ViT: square, higher than wide with patches that are not square, and positions interpolated to another size."""
    image, patch = [(16, 4), ([24, 16], [8, 4]), (24, 8)][draw % 3]
    config = transformers.ViTConfig(
        **(tower(rng, draw, image, patch) | {"hidden_act": ["gelu", "gelu_pytorch_tanh", "relu"][draw % 3]}),
        num_labels=int(rng.integers(3, 8)),
        num_channels=[3, 1, 3][draw % 3],
        qkv_bias=draw % 3 != 1,
    )
    size = [(16, 16), (24, 16), (32, 48)][draw % 3]
    inputs = {
        "pixel_values": pixels(rng, 3, config.num_channels, *size),
        "labels": rng.integers(0, config.num_labels, 3),
    }
    return Drawn(config, inputs | ({"interpolate_pos_encoding": np.True_} if draw % 3 == 2 else {}), None)


def resnet(rng: np.random.Generator, draw: int) -> Drawn:
    """ResNet: basic and bottleneck layers, each place where a stage may halve the image; identity and 1x1 shortcuts."""
    sizes, depths = [([6, 10], [2, 1]), ([16, 24], [2, 2]), ([8, 8, 16], [1, 2, 1])][draw % 3]
    config = transformers.ResNetConfig(
        embedding_size=[6, 8, 8][draw % 3],
        hidden_sizes=sizes,
        depths=depths,
        layer_type=["basic", "bottleneck", "bottleneck"][draw % 3],
        hidden_act=["relu", "relu", "gelu"][draw % 3],
        downsample_in_first_stage=draw % 3 == 2,
        downsample_in_bottleneck=draw % 3 == 1,
        num_labels=int(rng.integers(3, 8)),
    )
    height, width = [(32, 24), (31, 33), (64, 40)][draw % 3]
    images = pixels(rng, 2, 3, height, width)
    return Drawn(config, {"pixel_values": images, "labels": rng.integers(0, config.num_labels, 2)}, None)


def pairs(rng: np.random.Generator, draw: int, vocab: int, end: int, config: Options) -> Arrays:
    """Three images and three captions of different lengths, padded with the end's id in draw 1, else with 0."""
    rows = [np.append(words(rng, vocab, n), end) for n in (10, 4, 6)]
    ids, mask = padded(rows, left=False)
    size = config["image_size"]
    inputs = {
        "input_ids": np.where(mask, ids, end) if draw % 3 == 1 else ids,
        "pixel_values": pixels(rng, 3, 3, size, size),
        "return_loss": np.True_,
    }
    if draw % 3 == 2:  # another size than that of the position table, not square
        inputs |= {"pixel_values": pixels(rng, 3, 3, 3 * size // 2, size), "interpolate_pos_encoding": np.True_}
    return inputs | ({"attention_mask": mask} if draw % 3 == 1 else {})


def captions(rng: np.random.Generator, draw: int) -> Options:
    """The options of a text tower that is not the vision tower's twin."""
    options = tower(rng, draw + 1, 0, 0) | {
        "vocab_size": int(rng.integers(60, 80)),
        "max_position_embeddings": [11, 12, 16][draw % 3],
        "layer_norm_eps": [1e-3, 1e-12, 1e-5][draw % 3],
        "hidden_act": ["quick_gelu", "gelu", "gelu_pytorch_tanh"][draw % 3],
    }
    return {name: value for name, value in options.items() if name not in ("image_size", "patch_size")}


def clip(rng: np.random.Generator, draw: int) -> Drawn:
    """CLIP: the caption's end is the largest id where eos_token_id is 2 (draw 0), else the first eos_token_id."""
    vision, text = tower(rng, draw, [16, 24, 16][draw % 3], [8, 8, 4][draw % 3]), captions(rng, draw)
    end = text["vocab_size"] - [1, 2, 3][draw % 3]
    text |= {"eos_token_id": 2 if draw % 3 == 0 else end, "bos_token_id": 0, "pad_token_id": 1}
    config = transformers.CLIPConfig(
        vision_config=vision,
        text_config=text,
        projection_dim=[12, 16, 20][draw % 3],
        logit_scale_init_value=[2.0, 1.0, 2.6592][draw % 3],
    )
    return Drawn(config, pairs(rng, draw, text["vocab_size"], end, vision), None)


def siglip(rng: np.random.Generator, draw: int) -> Drawn:
    """SigLIP; the text is projected from a width of its own, and sees its padding but in draw 1."""
    vision, text = tower(rng, draw, [16, 24, 16][draw % 3], [8, 8, 4][draw % 3]), captions(rng, draw)
    text |= {"projection_size": vision["hidden_size"], "bos_token_id": 1, "eos_token_id": 1}
    config = transformers.SiglipConfig(vision_config=vision, text_config=text)
    return Drawn(config, pairs(rng, draw, text["vocab_size"], 1, vision), None)

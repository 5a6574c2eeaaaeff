"""LLaVA 1.5 (arXiv:2310.03744): CLIP's patches through two matrices into Llama, among its tokens."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from model.config import ModelConfig
from model.families import llama, multimodal
from model.families.mapping import Family
from model.families.multimodal import language_model
from model.families.options import ACTIVATIONS, choice, filled, get, only, word
from model.families.towers import IDLE, images, read_clip, write_tower
from tpu.errors import UserError

TABLE = (
    language_model(llama.TABLE)
    | images("vision_tower")
    | {
        "vision.connector.up": "multi_modal_projector.linear_1",
        "vision.connector.out": "multi_modal_projector.linear_2",
    }
)
TEXTS = {  # what transformers takes for options that are missing
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}


def read(config: dict[str, Any]) -> ModelConfig:
    """config.json -> ModelConfig."""
    text, seen = filled(get(config, "text_config", dict), TEXTS), get(config, "vision_config", dict)
    only(config, quantization_config=None)
    only(text, model_type="llama")
    only(seen, model_type="clip_vision_model")
    tied = get(config, "tie_word_embeddings", bool, False) or get(text, "tie_word_embeddings", bool, False)
    token = multimodal.image_token(config, 32_000)
    strategy = choice(config, "vision_feature_select_strategy", {"default": "", "full": "class"}, "default")
    vision = read_clip(
        seen,
        connector="mlp",
        connector_bias=get(config, "multimodal_projector_bias", bool, True),
        connector_activation=choice(config, "projector_hidden_act", ACTIVATIONS, "gelu"),
        keep_class=bool(strategy),
        image_token=token,
    )
    unused = _unused(get(config, "vision_feature_layer", int, -2), vision.layers)
    vision = dataclasses.replace(vision, unused_layers=unused, unused_norm=not unused)
    return dataclasses.replace(llama.read(text), tied_head=tied, fusion="merge", vision=vision).resolved()


def _unused(layer: int, layers: int) -> int:
    """How many of the last layers are not used for state number `layer`, of which 0 is what the first layer reads."""
    unused = -1 - layer if layer < 0 else layers - layer
    if not 0 <= unused < layers:
        raise UserError(f"config.json: vision_feature_layer={layer}: valid: {-layers} to -1, or 1 to {layers}")
    return unused


def write(model: ModelConfig) -> dict[str, Any]:
    """ModelConfig -> config.json."""
    vision = model.vision
    return multimodal.write_image_token(vision) | {
        "text_config": llama.write(model) | {"model_type": "llama"},
        "vision_config": write_tower(vision, "clip_vision_model"),
        "image_seq_length": vision.vectors,
        "projector_hidden_act": word(ACTIVATIONS, vision.connector_activation),
        "multimodal_projector_bias": vision.connector_bias,
        "vision_feature_layer": -1 - vision.unused_layers,
        "vision_feature_select_strategy": "full" if vision.keep_class else "default",
        "tie_word_embeddings": model.tied_head,
    }


FAMILY = Family(
    architectures=("LlavaForConditionalGeneration",),
    model_type="llava",
    paper="arXiv:2310.03744",
    table=TABLE,
    read=read,
    write=write,
    run=functools.partial(multimodal.run, flat=True),
    prefix="",
    ignored=rf"{IDLE}|.*\.rotary_emb\.inv_freq",
    renamed=multimodal.RENAMED,
    objective="conversation",
    image_processor="Llava",
)

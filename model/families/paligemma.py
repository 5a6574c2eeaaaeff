"""PaliGemma (arXiv:2407.07726): SigLIP's patches through one matrix into Gemma; images and prefix see each other.

Positions begin at 1 there. Rotary positions count from key to query alone, so here they begin at 0.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from model.config import ModelConfig
from model.families import gemma, llama, multimodal
from model.families.mapping import Family
from model.families.multimodal import language_model
from model.families.options import filled, get, only
from model.families.towers import IDLE, images, read_siglip, write_tower

TABLE = language_model(llama.TABLE) | images("vision_tower") | {"vision.connector.out": "multi_modal_projector.linear"}
TEXTS = {  # what transformers takes for options that are missing
    "vocab_size": 256_000,
    "hidden_size": 3072,
    "intermediate_size": 24_576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
}


def read(config: dict[str, Any]) -> ModelConfig:
    """config.json -> ModelConfig."""
    text, seen = filled(get(config, "text_config", dict), TEXTS), get(config, "vision_config", dict)
    only(text, model_type="gemma", use_bidirectional_attention=True)
    only(seen, model_type="siglip_vision_model", vision_use_head=False, projection_dim=text["hidden_size"])
    only(config, quantization_config=None, projection_dim=text["hidden_size"])
    tied = get(config, "tie_word_embeddings", bool, get(text, "tie_word_embeddings", bool, True))
    token = multimodal.image_token(config, 256_000)
    vision = read_siglip(seen, connector="linear", mask="prefix", image_token=token)
    return dataclasses.replace(gemma.read(text), tied_head=tied, fusion="merge", vision=vision).resolved()


def write(model: ModelConfig) -> dict[str, Any]:
    """ModelConfig -> config.json."""
    vision, width = model.vision, {"projection_dim": model.embed_dim}
    text = {"model_type": "gemma", "num_image_tokens": vision.vectors, "use_bidirectional_attention": True}
    return (
        multimodal.write_image_token(vision)
        | width
        | {
            "text_config": gemma.write(model) | text,
            "vision_config": write_tower(vision, "siglip_vision_model") | {"vision_use_head": False} | width,
            "hidden_size": model.embed_dim,
            "vocab_size": model.vocab_size,
            "tie_word_embeddings": model.tied_head,
        }
    )


FAMILY = Family(
    architectures=("PaliGemmaForConditionalGeneration",),
    model_type="paligemma",
    paper="arXiv:2407.07726",
    table=TABLE,
    read=read,
    write=write,
    run=multimodal.run,
    prefix="",
    ignored=rf"{IDLE}|.*\.rotary_emb\.inv_freq",
    renamed=multimodal.RENAMED,
    objective="conversation",
    image_processor="Siglip",
)

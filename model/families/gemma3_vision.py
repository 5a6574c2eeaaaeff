"""Gemma 3 with images (arXiv:2503.19786, section 2.1): SigLIP's patches, averaged by squares, normalised and through a
matrix, stand among the tokens of Gemma 3; those of an image see each other."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from model.config import ModelConfig
from model.families import gemma3, multimodal
from model.families.mapping import Family, Peer
from model.families.multimodal import language_model
from model.families.options import filled, get, only
from model.families.towers import IDLE, images, read_siglip, write_tower
from tpu.errors import UserError

log = logging.getLogger(__name__)

TABLE = (
    language_model(gemma3.TABLE)
    | images("vision_tower")
    | {
        "vision.connector.norm": "multi_modal_projector.mm_soft_emb_norm",
        "vision.connector.out.kernel": Peer("multi_modal_projector.mm_input_projection_weight", transposed=False),
    }
)
TEXTS = {  # what transformers takes for options that are missing
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


def read(config: dict[str, Any]) -> ModelConfig:
    """config.json -> ModelConfig."""
    text, seen = get(config, "text_config", dict), get(config, "vision_config", dict)
    # null is not missing: there is no window then.
    text = filled(text, TEXTS) | {name: None for name in ("sliding_window",) if name in text and text[name] is None}
    only(config, quantization_config=None)
    only(text, model_type="gemma3_text")
    only(seen, model_type="siglip_vision_model", vision_use_head=False)
    if text.pop("final_logit_softcapping", None):
        log.warning("config.json: final_logit_softcapping: left out, as transformers does in this architecture")
    tied = get(config, "tie_word_embeddings", bool, get(text, "tie_word_embeddings", bool, True))
    token = multimodal.image_token(config, 262_144)
    vision = read_siglip(seen, connector="average_pool", connector_bias=False, mask="images", image_token=token)
    side = _side(get(config, "mm_tokens_per_image", int, 256), vision.grid)
    vision = dataclasses.replace(vision, connector_factor=vision.grid // side, connector_eps=vision.norm_eps)
    return dataclasses.replace(gemma3.read(text), tied_head=tied, fusion="merge", vision=vision).resolved()


def _side(tokens: int, grid: int) -> int:
    """The tokens along a side of an image whose patches are `grid` there."""
    side = int(tokens**0.5)
    if tokens < 1 or side**2 != tokens or grid % side:
        raise UserError(
            f"config.json: mm_tokens_per_image={tokens}: must be a square whose side divides the {grid} patches of an "
            "image's side"
        )
    return side


def write(model: ModelConfig) -> dict[str, Any]:
    """ModelConfig -> config.json."""
    vision = model.vision
    side = max(1, vision.image_size // vision.patch_size // vision.connector_factor)
    return multimodal.write_image_token(vision) | {
        "text_config": gemma3.write(model) | {"model_type": "gemma3_text"},
        "vision_config": write_tower(vision, "siglip_vision_model") | {"vision_use_head": False},
        "mm_tokens_per_image": side**2,
        "tie_word_embeddings": model.tied_head,
        "initializer_range": model.init_std,
    }


FAMILY = Family(
    architectures=("Gemma3ForConditionalGeneration",),
    model_type="gemma3",
    paper="arXiv:2503.19786",
    table=TABLE,
    read=read,
    write=write,
    run=multimodal.run,
    prefix="",
    ignored=rf"{IDLE}|.*\.rotary_emb\.inv_freq",
    renamed=multimodal.RENAMED,
    objective="conversation",
    image_processor="Gemma3",
)

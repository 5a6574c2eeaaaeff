"""CLIP (arXiv:2103.00020): images and texts in one space, compared by softmax."""

from __future__ import annotations

from typing import Any

from model.config import ModelConfig
from model.families import pairs
from model.families.mapping import Family, Peer
from model.families.options import filled, get, only
from model.families.towers import CLIP, CLIP_TEXTS, IDLE, images, read_clip, read_texts, texts, write_texts, write_tower

TABLE = (
    images("vision_model")
    | texts("text_model")
    | {
        "text_projection": "text_projection",
        "image_projection": "visual_projection",
        "logit_scale": Peer("logit_scale", rank=0),
    }
)


def read(config: dict[str, Any]) -> ModelConfig:
    """config.json -> ModelConfig."""
    only(config, quantization_config=None)
    vision = read_clip(
        _section(config, "vision_config", CLIP), pool="class", projection_dim=get(config, "projection_dim", int, 512)
    )
    return read_texts(_section(config, "text_config", CLIP_TEXTS), vision)


def _section(config: dict[str, Any], name: str, defaults: dict[str, Any]) -> dict[str, Any]:
    """The options of a tower. Old files say them twice; those in `name`_dict count, and what is missing there too."""
    options, old = get(config, name, dict, {}), get(config, f"{name}_dict", dict, None)
    return filled(options, defaults) if old is None else options | filled(old, defaults)


def write(model: ModelConfig) -> dict[str, Any]:
    """ModelConfig -> config.json."""
    projection = {"projection_dim": model.vision.projection_dim}
    return projection | {
        "text_config": write_texts(model, "clip_text_model") | projection,
        "vision_config": write_tower(model.vision, "clip_vision_model") | projection,
    }


FAMILY = Family(
    architectures=("CLIPModel",),
    model_type="clip",
    paper="arXiv:2103.00020",
    table=TABLE,
    read=read,
    write=write,
    run=pairs.run,
    prefix="",
    ignored=IDLE,
    objective="contrastive",
    image_processor="CLIP",
)

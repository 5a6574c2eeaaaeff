"""SigLIP (arXiv:2303.15343): images and texts in one space, each pair judged on its own by a sigmoid."""

from __future__ import annotations

from typing import Any

from model.config import ModelConfig
from model.families import pairs
from model.families.mapping import Family, Peer
from model.families.options import filled, get, only
from model.families.towers import (
    IDLE,
    SIGLIP,
    SIGLIP_TEXTS,
    images,
    read_siglip,
    read_texts,
    texts,
    write_texts,
    write_tower,
)
from tpu.errors import UserError

HEAD = "vision_model.head"
TABLE = (
    images("vision_model")
    | texts("text_model")
    | {
        "text_projection": "text_model.head",
        "vision.map_pool.probe": Peer(f"{HEAD}.probe", rank=3),
        **{
            f"vision.map_pool.attention.{name}.{ours}": Peer(f"{HEAD}.attention.in_proj_{theirs}", part=i, parts=3)
            for i, name in enumerate(("query", "key", "value"))
            for ours, theirs in (("kernel", "weight"), ("bias", "bias"))
        },
        "vision.map_pool.attention.out": Peer(f"{HEAD}.attention.out_proj", inputs=2),
        "vision.map_pool.norm": f"{HEAD}.layernorm",
        "vision.map_pool.mlp.up": f"{HEAD}.mlp.fc1",
        "vision.map_pool.mlp.down": f"{HEAD}.mlp.fc2",
        "logit_scale": Peer("logit_scale", rank=1),
        "logit_bias": Peer("logit_bias", rank=1),
    }
)


def read(config: dict[str, Any]) -> ModelConfig:
    """config.json -> ModelConfig."""
    only(config, quantization_config=None)
    text = filled(get(config, "text_config", dict, {}), SIGLIP_TEXTS)
    seen = filled(get(config, "vision_config", dict, {}), SIGLIP)
    only(seen, vision_use_head=True)
    size = get(text, "projection_size", int, get(text, "hidden_size", int))
    if size != seen["hidden_size"]:
        raise UserError(
            f"config.json: text_config.projection_size={size}: must be vision_config.hidden_size={seen['hidden_size']}"
        )
    vision = read_siglip(seen, pool="map", similarity="sigmoid", text_pool="last", projection_dim=size)
    return read_texts(text, vision, kind="encoder")


def write(model: ModelConfig) -> dict[str, Any]:
    """ModelConfig -> config.json."""
    size = {"projection_size": model.vision.projection_dim}
    return {
        "text_config": write_texts(model, "siglip_text_model") | size,
        "vision_config": write_tower(model.vision, "siglip_vision_model") | {"vision_use_head": True},
    }


FAMILY = Family(
    architectures=("SiglipModel",),
    model_type="siglip",
    paper="arXiv:2303.15343",
    table=TABLE,
    read=read,
    write=write,
    run=pairs.run,
    prefix="",
    ignored=IDLE,
    objective="contrastive",
    image_processor="Siglip",
)

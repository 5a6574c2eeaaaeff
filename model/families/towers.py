"""CLIP's and SigLIP's transformers of images and of texts, alone or in other models: tensors, options.

Both call their layers alike. CLIP (arXiv:2103.00020) puts a class token before the patches and a norm before the
layers; SigLIP (arXiv:2303.15343) has neither, and a bias on its patches.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from model.config import ModelConfig, VisionConfig
from model.families.mapping import Peer
from model.families.options import ACTIVATIONS, choice, filled, get, only, word

TOWER_ACTIVATIONS = ACTIVATIONS | {"quick_gelu": "quick_gelu"}
CLIP = {  # what transformers takes for options that are missing
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
CLIP_TEXTS = {
    "vocab_size": 49_408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49_407,
}
SIGLIP = CLIP | {"patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
SIGLIP_TEXTS = {
    "vocab_size": 32_000,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 64,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
IDLE = r".*embeddings\.position_ids"  # tensors that older files hold beside the weights


def blocks(ours: str, theirs: str) -> dict[str, str | Peer]:
    """The table of the layers of a stack."""
    ours, theirs = f"{ours}.groups.layer", f"{theirs}.encoder.layers.{{layer}}"
    return {
        f"{ours}.attention_norm": f"{theirs}.layer_norm1",
        f"{ours}.attention.query": f"{theirs}.self_attn.q_proj",
        f"{ours}.attention.key": f"{theirs}.self_attn.k_proj",
        f"{ours}.attention.value": f"{theirs}.self_attn.v_proj",
        f"{ours}.attention.out": Peer(f"{theirs}.self_attn.out_proj", inputs=2),
        f"{ours}.mlp_norm": f"{theirs}.layer_norm2",
        f"{ours}.mlp.up": f"{theirs}.mlp.fc1",
        f"{ours}.mlp.down": f"{theirs}.mlp.fc2",
    }


def images(theirs: str) -> dict[str, str | Peer]:
    """The table of a tower of images, without a head."""
    ours = "vision.encoder.vit"
    return blocks(f"{ours}.stack", theirs) | {
        f"{ours}.patch": Peer(f"{theirs}.embeddings.patch_embedding", convolution=True),
        f"{ours}.class_token": Peer(f"{theirs}.embeddings.class_embedding", rank=1),
        f"{ours}.position_embedding": f"{theirs}.embeddings.position_embedding.weight",
        f"{ours}.embedding_norm": f"{theirs}.pre_layrnorm",  # as transformers spells it
        f"{ours}.final_norm": f"{theirs}.post_layernorm",
    }


def texts(theirs: str) -> dict[str, str | Peer]:
    """The table of a tower of texts, without a head."""
    return blocks("stack", theirs) | {
        "embedding": f"{theirs}.embeddings.token_embedding",
        "position_embedding": f"{theirs}.embeddings.position_embedding",
        "final_norm": f"{theirs}.final_layer_norm",
    }


def read_clip(config: dict[str, Any], **fields: Any) -> VisionConfig:
    """CLIP's vision_config -> VisionConfig, with the `fields` of the model that it is part of."""
    clip = {"normalization": "clip", "class_token": True, "patch_bias": False, "embedding_norm": True}
    return VisionConfig(**_read_tower(filled(config, CLIP)), **clip, **fields)


def read_siglip(config: dict[str, Any], **fields: Any) -> VisionConfig:
    """SigLIP's vision_config -> VisionConfig, with the `fields` of the model that it is part of."""
    return VisionConfig(**_read_tower(filled(config, SIGLIP)), normalization="half", **fields)


def _read_tower(config: dict[str, Any]) -> dict[str, Any]:
    only(config, attention_dropout=0.0, dropout=0.0)
    return {
        "encoder": "vit",
        "image_size": get(config, "image_size", int),
        "channels": get(config, "num_channels", int),
        "patch_size": get(config, "patch_size", int),
        "layers": get(config, "num_hidden_layers", int),
        "embed_dim": get(config, "hidden_size", int),
        "heads": get(config, "num_attention_heads", int),
        "mlp_dim": get(config, "intermediate_size", int),
        "activation": choice(config, "hidden_act", TOWER_ACTIVATIONS, "quick_gelu"),
        "norm_eps": get(config, "layer_norm_eps", float),
    }


def write_tower(vision: VisionConfig, model_type: str) -> dict[str, Any]:
    """VisionConfig -> the vision_config that CLIP and SigLIP share."""
    return {
        "model_type": model_type,
        "image_size": vision.image_size,
        "num_channels": vision.channels,
        "patch_size": vision.patch_size,
        "num_hidden_layers": vision.layers,
        "hidden_size": vision.embed_dim,
        "num_attention_heads": vision.heads,
        "intermediate_size": vision.mlp_dim,
        "hidden_act": word(TOWER_ACTIVATIONS, vision.activation),
        "layer_norm_eps": vision.norm_eps,
        "attention_dropout": 0.0,
    }


def read_texts(config: dict[str, Any], vision: VisionConfig, **fields: Any) -> ModelConfig:
    """The text_config of CLIP or SigLIP, no size of it missing -> ModelConfig with this `vision`, resolved."""
    only(config, dropout=0.0)
    return ModelConfig(
        vocab_size=get(config, "vocab_size", int),
        layers=get(config, "num_hidden_layers", int),
        embed_dim=get(config, "hidden_size", int),
        heads=get(config, "num_attention_heads", int),
        mlp_dim=get(config, "intermediate_size", int),
        activation=choice(config, "hidden_act", TOWER_ACTIVATIONS, "quick_gelu"),
        positions="learned",
        max_positions=get(config, "max_position_embeddings", int),
        norm_eps=get(config, "layer_norm_eps", float),
        attention_dropout=get(config, "attention_dropout", float, 0.0),
        init="normal",
        init_std=get(config, "initializer_range", float, 0.02),
        fusion="contrastive",
        vision=vision,
        **fields,
    ).resolved()


def write_texts(model: ModelConfig, model_type: str) -> dict[str, Any]:
    """The text_config that `read_texts` reads."""
    return {
        "model_type": model_type,
        "vocab_size": model.vocab_size,
        "num_hidden_layers": model.layers,
        "hidden_size": model.embed_dim,
        "num_attention_heads": model.heads,
        "intermediate_size": model.mlp_dim,
        "hidden_act": word(TOWER_ACTIVATIONS, model.activation),
        "max_position_embeddings": model.max_positions,
        "layer_norm_eps": model.norm_eps,
        "attention_dropout": model.attention_dropout,
        "initializer_range": model.init_std,
    }


def without_norm(model: ModelConfig) -> ModelConfig:
    """The same model, whose tower of images gives what its last layer does."""
    return dataclasses.replace(model, vision=dataclasses.replace(model.vision, unused_norm=True))

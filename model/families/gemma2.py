"""Gemma 2 (arXiv:2408.00118): norms before and after each branch, soft-caps, every second layer with a window."""

from __future__ import annotations

from typing import Any

from model.config import ModelConfig
from model.families import causal, llama
from model.families.mapping import Family
from model.families.options import (
    GATED_ACTIVATIONS,
    choice,
    get,
    only,
    read_decoder,
    read_kinds,
    word,
    write_decoder,
    write_kinds,
)
from model.families.rope_options import read_rope, write_rope

TABLE = llama.TABLE | {
    "stack.groups.layer.attention_out_norm": "model.layers.{layer}.post_attention_layernorm",
    "stack.groups.layer.mlp_norm": "model.layers.{layer}.pre_feedforward_layernorm",
    "stack.groups.layer.mlp_out_norm": "model.layers.{layer}.post_feedforward_layernorm",
}


def read(config: dict[str, Any]) -> ModelConfig:
    """config.json -> ModelConfig."""
    layers = get(config, "num_hidden_layers", int)
    types = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(layers)]
    cap = lambda name, default: get(config, name, float, 0.0 if name in config else default)  # noqa: E731
    return read_decoder(
        config,
        **read_gemma(config),
        pattern=read_kinds(config, types),
        max_positions=get(config, "max_position_embeddings", int, 8192),
        attention_softcap=cap("attn_logit_softcapping", 50.0),
        logits_softcap=cap("final_logit_softcapping", 30.0),
        **read_rope(config),
    ).resolved()


def read_gemma(config: dict[str, Any]) -> dict[str, Any]:
    """The fields that Gemma 2 and 3 share."""
    only(config, use_bidirectional_attention=False)
    name = "hidden_activation" if config.get("hidden_activation") else "hidden_act"
    return {
        "head_dim": get(config, "head_dim", int, 256),
        "activation": choice(config, name, GATED_ACTIVATIONS, "gelu_pytorch_tanh"),
        "norm_order": "sandwich",
        "norm_unit_offset": True,
        "scale_embedding": True,
        "query_scalar": get(config, "query_pre_attn_scalar", float, 256.0),
        "window": get(config, "sliding_window", int, 0 if "sliding_window" in config else 4096),
        "tied_head": get(config, "tie_word_embeddings", bool, True),
    }


def write(model: ModelConfig) -> dict[str, Any]:
    """ModelConfig -> config.json."""
    return write_gemma(model) | write_rope(model) | {"attn_logit_softcapping": model.attention_softcap or None}


def write_gemma(model: ModelConfig) -> dict[str, Any]:
    """What `read_gemma` reads, and what else Gemma 2 and 3 share."""
    scalar = model.query_scalar or model.head_dim
    return write_decoder(model) | {
        "hidden_activation": word(GATED_ACTIVATIONS, model.activation),
        "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
        "sliding_window": model.window or None,
        "layer_types": write_kinds(model),
        "final_logit_softcapping": model.logits_softcap or None,
    }


FAMILY = Family(
    architectures=("Gemma2ForCausalLM",),
    model_type="gemma2",
    paper="arXiv:2408.00118",
    table=TABLE,
    read=read,
    write=write,
    run=causal.run,
)

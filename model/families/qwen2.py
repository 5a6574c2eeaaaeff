"""Qwen2 (arXiv:2407.10671): Llama with biases on queries, keys and values, and windows in the upper layers if asked."""

from __future__ import annotations

from typing import Any

from model.config import ModelConfig
from model.families import causal, llama
from model.families.mapping import Family
from model.families.options import (
    GATED_ACTIVATIONS,
    choice,
    get,
    read_decoder,
    read_kinds,
    word,
    write_decoder,
    write_kinds,
)
from model.families.rope_options import read_rope, write_rope


def read(config: dict[str, Any]) -> ModelConfig:
    """config.json -> ModelConfig."""
    return read_decoder(
        config,
        attention_bias=True,
        attention_out_bias=False,
        **read_windows(config),
        max_positions=get(config, "max_position_embeddings", int, 32768),
        activation=choice(config, "hidden_act", GATED_ACTIVATIONS, "silu"),
        tied_head=get(config, "tie_word_embeddings", bool, False),
        **read_rope(config),
    ).resolved()


def read_windows(config: dict[str, Any]) -> dict[str, Any]:
    """Pattern and window of Qwen's models: layers from max_window_layers on slide where use_sliding_window says so."""
    window = get(config, "sliding_window", int, 0 if "sliding_window" in config else 4096)
    window = window if get(config, "use_sliding_window", bool, False) else 0
    first = get(config, "max_window_layers", int, 28)
    layers = get(config, "num_hidden_layers", int)
    types = ["sliding_attention" if window and layer >= first else "full_attention" for layer in range(layers)]
    return {"pattern": read_kinds(config, types), "window": window}


def write(model: ModelConfig) -> dict[str, Any]:
    """ModelConfig -> config.json."""
    options = write_decoder(model)
    del options["attention_bias"]
    return {
        **options,
        **write_rope(model),
        **write_windows(model),
        "hidden_act": word(GATED_ACTIVATIONS, model.activation),
    }


def write_windows(model: ModelConfig) -> dict[str, Any]:
    """What `read_windows` reads."""
    slides = "local" in model.pattern
    return {
        "use_sliding_window": slides,
        "sliding_window": model.window if slides else None,
        "max_window_layers": model.layers,
        "layer_types": write_kinds(model),
    }


FAMILY = Family(
    architectures=("Qwen2ForCausalLM",),
    model_type="qwen2",
    paper="arXiv:2407.10671",
    table=llama.TABLE,
    read=read,
    write=write,
    run=causal.run,
)

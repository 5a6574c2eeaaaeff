"""Qwen3 (arXiv:2505.09388): Llama with normalised queries and keys, and windows in the upper layers if asked."""

from __future__ import annotations

from typing import Any

from model.config import ModelConfig
from model.families import causal, llama
from model.families.mapping import Family
from model.families.options import GATED_ACTIVATIONS, choice, get, read_decoder, word, write_decoder
from model.families.qwen2 import read_windows, write_windows
from model.families.rope_options import read_rope, write_rope

TABLE = llama.TABLE | {
    "stack.groups.layer.attention.query_norm": "model.layers.{layer}.self_attn.q_norm",
    "stack.groups.layer.attention.key_norm": "model.layers.{layer}.self_attn.k_norm",
}


def read(config: dict[str, Any]) -> ModelConfig:
    """config.json -> ModelConfig."""
    return read_decoder(
        config,
        qk_norm=True,
        head_dim=get(config, "head_dim", int, 128),
        **read_windows(config),
        max_positions=get(config, "max_position_embeddings", int, 32768),
        activation=choice(config, "hidden_act", GATED_ACTIVATIONS, "silu"),
        tied_head=get(config, "tie_word_embeddings", bool, False),
        **read_rope(config),
    ).resolved()


def write(model: ModelConfig) -> dict[str, Any]:
    """ModelConfig -> config.json."""
    return {
        **write_decoder(model),
        **write_rope(model),
        **write_windows(model),
        "hidden_act": word(GATED_ACTIVATIONS, model.activation),
    }


FAMILY = Family(
    architectures=("Qwen3ForCausalLM",),
    model_type="qwen3",
    paper="arXiv:2505.09388",
    table=TABLE,
    read=read,
    write=write,
    run=causal.run,
)

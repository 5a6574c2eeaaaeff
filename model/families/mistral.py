"""Mistral 7B (arXiv:2310.06825): Llama with a sliding window in every layer."""

from __future__ import annotations

from typing import Any

from model.config import ModelConfig
from model.families import causal, llama
from model.families.mapping import Family
from model.families.options import GATED_ACTIVATIONS, choice, get, only, read_decoder, word, write_decoder
from model.families.rope_options import read_rope, write_rope


def read(config: dict[str, Any]) -> ModelConfig:
    """config.json -> ModelConfig."""
    only(config, attention_bias=False)
    # Absent is not null: the class then has a window of 4096.
    window = get(config, "sliding_window", int, 0 if "sliding_window" in config else 4096)
    return read_decoder(
        config,
        kv_heads=get(config, "num_key_value_heads", int, 8),
        max_positions=get(config, "max_position_embeddings", int, 4096 * 32),
        pattern=("local",) if window else ("global",),
        window=window,
        activation=choice(config, "hidden_act", GATED_ACTIVATIONS, "silu"),
        tied_head=get(config, "tie_word_embeddings", bool, False),
        **read_rope(config),
    ).resolved()


def write(model: ModelConfig) -> dict[str, Any]:
    """ModelConfig -> config.json."""
    options = write_decoder(model)
    del options["attention_bias"]
    return {
        **options,
        **write_rope(model),
        "hidden_act": word(GATED_ACTIVATIONS, model.activation),
        "sliding_window": model.window if "local" in model.pattern else None,
    }


FAMILY = Family(
    architectures=("MistralForCausalLM",),
    model_type="mistral",
    paper="arXiv:2310.06825",
    table=llama.TABLE,
    read=read,
    write=write,
    run=causal.run,
)

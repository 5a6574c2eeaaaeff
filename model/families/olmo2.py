"""OLMo 2 (arXiv:2501.00656): norms on the outputs of branches alone, queries and keys normalised over all heads."""

from __future__ import annotations

from typing import Any

from model.config import ModelConfig
from model.families import causal, qwen3
from model.families.mapping import Family
from model.families.options import GATED_ACTIVATIONS, choice, get, read_decoder, word, write_decoder
from model.families.rope_options import read_rope, write_rope

TABLE = {
    ours: theirs for ours, theirs in qwen3.TABLE.items() if not ours.endswith((".attention_norm", ".mlp_norm"))
} | {
    "stack.groups.layer.attention_out_norm": "model.layers.{layer}.post_attention_layernorm",
    "stack.groups.layer.mlp_out_norm": "model.layers.{layer}.post_feedforward_layernorm",
}


def read(config: dict[str, Any]) -> ModelConfig:
    """config.json -> ModelConfig."""
    return read_decoder(
        config,
        norm_order="reordered",
        norm_eps=get(config, "rms_norm_eps", float, 1e-5),
        qk_norm=True,
        qk_norm_over="projection",
        activation=choice(config, "hidden_act", GATED_ACTIVATIONS, "silu"),
        tied_head=get(config, "tie_word_embeddings", bool, False),
        **read_rope(config),
    ).resolved()


def write(model: ModelConfig) -> dict[str, Any]:
    """ModelConfig -> config.json."""
    return {
        **write_decoder(model),
        **write_rope(model),
        "hidden_act": word(GATED_ACTIVATIONS, model.activation),
    }


FAMILY = Family(
    architectures=("Olmo2ForCausalLM",),
    model_type="olmo2",
    paper="arXiv:2501.00656",
    table=TABLE,
    read=read,
    write=write,
    run=causal.run,
)

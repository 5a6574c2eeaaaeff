"""Llama 2 (arXiv:2307.09288) and Llama 3 (arXiv:2407.21783): rotary positions, RMSNorm, gated unit, grouped queries."""

from __future__ import annotations

from typing import Any

from model.config import ModelConfig
from model.families import causal
from model.families.mapping import Family, Peer
from model.families.options import GATED_ACTIVATIONS, choice, get, read_decoder, word, write_decoder
from model.families.rope_options import read_rope, write_rope

TABLE = {
    "embedding": "model.embed_tokens",
    "stack.groups.layer.attention_norm": "model.layers.{layer}.input_layernorm",
    "stack.groups.layer.attention.query": "model.layers.{layer}.self_attn.q_proj",
    "stack.groups.layer.attention.key": "model.layers.{layer}.self_attn.k_proj",
    "stack.groups.layer.attention.value": "model.layers.{layer}.self_attn.v_proj",
    "stack.groups.layer.attention.out": Peer("model.layers.{layer}.self_attn.o_proj", inputs=2),
    "stack.groups.layer.mlp_norm": "model.layers.{layer}.post_attention_layernorm",
    "stack.groups.layer.mlp.gate": "model.layers.{layer}.mlp.gate_proj",
    "stack.groups.layer.mlp.up": "model.layers.{layer}.mlp.up_proj",
    "stack.groups.layer.mlp.down": "model.layers.{layer}.mlp.down_proj",
    "final_norm": "model.norm",
    "head.linear": "lm_head",
}


def read(config: dict[str, Any]) -> ModelConfig:
    """config.json -> ModelConfig."""
    return read_decoder(
        config,
        activation=choice(config, "hidden_act", GATED_ACTIVATIONS, "silu"),
        mlp_bias=get(config, "mlp_bias", bool, False),
        tied_head=get(config, "tie_word_embeddings", bool, False),
        **read_rope(config),
    ).resolved()


def write(model: ModelConfig) -> dict[str, Any]:
    """ModelConfig -> config.json."""
    return {
        **write_decoder(model),
        **write_rope(model),
        "hidden_act": word(GATED_ACTIVATIONS, model.activation),
        "mlp_bias": model.mlp_bias,
    }


FAMILY = Family(
    architectures=("LlamaForCausalLM",),
    model_type="llama",
    paper="arXiv:2307.09288, arXiv:2407.21783",
    table=TABLE,
    read=read,
    write=write,
    run=causal.run,
)

"""Qwen3's mixtures of experts (arXiv:2505.09388): Qwen3 with a mixture in every layer, or in every n-th."""

from __future__ import annotations

from typing import Any

from model.config import ModelConfig
from model.families import causal, qwen3
from model.families.mapping import Family, Peer
from model.families.options import GATED_ACTIVATIONS, choice, get, only, read_decoder, word, write_decoder
from model.families.rope_options import read_rope, write_rope

EXPERT = "model.layers.{layer}.mlp.experts.{expert}"
TABLE = qwen3.TABLE | {
    "stack.groups.layer.moe.router": Peer("model.layers.{layer}.mlp.gate.weight"),
    "stack.groups.layer.moe.gate": f"{EXPERT}.gate_proj",
    "stack.groups.layer.moe.up": f"{EXPERT}.up_proj",
    "stack.groups.layer.moe.down": f"{EXPERT}.down_proj",
}


def read(config: dict[str, Any]) -> ModelConfig:
    """config.json -> ModelConfig."""
    only(config, mlp_only_layers=[])
    window = get(config, "sliding_window", int, 4096) if get(config, "use_sliding_window", bool, False) else 0
    return read_decoder(
        config,
        qk_norm=True,
        kv_heads=get(config, "num_key_value_heads", int, 4),
        max_positions=get(config, "max_position_embeddings", int, 32768),
        pattern=("local",) if window else ("global",),
        window=window,
        experts=get(config, "num_experts", int, get(config, "num_local_experts", int, 128)),
        experts_per_token=get(config, "num_experts_per_tok", int, 8),
        expert_dim=get(config, "moe_intermediate_size", int, 768),
        moe_every=get(config, "decoder_sparse_step", int, 1),
        router_renormalize=get(config, "norm_topk_prob", bool, False),
        activation=choice(config, "hidden_act", GATED_ACTIVATIONS, "silu"),
        tied_head=get(config, "tie_word_embeddings", bool, False),
        **read_rope(config),
    ).resolved()


def write(model: ModelConfig) -> dict[str, Any]:
    """ModelConfig -> config.json."""
    local = "local" in model.pattern
    return {
        **write_decoder(model),
        **write_rope(model),
        "num_experts": model.experts,
        "num_experts_per_tok": model.experts_per_token,
        "moe_intermediate_size": model.expert_dim,
        "decoder_sparse_step": model.moe_every,
        "norm_topk_prob": model.router_renormalize,
        "mlp_only_layers": [],
        "use_sliding_window": local,
        "sliding_window": model.window if local else None,
        "hidden_act": word(GATED_ACTIVATIONS, model.activation),
    }


FAMILY = Family(
    architectures=("Qwen3MoeForCausalLM",),
    model_type="qwen3_moe",
    paper="arXiv:2505.09388",
    table=TABLE,
    read=read,
    write=write,
    run=causal.run,
)

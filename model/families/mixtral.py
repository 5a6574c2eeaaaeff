"""Mixtral (arXiv:2401.04088): Mistral whose feed-forward blocks are mixtures of experts; a softmax over the chosen."""

from __future__ import annotations

from typing import Any

from model.config import ModelConfig
from model.families import causal, llama
from model.families.mapping import Family, Peer
from model.families.options import GATED_ACTIVATIONS, choice, get, only, read_decoder, word, write_decoder
from model.families.rope_options import read_rope, write_rope

EXPERT = "model.layers.{layer}.block_sparse_moe.experts.{expert}"
TABLE = {ours: theirs for ours, theirs in llama.TABLE.items() if ".mlp." not in ours} | {
    "stack.groups.layer.moe.router": Peer("model.layers.{layer}.block_sparse_moe.gate.weight"),
    "stack.groups.layer.moe.gate": f"{EXPERT}.w1",
    "stack.groups.layer.moe.up": f"{EXPERT}.w3",
    "stack.groups.layer.moe.down": f"{EXPERT}.w2",
}


def read(config: dict[str, Any]) -> ModelConfig:
    """config.json -> ModelConfig."""
    only(config, attention_bias=False, router_jitter_noise=0.0)
    window = get(config, "sliding_window", int, 0)
    return read_decoder(
        config,
        kv_heads=get(config, "num_key_value_heads", int, 8),
        max_positions=get(config, "max_position_embeddings", int, 4096 * 32),
        norm_eps=get(config, "rms_norm_eps", float, 1e-5),
        pattern=("local",) if window else ("global",),
        window=window,
        experts=get(config, "num_local_experts", int, 8),
        experts_per_token=get(config, "num_experts_per_tok", int, 2),
        activation=choice(config, "hidden_act", GATED_ACTIVATIONS, "silu"),
        tied_head=get(config, "tie_word_embeddings", bool, False),
        **read_rope(config, 1e6),
    ).resolved()


def write(model: ModelConfig) -> dict[str, Any]:
    """ModelConfig -> config.json."""
    options = write_decoder(model)
    del options["attention_bias"]
    return {
        **options,
        **write_rope(model),
        "intermediate_size": model.expert_dim,
        "num_local_experts": model.experts,
        "num_experts_per_tok": model.experts_per_token,
        "hidden_act": word(GATED_ACTIVATIONS, model.activation),
        "sliding_window": model.window if "local" in model.pattern else None,
    }


FAMILY = Family(
    architectures=("MixtralForCausalLM",),
    model_type="mixtral",
    paper="arXiv:2401.04088",
    table=TABLE,
    read=read,
    write=write,
    run=causal.run,
)

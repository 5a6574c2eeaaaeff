"""GPT-2 (Radford et al. 2019): learned positions, norms with bias before each branch, one matrix for q, k and v."""

from __future__ import annotations

from typing import Any

from model.config import ModelConfig
from model.families import causal
from model.families.mapping import Family, Peer
from model.families.options import ACTIVATIONS, choice, get, only, word

TABLE = {
    "embedding": "transformer.wte",
    "position_embedding": "transformer.wpe",
    "stack.groups.layer.attention_norm": "transformer.h.{layer}.ln_1",
    "stack.groups.layer.attention.query": Peer("transformer.h.{layer}.attn.c_attn", part=0, parts=3, transposed=False),
    "stack.groups.layer.attention.key": Peer("transformer.h.{layer}.attn.c_attn", part=1, parts=3, transposed=False),
    "stack.groups.layer.attention.value": Peer("transformer.h.{layer}.attn.c_attn", part=2, parts=3, transposed=False),
    "stack.groups.layer.attention.out": Peer("transformer.h.{layer}.attn.c_proj", inputs=2, transposed=False),
    "stack.groups.layer.mlp_norm": "transformer.h.{layer}.ln_2",
    "stack.groups.layer.mlp.up": Peer("transformer.h.{layer}.mlp.c_fc", transposed=False),
    "stack.groups.layer.mlp.down": Peer("transformer.h.{layer}.mlp.c_proj", transposed=False),
    "final_norm": "transformer.ln_f",
    "head.linear": "lm_head",
}


def read(config: dict[str, Any]) -> ModelConfig:
    """config.json -> ModelConfig."""
    only(config, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False, quantization_config=None)
    scaled = get(config, "scale_attn_weights", bool, True)
    return ModelConfig(
        vocab_size=get(config, "vocab_size", int, 50257),
        layers=get(config, "n_layer", int, 12),
        embed_dim=get(config, "n_embd", int, 768),
        heads=get(config, "n_head", int, 12),
        mlp_dim=get(config, "n_inner", int, 0),
        activation=choice(config, "activation_function", ACTIVATIONS, "gelu_new"),
        positions="learned",
        max_positions=get(config, "n_positions", int, 1024),
        query_scalar=0.0 if scaled else 1.0,
        norm_eps=get(config, "layer_norm_epsilon", float, 1e-5),
        tied_head=get(config, "tie_word_embeddings", bool, True),
        embedding_dropout=get(config, "embd_pdrop", float, 0.1),
        attention_dropout=get(config, "attn_pdrop", float, 0.1),
        residual_dropout=get(config, "resid_pdrop", float, 0.1),
        init_std=get(config, "initializer_range", float, 0.02),
    ).resolved()


def write(model: ModelConfig) -> dict[str, Any]:
    """ModelConfig -> config.json."""
    return {
        "vocab_size": model.vocab_size,
        "n_layer": model.layers,
        "n_embd": model.embed_dim,
        "n_head": model.heads,
        "n_inner": model.mlp_dim,
        "activation_function": word(ACTIVATIONS, model.activation),
        "n_positions": model.max_positions,
        "scale_attn_weights": model.query_scalar in (0.0, float(model.head_dim)),
        "layer_norm_epsilon": model.norm_eps,
        "tie_word_embeddings": model.tied_head,
        "embd_pdrop": model.embedding_dropout,
        "attn_pdrop": model.attention_dropout,
        "resid_pdrop": model.residual_dropout,
        "initializer_range": model.init_std,
    }


FAMILY = Family(
    architectures=("GPT2LMHeadModel",),
    model_type="gpt2",
    paper="Radford et al. 2019",
    table=TABLE,
    read=read,
    write=write,
    run=causal.run,
    prefix="transformer.",
    ignored=r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias",
)

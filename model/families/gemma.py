"""Gemma (arXiv:2403.08295): Llama with the tanh form of GELU, norms of 1 + w and embeddings times sqrt(embed_dim)."""

from __future__ import annotations

from typing import Any

from model.config import ModelConfig
from model.families.options import GATED_ACTIVATIONS, choice, get, only, read_decoder, word, write_decoder
from model.families.rope_options import read_rope, write_rope

# The first files say "gelu" and mean its tanh form.
ACTIVATIONS = {name: ours for name, ours in GATED_ACTIVATIONS.items() if name != "gelu"} | {"gelu": "geglu"}


def read(config: dict[str, Any]) -> ModelConfig:
    """config.json -> ModelConfig."""
    only(config, hidden_activation="gelu_pytorch_tanh", final_logit_softcapping=None)
    return read_decoder(
        config,
        head_dim=get(config, "head_dim", int, 256),
        max_positions=get(config, "max_position_embeddings", int, 8192),
        activation=choice(config, "hidden_act", ACTIVATIONS, "gelu_pytorch_tanh"),
        norm_unit_offset=True,
        scale_embedding=True,
        tied_head=get(config, "tie_word_embeddings", bool, True),
        **read_rope(config),
    ).resolved()


def write(model: ModelConfig) -> dict[str, Any]:
    """ModelConfig -> config.json."""
    return write_decoder(model) | write_rope(model) | {"hidden_act": word(ACTIVATIONS, model.activation)}

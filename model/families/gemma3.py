"""Gemma 3, text alone (arXiv:2503.19786): Gemma 2 without caps on scores, with normalised queries and keys and a
faster rotation in the layers with a window, of which there are five for each without."""

from __future__ import annotations

import logging
from typing import Any

from model.config import ModelConfig
from model.families import causal, gemma2, qwen3
from model.families.gemma2 import read_gemma, write_gemma
from model.families.mapping import Family
from model.families.options import get, only, read_decoder, read_kinds
from model.families.rope_options import read_parameters, write_parameters

log = logging.getLogger(__name__)

TABLE = qwen3.TABLE | gemma2.TABLE


def read(config: dict[str, Any]) -> ModelConfig:
    """config.json -> ModelConfig."""
    if config.get("attn_logit_softcapping"):
        log.warning("config.json: attn_logit_softcapping: left out, as transformers does in this architecture")
    layers, every = get(config, "num_hidden_layers", int), get(config, "sliding_window_pattern", int, 6)
    types = ["sliding_attention" if (layer + 1) % every else "full_attention" for layer in range(layers)]
    return read_decoder(
        config,
        **read_gemma(config),
        **_read_rope(config),
        qk_norm=True,
        pattern=read_kinds(config, types),
        max_positions=get(config, "max_position_embeddings", int, 131_072),
        logits_softcap=get(config, "final_logit_softcapping", float, 0.0),
    ).resolved()


def _read_rope(config: dict[str, Any]) -> dict[str, Any]:
    parameters = get(config, "rope_parameters", dict, {})
    of_all = {
        "rope_theta": get(config, "rope_theta", float, 1e6),
        **get(parameters, "full_attention", dict, {}),
        **get(config, "rope_scaling", dict, {}),
    }
    of_local = get(parameters, "sliding_attention", dict, {})
    only(of_local, rope_type="default")
    theta = get(of_local, "rope_theta", float, get(config, "rope_local_base_freq", float, 1e4))
    longest = {"max_position_embeddings": get(config, "max_position_embeddings", int, 131_072)}
    return read_parameters(longest, of_all) | {"rope_local_theta": theta}


def write(model: ModelConfig) -> dict[str, Any]:
    """ModelConfig -> config.json."""
    parameters, local = write_parameters(model), model.rope_local_theta or model.rope_theta
    scaling = {name: value for name, value in parameters.items() if name != "rope_theta"}
    return write_gemma(model) | {
        "rope_parameters": {
            "full_attention": parameters,
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
        "rope_theta": model.rope_theta,
        "rope_scaling": scaling if model.rope_scaling != "none" else None,
        "rope_local_base_freq": local,
    }


FAMILY = Family(
    architectures=("Gemma3ForCausalLM",),
    model_type="gemma3_text",
    paper="arXiv:2503.19786",
    table=TABLE,
    read=read,
    write=write,
    run=causal.run,
)

"""Rotary positions in config.json: `rope_parameters` (transformers 5), `rope_theta` and `rope_scaling` (before)."""

from __future__ import annotations

import math
from typing import Any

from model.config import ModelConfig
from model.families.options import get, only
from tpu.errors import UserError


def read_rope(config: dict[str, Any], default_theta: float = 10_000.0) -> dict[str, Any]:
    """The fields of ModelConfig that say how positions turn all layers alike."""
    parameters = {
        "rope_theta": get(config, "rope_theta", float, default_theta),
        **get(config, "rope_parameters", dict, {}),
        **get(config, "rope_scaling", dict, {}),
    }
    return read_parameters(config, parameters)


def read_parameters(config: dict[str, Any], parameters: dict[str, Any]) -> dict[str, Any]:
    """The fields of ModelConfig for one set of rope parameters. Raises UserError for a kind or option not known."""
    theta = get(parameters, "rope_theta", float)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    longest = get(config, "max_position_embeddings", int, 2048)
    fields: dict[str, Any] = {"rope_theta": theta}
    only(parameters, partial_rotary_factor=1.0)
    if kind == "default":
        return fields
    match kind:
        case "linear":
            fields |= {"rope_scaling": "linear"}
        case "dynamic":
            only(parameters, original_max_position_embeddings=longest)
            fields |= {"rope_scaling": "dynamic", "rope_original_context": longest}
        case "yarn":
            only(parameters, truncate=True)
            fields |= {
                "rope_scaling": "yarn",
                "rope_original_context": get(parameters, "original_max_position_embeddings", int, longest),
                "rope_slow": get(parameters, "beta_slow", float, 1.0) or 1.0,
                "rope_fast": get(parameters, "beta_fast", float, 32.0) or 32.0,
                "rope_attention_factor": _attention_factor(parameters),
            }
        case "llama3":
            fields |= {
                "rope_scaling": "llama3",
                "rope_original_context": get(parameters, "original_max_position_embeddings", int, longest),
                "rope_slow": get(parameters, "low_freq_factor", float),
                "rope_fast": get(parameters, "high_freq_factor", float),
            }
        case _:
            raise UserError(
                f"config.json: rope_type={kind!r} is not supported; valid: default, linear, dynamic, yarn, llama3"
            )
    fields["rope_factor"] = get(parameters, "factor", float)
    return fields


def _attention_factor(parameters: dict[str, Any]) -> float:
    """What yarn multiplies queries and keys by; 0 for what follows from the factor."""
    given = get(parameters, "attention_factor", float, 0.0)
    scales = [get(parameters, name, float, 0.0) for name in ("mscale", "mscale_all_dim")]
    if given or not all(scales):
        return given
    factor = get(parameters, "factor", float)
    first, last = (0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0 for scale in scales)
    return first / last


def write_rope(model: ModelConfig) -> dict[str, Any]:
    """The options that `read_rope` reads, in the words of both versions of transformers."""
    parameters = write_parameters(model)
    scaling = {name: value for name, value in parameters.items() if name != "rope_theta"}
    return {
        "rope_parameters": parameters,
        "rope_theta": model.rope_theta,
        "rope_scaling": scaling if model.rope_scaling != "none" else None,
    }


def write_parameters(model: ModelConfig) -> dict[str, Any]:
    """One set of rope parameters; of a scaling not known there, those without."""
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_theta}
    match model.rope_scaling:
        case "linear" | "dynamic":
            parameters |= {"rope_type": model.rope_scaling}
        case "yarn":
            parameters |= {
                "rope_type": "yarn",
                "original_max_position_embeddings": model.rope_original_context,
                "beta_slow": model.rope_slow,
                "beta_fast": model.rope_fast,
            }
            if model.rope_attention_factor:
                parameters["attention_factor"] = model.rope_attention_factor
        case "llama3":
            parameters |= {
                "rope_type": "llama3",
                "original_max_position_embeddings": model.rope_original_context,
                "low_freq_factor": model.rope_slow,
                "high_freq_factor": model.rope_fast,
            }
        case _:
            return parameters
    return parameters | {"factor": model.rope_factor}

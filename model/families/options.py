"""The options of config.json that several families share, read and written.

A family's `read` names every option that it understands. An option that has one value here, whatever it could have
elsewhere, is checked by `only`; a value that is missing is what transformers takes for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from model.config import ModelConfig
from tpu.errors import UserError

MISSING = object()
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
GATED_ACTIVATIONS = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu": "geglu_erf",
    "gelu_pytorch_tanh": "geglu",
    "gelu_new": "geglu",
    "relu": "reglu",
}
KINDS = {"full_attention": "global", "sliding_attention": "local"}


def get(config: dict[str, Any], name: str, kind: type | tuple[type, ...], default: Any = MISSING) -> Any:
    """The option `name`, of the type `kind`; null is as good as none. Raises UserError where there is none, or another.

    An integer will do for a float.
    """
    value = config.get(name)
    if value is None:
        if default is MISSING:
            raise UserError(f"config.json: {name} is missing")
        return default
    if kind is float and type(value) is int:
        value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        names = kind.__name__ if isinstance(kind, type) else " or ".join(k.__name__ for k in kind)
        raise UserError(f"config.json: {name}={value!r}: must be of type {names}")
    return value


def filled(options: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The options, and those of `defaults` that are missing or null there."""
    return defaults | {name: value for name, value in options.items() if value is not None}


def only(config: dict[str, Any], **options: Any) -> None:
    """Raises UserError for the first option that is there and has another value than this one (or null)."""
    for name, value in options.items():
        if config.get(name) not in (None, value):
            raise UserError(f"config.json: {name}={config[name]!r} is not supported; valid: {value!r}")


def choice(config: dict[str, Any], name: str, known: dict[str, str], default: str) -> str:
    """Our word for the value of option `name`. Raises UserError, listing those known, for any other."""
    value = get(config, name, str, default)
    if value not in known:
        raise UserError(f"config.json: {name}={value!r} is not supported; valid: {', '.join(known)}")
    return known[value]


def word(known: dict[str, str], ours: str) -> str:
    """The first of their words for ours; where there is none, any: that it means something else is found when read."""
    return next((theirs for theirs, meaning in known.items() if meaning == ours), next(iter(known)))


def shortest_pattern(kinds: Sequence[str]) -> tuple[str, ...]:
    """The shortest run of kinds whose repetition they are; at worst all of them."""
    kinds = tuple(kinds)
    for size in range(1, len(kinds) + 1):
        if len(kinds) % size == 0 and kinds[:size] * (len(kinds) // size) == kinds:
            return kinds[:size]
    raise UserError("config.json: a model without layers")


def kinds(model: ModelConfig) -> tuple[str, ...]:
    """The kind of every layer."""
    return model.pattern * (model.layers // len(model.pattern))


def read_kinds(config: dict[str, Any], default: Sequence[str]) -> tuple[str, ...]:
    """The pattern that layer_types spell, or these."""
    layers = get(config, "num_hidden_layers", int)
    types = get(config, "layer_types", list, default)
    if len(types) != layers or not set(types) <= set(KINDS):
        raise UserError(f"config.json: layer_types={types!r:.120}: needs {layers} of {', '.join(KINDS)}")
    return shortest_pattern([KINDS[kind] for kind in types])


def write_kinds(model: ModelConfig) -> list[str]:
    """layer_types."""
    theirs = {ours: name for name, ours in KINDS.items()}
    return [theirs[kind] for kind in kinds(model)]


def read_decoder(config: dict[str, Any], **fields: Any) -> ModelConfig:
    """What Llama's successors have in common; `fields` are a family's own. Not yet resolved."""
    only(config, quantization_config=None, partial_rotary_factor=1.0)
    heads = get(config, "num_attention_heads", int)
    return ModelConfig(
        **{
            "vocab_size": get(config, "vocab_size", int),
            "layers": get(config, "num_hidden_layers", int),
            "embed_dim": get(config, "hidden_size", int),
            "heads": heads,
            "kv_heads": get(config, "num_key_value_heads", int, heads),
            "head_dim": get(config, "head_dim", int, 0),
            "mlp_dim": get(config, "intermediate_size", int),
            "max_positions": get(config, "max_position_embeddings", int, 2048),
            "positions": "rope",
            "norm": "rmsnorm",
            "norm_eps": get(config, "rms_norm_eps", float, 1e-6),
            "attention_bias": get(config, "attention_bias", bool, False),
            "mlp_bias": False,
            "attention_dropout": get(config, "attention_dropout", float, 0.0),
            "init": "normal",
            "init_std": get(config, "initializer_range", float, 0.02),
        }
        | fields
    )


def write_decoder(model: ModelConfig) -> dict[str, Any]:
    """The options that `read_decoder` reads, and that of a tied head."""
    return {
        "vocab_size": model.vocab_size,
        "num_hidden_layers": model.layers,
        "hidden_size": model.embed_dim,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "intermediate_size": model.mlp_dim,
        "max_position_embeddings": model.max_positions,
        "rms_norm_eps": model.norm_eps,
        "attention_bias": model.attention_bias,
        "attention_dropout": model.attention_dropout,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tied_head,
    }

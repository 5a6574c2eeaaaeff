"""LoRA and DoRA in the layout of Hugging Face PEFT: adapter_config.json and adapter_model.safetensors.

PEFT keeps A as [R, I] and B as [O, R] per layer, under the names that `transformers` has for the model's modules:
GPT-2's where positions are learned, else Llama's (Mistral, Qwen and Gemma have the same). GPT-2 has one matrix for
queries, keys and values; its factors are theirs side by side, with three times the rank.

Legend: I inputs, O outputs, R rank, L layers.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from model.config import ModelConfig
from model.safetensors import whole_directory
from model.weights import dense
from tpu.errors import UserError
from train.adapter.weights import lora_scale, parts
from train.config import AdapterConfig

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"

# A module of theirs: what of ours it holds, side by side along the outputs.
LLAMA = {
    "self_attn.q_proj": ("attention.query",),
    "self_attn.k_proj": ("attention.key",),
    "self_attn.v_proj": ("attention.value",),
    "self_attn.o_proj": ("attention.out",),
    "mlp.gate_proj": ("mlp.gate",),
    "mlp.up_proj": ("mlp.up",),
    "mlp.down_proj": ("mlp.down",),
}
GPT2 = {
    "attn.c_attn": ("attention.query", "attention.key", "attention.value"),
    "attn.c_proj": ("attention.out",),
    "mlp.c_fc": ("mlp.up",),
    "mlp.c_proj": ("mlp.down",),
}
# What of their configuration changes nothing of what is computed.
IGNORED = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision",
    "task_type", "exclude_modules", "layers_to_transform", "layers_pattern", "qalora_group_size", "megatron_config",
    "megatron_core", "eva_config", "runtime_config", "ensure_weight_tying",
    "velora_config", "monteclora_config",
}  # fmt: skip
READ = {"peft_type", "target_modules", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"}
READ |= {"fan_in_fan_out", "bias", "lora_dropout", "init_lora_weights"}
# Beginnings that leave the base as it is; others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) take from it what they put into
# the factors, and PEFT does so again whenever it loads such an adapter.
PLAIN_BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal")


def names(config: ModelConfig) -> tuple[str, dict[str, tuple[str, ...]]]:
    """What PEFT puts before a layer's number, and the modules of a layer. Raises UserError for what it has not so."""
    if config.kind != "decoder":
        raise UserError(f"model.kind={config.kind!r}: only adapters of decoders have a form in PEFT here")
    if config.share_layers != "none":
        raise UserError(
            f"model.share_layers={config.share_layers!r}: PEFT knows no layers that share weights; nothing was written"
        )
    if config.positions == "learned":
        return "base_model.model.transformer.h", GPT2
    return "base_model.model.model.layers", LLAMA


def export(path: Path, adapter: AdapterConfig, config: ModelConfig, trained: Any, base: Any, base_path: str) -> None:
    """Writes an adapter as the directory `path`, which must not exist or be empty.

    Args:
      trained, base: nested dictionaries of arrays; of the base DoRA needs the lengths of the columns.
    Raises UserError for a kind of adapter that PEFT does not have in this form.
    """
    if adapter.kind not in ("lora", "dora"):
        raise UserError(f"adapter.kind={adapter.kind!r}: only 'lora' and 'dora' have a form in PEFT")
    before, modules = names(config)
    found, old = flatten_dict(_numpy(trained), sep="."), flatten_dict(_numpy(base), sep=".")
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    written: set[str] = set()
    for layer, where, at in _layers(config):
        for module, members in modules.items():
            kernels = {member: f"{where}.{member}.kernel" for member in members}
            adapted = [member for member in members if f"{kernels[member]}.lora_a" in found]
            if not adapted:
                continue
            written |= {kernels[member] for member in adapted}
            ranks[module] = adapter.rank * len(adapted)
            pairs = {m: [found[f"{kernels[m]}.{name}"][at] for name in ("lora_a", "lora_b")] for m in adapted}
            a = np.concatenate([a.reshape(-1, adapter.rank).T for a, _ in pairs.values()])  # [R, I]
            b = np.zeros((sum(_outputs(config, m) for m in members), len(a)), np.float32)  # [O, R]
            row = 0
            for member in members:
                if member in adapted:
                    column = adapted.index(member) * adapter.rank
                    part = pairs[member][1].reshape(adapter.rank, -1).T
                    b[row : row + len(part), column : column + adapter.rank] = part
                row += _outputs(config, member)
            name = f"{before}.{layer}.{module}"
            tensors |= {f"{name}.lora_A.weight": np.ascontiguousarray(a), f"{name}.lora_B.weight": b}
            if adapter.kind == "dora":
                lengths = {m: _lengths(old[kernels[m]][at], _outputs(config, m)) for m in members}
                for member in adapted:
                    lengths[member] = lengths[member] + found[f"{kernels[member]}.magnitude"][at].reshape(-1)
                tensors[f"{name}.lora_magnitude_vector"] = np.concatenate(list(lengths.values()))
    if left := sorted({name.rpartition(".")[0] for name in found} - written):
        raise UserError(f"{left[0].removesuffix('.kernel')}: has no place in PEFT's layout; nothing was written")
    # The scale of a rank n times as large is kept by an alpha that grows as the rank does, or its square root.
    more = {module: rank // adapter.rank for module, rank in ranks.items() if rank != adapter.rank}
    description = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_path,
        "inference_mode": True,
        "target_modules": sorted(ranks),
        "r": adapter.rank,
        "lora_alpha": _number(adapter.alpha),
        "rank_pattern": {re.escape(module): ranks[module] for module in more},
        "alpha_pattern": {
            re.escape(module): _number(adapter.alpha * (math.sqrt(times) if adapter.rslora else times))
            for module, times in more.items()
        },
        "use_rslora": adapter.rslora,
        "use_dora": adapter.kind == "dora",
        "lora_dropout": adapter.dropout,
        "fan_in_fan_out": modules is GPT2,
        "bias": "none",
    }
    with whole_directory(path) as made:
        save_file(tensors, made / TENSORS, metadata={"format": "pt"})
        (made / CONFIG).write_text(json.dumps(description, indent=1), encoding="utf-8")


def load(path: Path, config: ModelConfig, base: Any) -> tuple[AdapterConfig, Any]:
    """The adapter of a directory that PEFT wrote for a model of this `placed` config, and its trained weights.

    Where modules differ in rank or scale, all get the largest rank and one scale; the product of the factors stays.
    Raises UserError for what is missing, is left over, has another shape or is not supported, naming it.
    """
    description, tensors, old = _description(path), _tensors(path), flatten_dict(base, sep=".")
    before, modules = names(config)
    ranks = {
        name.removesuffix(".lora_A.weight"): len(a) for name, a in tensors.items() if name.endswith(".lora_A.weight")
    }
    adapter = AdapterConfig(
        kind="dora" if description.get("use_dora") else "lora",
        rank=max(ranks.values(), default=0),
        alpha=float(description["lora_alpha"]),
        rslora=bool(description.get("use_rslora")),
        dropout=float(description.get("lora_dropout", 0.0)),
    )
    layers = list(_layers(config))
    known = {f"{before}.{layer}.{m}": (where, at, m) for layer, where, at in layers for m in modules}
    if unknown := sorted(set(ranks) - set(known)):
        raise UserError(f"{path / TENSORS}: {unknown[0]}: the base has no such module; it has {', '.join(modules)}")
    targets = {f"{known[name][0]}.{member}" for name in ranks for member in modules[known[name][2]]}
    if not targets:
        raise UserError(f"{path / TENSORS}: holds no factors of LoRA")
    adapter.targets = tuple(f"^{re.escape(target)}$" for target in sorted(targets))
    wanted = parts(adapter, config)
    new = {name: np.zeros(leaf.shape, np.float32) for name, leaf in flatten_dict(wanted.trained, sep=".").items()}
    left = set(tensors)
    for name, (where, at, module) in known.items():
        if name not in ranks:
            if adapter.kind == "dora" and any(f"{where}.{m}" in targets for m in modules[module]):
                raise UserError(f"{path / TENSORS}: {name}.lora_magnitude_vector is missing")
            continue
        scale = _scale(description, name, ranks[name]) / lora_scale(adapter)
        kinds = ["lora_A.weight", "lora_B.weight", *(["lora_magnitude_vector"] if adapter.kind == "dora" else [])]
        a, b, *lengths = (_taken(tensors, f"{name}.{kind}", path, left) for kind in kinds)
        widths = [_outputs(config, member) for member in modules[module]]
        for member, first in zip(modules[module], np.cumsum([0, *widths]), strict=False):
            kernel = f"{where}.{member}.kernel"
            rows = slice(first, first + _outputs(config, member))
            lora_a, lora_b = new[f"{kernel}.lora_a"], new[f"{kernel}.lora_b"]
            inputs = math.prod(lora_a[at].shape[:-1])
            shapes = {"lora_A.weight": (ranks[name], inputs), "lora_B.weight": (sum(widths), ranks[name])}
            shapes["lora_magnitude_vector"] = (sum(widths),)
            for kind, array in zip(kinds, (a, b, *lengths), strict=True):
                if array.shape != shapes[kind]:
                    needed = f"the base needs {list(shapes[kind])}"
                    raise UserError(f"{path / TENSORS}: {name}.{kind} is {list(array.shape)}, and {needed}")
            lora_a[at].reshape(inputs, -1)[:, : ranks[name]] = a.T
            lora_b[at].reshape(adapter.rank, -1)[: ranks[name]] = (b[rows] * np.float32(scale)).T
            if lengths:
                magnitude = new[f"{kernel}.magnitude"]
                change = lengths[0][rows] - _lengths(np.asarray(dense(old[kernel])[at]), len(lengths[0][rows]))
                magnitude[at] = change.reshape(magnitude[at].shape)
    if left:
        raise UserError(f"{path / TENSORS}: not supported: {', '.join(sorted(left)[:5])}")
    return adapter, unflatten_dict(new, sep=".")


def _layers(config: ModelConfig) -> list[tuple[int, str, Any]]:
    """For each layer its number, the path of its group of layers, and its place in the stacked weights."""
    per_group = len(config.pattern)
    places = np.arange(config.layers // per_group)
    if config.pipeline_repeats > 1:
        places = np.stack(
            np.unravel_index(places, (config.pipeline_repeats, len(places) // config.pipeline_repeats)), 1
        )
    return [
        (layer, f"stack.groups.layer_{layer % per_group}", tuple(np.atleast_1d(places[layer // per_group]).tolist()))
        for layer in range(config.layers)
    ]


def _lengths(kernel: np.ndarray, outputs: int) -> np.ndarray:
    """The length over the inputs of each column of a matrix [I, O]."""
    return np.linalg.norm(kernel.astype(np.float32).reshape(-1, outputs), axis=0)


def _outputs(config: ModelConfig, member: str) -> int:
    heads = {"attention.query": config.heads, "attention.key": config.kv_heads, "attention.value": config.kv_heads}
    if member in heads:
        return heads[member] * config.head_dim
    return config.mlp_dim if member in ("mlp.gate", "mlp.up") else config.embed_dim


def _numpy(tree: Any) -> Any:
    return {k: _numpy(v) if isinstance(v, dict) else np.asarray(dense(v)) for k, v in tree.items()}


def _number(value: float) -> float | int:
    return int(value) if value == int(value) else value


def _description(path: Path) -> dict[str, Any]:
    file = path / CONFIG
    try:
        found = json.loads(file.read_bytes())
        kind = found["peft_type"]
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; give a directory that PEFT wrote") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not the configuration of an adapter") from error
    if kind != "LORA":
        raise UserError(f"{file}: peft_type={kind!r}: not supported; valid: 'LORA'")
    if found.get("bias", "none") != "none":
        raise UserError(f"{file}: bias={found['bias']!r}: not supported; valid: 'none'")
    if (beginning := found.get("init_lora_weights")) not in PLAIN_BEGINNINGS:
        raise UserError(
            f"{file}: init_lora_weights={beginning!r}: changes the weights of the base, so its factors mean nothing "
            "without that; save the adapter from PEFT with path_initial_model_for_weight_conversion, or merged"
        )
    for name in sorted(set(found) - IGNORED - READ):
        if found[name]:
            raise UserError(f"{file}: {name}={found[name]!r}: not supported")
    return found


def _tensors(path: Path) -> dict[str, np.ndarray]:
    try:
        return {name: np.asarray(array, np.float32) for name, array in load_file(path / TENSORS).items()}
    except OSError as error:
        raise UserError(f"{path / TENSORS}: {error.strerror or error}; give a directory that PEFT wrote") from error
    except (SafetensorError, TypeError, KeyError, ValueError) as error:
        raise UserError(f"{path / TENSORS}: cannot be read: {error}") from error


def _scale(description: dict[str, Any], module: str, rank: int) -> float:
    """What PEFT multiplies the product of a module's factors by."""
    patterns = description.get("alpha_pattern") or {}
    found = (alpha for pattern, alpha in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module))
    alpha = next(found, description["lora_alpha"])
    return alpha / (math.sqrt(rank) if description.get("use_rslora") else rank)


def _taken(tensors: dict[str, np.ndarray], name: str, path: Path, left: set[str]) -> np.ndarray:
    if name not in tensors:
        raise UserError(f"{path / TENSORS}: {name} is missing")
    left.discard(name)
    return tensors[name]

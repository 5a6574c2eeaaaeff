"""All families, and which of them a directory or a model belongs to."""

from __future__ import annotations

import dataclasses
from typing import Any

from model.config import ModelConfig
from model.families import (
    bert,
    clip,
    gemma2,
    gemma3,
    gemma3_vision,
    gpt2,
    idefics,
    llama,
    llava,
    mistral,
    mixtral,
    olmo2,
    paligemma,
    qwen2,
    qwen2_vl,
    qwen3,
    qwen3_moe,
    resnet,
    siglip,
    t5,
    vit,
)
from model.families.mapping import Family
from model.families.options import kinds
from model.fields.limits import marked
from tpu.errors import UserError

FAMILIES = tuple(m.FAMILY for m in (gpt2, llama, mistral, qwen2, qwen3, gemma2, gemma3, olmo2, mixtral, qwen3_moe))
FAMILIES += bert.FAMILIES + t5.FAMILIES + tuple(m.FAMILY for m in (clip, siglip, llava, paligemma, gemma3_vision))
FAMILIES += (vit.FAMILY, resnet.FAMILY, *idefics.FAMILIES, qwen2_vl.FAMILY)

# Fields that say how a model is computed, trained or started, and not what it is.
FREE = (*marked(ModelConfig, "free"), "capacity_factor", "init", "init_std", "weight_dtype", "pipeline_repeats")


def family_of(config: Any) -> Family:
    """The family that a config.json names. Raises UserError, listing those known, for any other."""
    if not isinstance(config, dict):
        raise UserError("config.json: not a JSON object")
    names = config.get("architectures") or [config.get("model_type")]
    for family in FAMILIES:
        if names[:1] in ([family.model_type], *([name] for name in family.architectures)) and family.fits(config):
            return family
    known = ", ".join(dict.fromkeys(family.architectures[0] for family in FAMILIES))
    raise UserError(f"config.json: architecture {names[0]!r} is not known; known: {known}")


def named(name: str) -> tuple[Family, ...]:
    """The families of this model_type or architecture. Raises UserError, listing those known, where there is none."""
    found = tuple(family for family in FAMILIES if name in (family.model_type, *family.architectures))
    if not found:
        known = dict.fromkeys(name for family in FAMILIES for name in (family.model_type, *family.architectures))
        raise UserError(f"family {name!r} is not known; known: {', '.join(known)}")
    return found


def describe(family: Family, model: ModelConfig) -> dict[str, Any]:
    """config.json of a resolved model. Raises UserError naming the fields that the family cannot express."""
    options = family.write(model) | {"architectures": [family.architectures[0]], "model_type": family.model_type}
    if lost := _lost(family, model, options):
        raise UserError(f"{family.architectures[0]} cannot express this model: {'; '.join(lost)}")
    return options


def that_can_express(model: ModelConfig, families: tuple[Family, ...] = FAMILIES) -> Family:
    """The first of the families that can. Raises UserError saying what the nearest one lacks."""
    lost = []
    for family in families:
        options = family.write(model)
        lost.append(_lost(family, model, options))
        if not lost[-1] and family.fits(options):
            return family
    nearest = min(zip(lost, families, strict=True), key=lambda pair: len(pair[0]))[1]
    describe(nearest, model)
    raise UserError(f"no known architecture can express this model; the nearest is {nearest.model_type}")


def _lost(family: Family, model: ModelConfig, options: dict[str, Any]) -> list[str]:
    """What of a model is another when read from `options`."""
    try:
        told, wanted = _bare(family.read(options)), _bare(model)
    except UserError as error:
        return [str(error)]
    lost = [name for name, value in wanted.items() if told[name] != value]
    # What makes a difference in one of them alone follows from something else that is another.
    lost = [name for name in lost if None not in (told[name], wanted[name])] or lost
    return [f"model.{name}={wanted[name]!r} would become {told[name]!r}" for name in lost]


def _bare(model: ModelConfig) -> dict[str, Any]:
    """What a model is, field by field, with everything that makes no difference left out."""
    left_out = (*FREE, "vision")
    fields = {f.name: getattr(model, f.name) for f in dataclasses.fields(model) if f.name not in left_out}
    fields["pattern"] = kinds(model)
    fields["query_scalar"] = model.query_scalar or float(model.head_dim)
    without_effect = {
        "window": "local" not in model.pattern,
        "rope_local_theta": "local" not in model.pattern,
        "norm_bias": model.norm != "layernorm",
        "attention_out_bias": not model.attention_bias,
        "qk_norm_over": not model.qk_norm,
        "max_positions": model.positions != "learned",
        "relative_buckets": model.positions != "relative",
        "relative_distance": model.positions != "relative",
        "mlp_dim": model.experts > 0 and model.moe_every == 1,
    }
    of_experts = ("experts_per_token", "moe_every", "router", "router_renormalize", "router_scale")
    without_effect |= dict.fromkeys(of_experts, not model.experts)
    without_effect |= {
        f"rope_{f}": model.positions != "rope" for f in ("theta", "interleaved", "scaling", "local_theta")
    }
    unscaled = model.positions != "rope" or model.rope_scaling == "none"
    without_effect |= {
        f"rope_{f}": unscaled for f in ("factor", "original_context", "slow", "fast", "attention_factor")
    }
    without_effect |= dict.fromkeys(("tied_head", "scale_embedding", "logits_softcap"), model.fusion == "contrastive")
    return {name: None if without_effect.get(name) else value for name, value in fields.items()} | _bare_vision(model)


def _bare_vision(model: ModelConfig) -> dict[str, Any]:
    """What of a model sees, field by field, with everything that makes no difference left out."""
    vision, fusion = model.vision, model.fusion
    vit, resnet = vision.encoder == "vit", "resnet" in (vision.encoder, vision.stem)
    connects, perceives = vision.pool == "none", vision.connector == "perceiver"
    # Streams beside the text and the probe of a pool are made like a vit's layers.
    towers = vit or vision.pool == "map" or fusion in ("co", "tangled")
    with_effect = {
        ("image_size", "image_width"): (vit or vision.pool != "mean") and vision.positions == "learned",
        ("patch_size", "patch_width"): vit and vision.stem == "patches",
        ("qkv_bias",): vit and vision.attention_bias,
        ("position_slack",): vit and vision.positions == "learned",
        ("positions",): vit or vision.pool != "mean",
        ("temporal_patch", "stem", "class_token", "patch_bias", "embedding_norm", "final_norm"): vit,
        ("layers", "embed_dim", "unused_layers", "unused_norm"): vit,
        ("heads", "mlp_dim", "activation", "attention_bias", "norm", "norm_eps"): towers,
        ("rope_theta",): vit and vision.positions == "rope",
        ("final_norm_eps",): vit and vision.final_norm and not (vision.unused_layers or vision.unused_norm),
        ("keep_class",): vision.class_token and connects,
        ("widths",): not vit or resnet,
        ("depths", "block", "stem_width", "conv_norm", "conv_activation", "first_stride"): resnet,
        ("reduces_first",): resnet and vision.block == "bottleneck",
        ("connector", "image_positions"): connects,
        ("connector_dim", "connector_activation"): connects and vision.connector in ("mlp", "merger", "perceiver"),
        ("connector_factor",): connects and vision.pools,
        ("connector_bias",): connects and vision.connector != "none",
        ("connector_eps",): connects and vision.connector in ("perceiver", "average_pool", "merger"),
        ("connector_qk_norm", "latents"): connects and perceives,
        ("connector_layers", "connector_heads", "connector_head_dim"): connects and perceives,
        ("image_token",): fusion == "merge",
        ("offset",): fusion == "cross",
    }
    of_fusions = {f.name: f.metadata["of"]["model.fusion"] for f in dataclasses.fields(vision) if f.metadata.get("of")}
    with_effect = {(name,): fusion in fusions for name, fusions in of_fusions.items()} | with_effect
    sees = vision.encoder != "none"
    effects = {name: sees and effect for names, effect in with_effect.items() for name in names}
    fields = [f.name for f in dataclasses.fields(vision) if f.name != "init"]
    kept = {n: getattr(vision, n) if effects.get(n, sees or n == "encoder") else None for n in fields}
    return {f"vision.{name}": value for name, value in kept.items()}

"""Idefics, an open Flamingo (arXiv:2204.14198): Llama that looks at images through gated cross-attention.

Legend: B rows, T tokens, N images of a row, H, W pixels along their sides, P vectors of an image, C their width.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from model.config import ModelConfig, VisionConfig
from model.families import causal, llama
from model.families.mapping import Family, Peer
from model.families.options import GATED_ACTIVATIONS, choice, filled, get, only, read_decoder, word, write_decoder
from model.families.rope_options import read_rope, write_rope
from model.families.towers import IDLE, images, read_clip, write_tower
from model.families.vit import flag, named, pixels
from model.generate.prefill import Sight
from model.kinds import build
from model.vision.images import Images
from model.weights import Weights, bind
from tpu.errors import UserError

PERCEIVER, BLOCK = "vision.connector.perceiver", "model.perceiver_resampler.blocks.{0}"
GATE, CROSS = "stack.groups.gate", "model.gated_cross_attn_layers.{layer}"
RESAMPLER = {
    f"{PERCEIVER}.latents": Peer("model.perceiver_resampler.latents", rank=2),
    f"{PERCEIVER}.source_norm_#": f"{BLOCK}.0.context_layer_norm",
    f"{PERCEIVER}.latents_norm_#": f"{BLOCK}.0.latents_layer_norm",
    f"{PERCEIVER}.attention_#.query": f"{BLOCK}.0.q_proj",
    f"{PERCEIVER}.attention_#.key": f"{BLOCK}.0.k_proj",
    f"{PERCEIVER}.attention_#.value": f"{BLOCK}.0.v_proj",
    f"{PERCEIVER}.attention_#.out": Peer(f"{BLOCK}.0.output_proj", inputs=2),
    f"{PERCEIVER}.attention_#.query_norm": f"{BLOCK}.0.q_layer_norm",
    f"{PERCEIVER}.attention_#.key_norm": f"{BLOCK}.0.k_layer_norm",
    f"{PERCEIVER}.mlp_norm_#": f"{BLOCK}.1.ln",
    f"{PERCEIVER}.mlp_#.up": f"{BLOCK}.1.fc",
    f"{PERCEIVER}.mlp_#.down": f"{BLOCK}.1.c_proj",
    f"{PERCEIVER}.final_norm": "model.perceiver_resampler.layer_norm",
}
GATES = {
    f"{GATE}.attention_norm": f"{CROSS}.input_layernorm",
    f"{GATE}.attention.query": f"{CROSS}.cross_attn.q_proj",
    f"{GATE}.attention.key": f"{CROSS}.cross_attn.k_proj",
    f"{GATE}.attention.value": f"{CROSS}.cross_attn.v_proj",
    f"{GATE}.attention.out": Peer(f"{CROSS}.cross_attn.o_proj", inputs=2),
    f"{GATE}.attention.query_norm": f"{CROSS}.cross_attn.q_layer_norm",
    f"{GATE}.attention.key_norm": f"{CROSS}.cross_attn.k_layer_norm",
    f"{GATE}.mlp_norm": f"{CROSS}.post_attention_layernorm",
    f"{GATE}.mlp.gate": f"{CROSS}.mlp.gate_proj",
    f"{GATE}.mlp.up": f"{CROSS}.mlp.up_proj",
    f"{GATE}.mlp.down": f"{CROSS}.mlp.down_proj",
}
TABLE = llama.TABLE | images("model.vision_model") | RESAMPLER | GATES
ALPHAS = {"float": 1, "vector": 3}  # dimensions of a gate
TOWER = {  # what transformers takes for options of vision_config that are missing
    "embed_dim": 768,
    "image_size": 224,
    "intermediate_size": 5120,
    "patch_size": 14,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "num_channels": 3,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
}
TEXTS = ("input_ids", "attention_mask", "position_ids", "labels")
INPUTS = (*TEXTS, "pixel_values", "image_attention_mask", "interpolate_pos_encoding")


def read(config: dict[str, Any]) -> ModelConfig:
    """config.json -> ModelConfig."""
    only(config, dropout=0.0)
    return read_decoder(
        config,
        vocab_size=get(config, "vocab_size", int, 32_000) + get(config, "additional_vocab_size", int, 0),
        activation=choice(config, "hidden_act", GATED_ACTIVATIONS, "silu"),
        tied_head=get(config, "tie_word_embeddings", bool, False),
        fusion="cross",
        vision=_read_vision(config),
        **read_rope(config),
    ).resolved()


def _read_vision(config: dict[str, Any]) -> VisionConfig:
    tower = filled(get(config, "vision_config", dict, {}), TOWER)
    resampler = get(config, "perceiver_config", dict, {})
    return read_clip(
        tower | {"hidden_size": tower["embed_dim"]},
        position_slack=0.1,
        keep_class=True,
        unused_norm=True,
        connector="perceiver" if get(config, "use_resampler", bool, False) else "none",
        connector_activation="relu",
        connector_qk_norm=get(resampler, "qk_layer_norms_perceiver", bool, False),
        latents=get(resampler, "resampler_n_latents", int, 64),
        connector_layers=get(resampler, "resampler_depth", int, 6),
        connector_heads=get(resampler, "resampler_n_heads", int, 16),
        connector_head_dim=get(resampler, "resampler_head_dim", int, 96),
        every=get(config, "cross_layer_interval", int, 1),
        offset=0,
        sees="last",  # So its processor has it; no file says.
        qk_norm=get(config, "qk_layer_norms", bool, False),
        gate_per_channel=choice(config, "alpha_type", dict(zip(ALPHAS, ALPHAS, strict=True)), "float") == "vector",
    )


def write(model: ModelConfig) -> dict[str, Any]:
    """ModelConfig -> config.json."""
    vision = model.vision
    return {
        **write_decoder(model),
        **write_rope(model),
        "hidden_act": word(GATED_ACTIVATIONS, model.activation),
        "additional_vocab_size": 0,
        "alpha_type": "vector" if vision.gate_per_channel else "float",
        "cross_layer_interval": vision.every,
        "dropout": 0.0,
        "qk_layer_norms": vision.qk_norm,
        "use_resampler": vision.connector == "perceiver",
        "perceiver_config": {
            "qk_layer_norms_perceiver": vision.connector_qk_norm,
            "resampler_depth": vision.connector_layers,
            "resampler_head_dim": vision.connector_head_dim,
            "resampler_n_heads": vision.connector_heads,
            "resampler_n_latents": vision.latents,
        },
        "vision_config": write_tower(vision, "idefics_vision") | {"embed_dim": vision.embed_dim},
    }


def run(
    config: ModelConfig, weights: Weights, inputs: dict[str, np.ndarray], new_tokens: int, options: dict[str, Any]
) -> dict[str, np.ndarray]:
    """As `model.families.causal.run`, and image_hidden_states [B, N, P, C].

    Args:
      inputs: beside the text's, pixel_values [B, N, channels, H, W] floats, normalised, and image_attention_mask
        [B, T, N] integers, not 0 where a token looks at an image; the flag interpolate_pos_encoding, without which
        images have the size of the configuration. Without images a text is computed as one that looks at none.

    Raises UserError for another name, shape or type, and for tokens outside the vocabulary.
    """
    arrays = checked(config, inputs, options)
    compute = jax.jit(functools.partial(outputs, config))
    found = {name: np.asarray(value) for name, value in compute(weights, arrays).items()}
    if new_tokens:
        found["sequences"] = greedy(config, weights, arrays, new_tokens, options)
    return found


def checked(config: ModelConfig, inputs: dict[str, np.ndarray], options: dict[str, Any]) -> dict[str, np.ndarray]:
    """The arrays as the model takes them: pixel_values [B, N, H, W, channels]. Raises UserError as `run`."""
    named(inputs, INPUTS)
    arrays = causal.integers(config, {name: inputs[name] for name in TEXTS if name in inputs})
    both = [name in inputs for name in ("pixel_values", "image_attention_mask")]
    if both == [False, False]:
        return arrays
    if not all(both):
        raise UserError("inputs: pixel_values and image_attention_mask: one is missing; give both, or neither")
    resampled = flag(inputs, "interpolate_pos_encoding")
    shown, mask = pixels(config, inputs, resampled, ("rows", "images")), inputs["image_attention_mask"]
    wanted = (*arrays["input_ids"].shape, shown.shape[1])
    if mask.shape != wanted or mask.dtype.kind not in "iub":
        raise UserError(
            f"inputs: image_attention_mask is {mask.dtype}{list(mask.shape)}; must be integers {list(wanted)}: [rows, "
            "tokens of input_ids, images of pixel_values]"
        )
    if len(shown) != wanted[0]:
        raise UserError(f"inputs: pixel_values has {len(shown)} rows, input_ids {wanted[0]}")
    return arrays | {"pixel_values": shown, "image_attention_mask": mask != 0}


def looked_at(pixels: Any, mask: Any) -> Images:
    """Images that tokens look at by `mask` [B, T, N]."""
    none = jnp.zeros(mask.shape[:2], jnp.int32)
    return Images(pixels, jnp.ones(pixels.shape[:2], jnp.int32), none - 1, none, none, visible=jnp.asarray(mask))


def outputs(config: ModelConfig, weights: Weights, inputs: dict[str, Any]) -> dict[str, jax.Array]:
    """As `run`, of checked inputs, to be compiled."""
    model = bind(build(config)[0], weights)
    tokens, found = inputs["input_ids"], {}
    mask = jnp.asarray(inputs.get("attention_mask", np.ones(tokens.shape, np.int32))) != 0
    counted = jnp.where(mask, jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 1)
    shown = None
    if "pixel_values" in inputs:
        shown = looked_at(inputs["pixel_values"], inputs["image_attention_mask"])
        vectors = model.vision(shown).hidden.astype(jnp.float32)
        found["image_hidden_states"] = vectors.reshape(*shown.pixels.shape[:2], -1, vectors.shape[-1])
    place, keys = causal.places(inputs | {"attention_mask": mask})
    hidden, _ = model(tokens, place, keys=keys, positions=inputs.get("position_ids", counted), images=shown)
    return found | causal.described(model, hidden, inputs)


def greedy(
    config: ModelConfig, weights: Weights, inputs: dict[str, Any], new_tokens: int, options: dict[str, Any]
) -> np.ndarray:
    """As `model.families.causal.greedy`, of checked inputs; new tokens look at what the last one of the prompt does."""
    sight = Sight()
    if "pixel_values" in inputs:
        mask = causal.moved(inputs["image_attention_mask"], causal.prompt_lengths(inputs, options), 0)
        sight = Sight(looked_at(inputs["pixel_values"], mask))
    return causal.greedy(config, weights, inputs, new_tokens, options, sight)


FAMILIES = tuple(
    Family(
        architectures=("IdeficsForVisionText2Text",),
        model_type="idefics",
        paper="arXiv:2204.14198",
        table=TABLE
        | {
            f"{GATE}.attention_gate": Peer(f"{CROSS}.alpha_cross_attn", rank=rank),
            f"{GATE}.mlp_gate": Peer(f"{CROSS}.alpha_dense", rank=rank),
        },
        read=read,
        write=write,
        run=run,
        ignored=rf"{llama.FAMILY.ignored}|{IDLE}",
        fits=lambda config, alpha=alpha: (config.get("alpha_type") or "float") == alpha,
        joined={
            "model.embed_tokens.weight": "model.embed_tokens.additional_embedding.weight",
            "lm_head.weight": "lm_head.additional_fc.weight",
        },
        objective="conversation",
        image_processor="Idefics",
    )
    for alpha, rank in ALPHAS.items()
)

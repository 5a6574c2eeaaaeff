"""T5 (arXiv:1910.10683) and its version 1.1, whose feed-forward blocks are gated; they differ in their tensors."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from model.config import ModelConfig
from model.families.causal import IGNORED, ended, integers
from model.families.mapping import Family, Peer
from model.families.options import choice, get, only, word
from model.generate.decode import decoding_weights, make_decoder
from model.generate.generate import generate
from model.kinds import build
from model.place import Place
from model.weights import Weights, bind
from tpu.errors import UserError

PLAIN = {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh"}
GATED = {"gated-gelu": "geglu", "gated-silu": "swiglu", "gated-relu": "reglu", "gated-gelu_new": "geglu"}


def table(gated: bool) -> dict[str, str | Peer]:
    """Our modules and theirs."""
    found: dict[str, str | Peer] = {"embedding": "shared", "head.linear": "lm_head"}
    for half, last in (("encoder", 1), ("decoder", 2)):
        ours, theirs = f"{half}.groups.layer", half + ".block.{layer}.layer"
        attention = {"attention": f"{theirs}.0.SelfAttention"}
        if half == "decoder":
            attention["cross"] = f"{theirs}.1.EncDecAttention"
            found[f"{ours}.cross_norm"] = f"{theirs}.1.layer_norm"
        for name, peer in attention.items():
            found |= {f"{ours}.{name}.{part}": f"{peer}.{part[0]}" for part in ("query", "key", "value")}
            found[f"{ours}.{name}.out"] = Peer(f"{peer}.o", inputs=2)
        dense = f"{theirs}.{last}.DenseReluDense"
        found |= {
            f"{ours}.attention_norm": f"{theirs}.0.layer_norm",
            f"{ours}.mlp_norm": f"{theirs}.{last}.layer_norm",
            f"{ours}.mlp.up": f"{dense}.wi_1" if gated else f"{dense}.wi",
            f"{ours}.mlp.gate": f"{dense}.wi_0",
            f"{ours}.mlp.down": f"{dense}.wo",
            f"{half}_bias": f"{half}.block.0.layer.0.SelfAttention.relative_attention_bias",
            f"{half}_norm": f"{half}.final_layer_norm",
        }
    return found


def read(config: dict[str, Any]) -> ModelConfig:
    """config.json -> ModelConfig. Whether the head is tied is known from the file alone (`Family.head`)."""
    only(config, is_encoder_decoder=True, quantization_config=None)
    embed_dim, layers = get(config, "d_model", int, 512), get(config, "num_layers", int, 6)
    tied, dropout = get(config, "tie_word_embeddings", bool, True), get(config, "dropout_rate", float, 0.1)
    scaled = get(config, "scale_decoder_outputs", bool, tied)
    return ModelConfig(
        kind="encoder_decoder",
        vocab_size=get(config, "vocab_size", int, 32_128),
        layers=layers,
        decoder_layers=get(config, "num_decoder_layers", int, layers),
        embed_dim=embed_dim,
        heads=get(config, "num_heads", int, 8),
        head_dim=get(config, "d_kv", int, 64),
        mlp_dim=get(config, "d_ff", int, 2048),
        activation=choice(config, "feed_forward_proj", PLAIN | GATED, "relu"),
        positions="relative",
        relative_buckets=get(config, "relative_attention_num_buckets", int, 32),
        relative_distance=get(config, "relative_attention_max_distance", int, 128),
        norm="rmsnorm",
        norm_eps=get(config, "layer_norm_epsilon", float, 1e-6),
        attention_bias=False,
        mlp_bias=False,
        query_scalar=1.0,
        tied_head=tied,
        output_scale=embed_dim**-0.5 if scaled else 1.0,
        start_token=get(config, "decoder_start_token_id", int, 0),
        embedding_dropout=dropout,
        residual_dropout=dropout,
        attention_dropout=dropout,
        init="fan_in",
        init_std=1.0,
    ).resolved()


def write(model: ModelConfig) -> dict[str, Any]:
    """ModelConfig -> config.json."""
    scaled = model.output_scale == model.embed_dim**-0.5
    return {
        "vocab_size": model.vocab_size,
        "num_layers": model.layers,
        "num_decoder_layers": model.decoder_layers,
        "d_model": model.embed_dim,
        "num_heads": model.heads,
        "d_kv": model.head_dim,
        "d_ff": model.mlp_dim,
        "feed_forward_proj": word(PLAIN | GATED, model.activation),
        "relative_attention_num_buckets": model.relative_buckets,
        "relative_attention_max_distance": model.relative_distance,
        "layer_norm_epsilon": model.norm_eps,
        "tie_word_embeddings": model.tied_head,
        "scale_decoder_outputs": scaled,
        "dropout_rate": model.residual_dropout,
        "is_encoder_decoder": True,
        "decoder_start_token_id": model.start_token,
    }


INPUTS = ("input_ids", "attention_mask", "decoder_input_ids", "labels")


def checked(config: ModelConfig, inputs: dict[str, np.ndarray], options: dict[str, Any]) -> dict[str, np.ndarray]:
    """The inputs as int32 arrays, decoder_input_ids made of the labels where there are none. Raises UserError."""
    if unknown := inputs.keys() - set(INPUTS):
        raise UserError(f"inputs: {sorted(unknown)[0]!r} is not supported; valid: {', '.join(INPUTS)}")
    of_encoder = {name: inputs[name] for name in INPUTS[:2] if name in inputs}
    found = integers(config, of_encoder)
    of_decoder = {name: inputs[name] for name in INPUTS[2:] if name in inputs}
    if "labels" in inputs and "decoder_input_ids" not in inputs:
        padding = options.get("pad_token_id") or 0
        labels = np.asarray(inputs["labels"])
        shifted = np.concatenate([np.full((len(labels), 1), config.start_token), labels[:, :-1]], axis=1)
        of_decoder["decoder_input_ids"] = np.where(shifted == IGNORED, padding, shifted)
    if of_decoder:
        found |= integers(config, of_decoder, "decoder_input_ids")
        if len(found["decoder_input_ids"]) != len(found["input_ids"]):
            raise UserError("inputs: decoder_input_ids: needs as many rows as input_ids")
    return found


def run(
    config: ModelConfig, weights: Weights, inputs: dict[str, np.ndarray], new_tokens: int, options: dict[str, Any]
) -> dict[str, np.ndarray]:
    """logits [B, U, V] float32 of the decoder's tokens; loss with labels; sequences [B, 1 + N] with new_tokens.

    Args: as `model.families.causal.run`; inputs are input_ids and attention_mask of the encoder, decoder_input_ids
      and labels (without decoder_input_ids these are made of the labels).
    """
    inputs = checked(config, inputs, options)
    graph = build(config)[0]
    found = {}
    if "decoder_input_ids" in inputs:
        compute = jax.jit(lambda weights: outputs(bind(graph, weights), inputs))
        found = {name: np.asarray(value) for name, value in compute(weights).items()}
    elif not new_tokens:
        raise UserError("inputs: give decoder_input_ids, labels, or --new_tokens")
    if new_tokens:
        found["sequences"] = greedy(config, weights, inputs, new_tokens, options)
    return found


def outputs(model: Any, inputs: dict[str, Any]) -> dict[str, jax.Array]:
    """As `run`, to be compiled."""
    tokens, source = inputs["decoder_input_ids"], jnp.asarray(inputs["input_ids"])
    order = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    mask = (jnp.asarray(inputs.get("attention_mask", jnp.ones_like(source))) != 0).astype(jnp.int32)
    hidden, _ = model(tokens, Place(jnp.ones_like(order), order), inputs=source, input_segments=mask)
    logits = model.head(hidden)
    found = {"logits": logits}
    if "labels" in inputs:
        labels = jnp.asarray(inputs["labels"])
        chosen = jnp.take_along_axis(logits, jnp.where(labels == IGNORED, 0, labels)[..., None], axis=-1)[..., 0]
        nll = jax.nn.logsumexp(logits, axis=-1) - chosen
        found["loss"] = jnp.sum(jnp.where(labels == IGNORED, 0.0, nll)) / jnp.sum(labels != IGNORED)
    return found


def greedy(
    config: ModelConfig, weights: Weights, inputs: dict[str, np.ndarray], new_tokens: int, options: dict[str, Any]
) -> np.ndarray:
    """sequences [B, 1 + N] int64: the start token and the most probable tokens after it, through our cache."""
    tokens = inputs["input_ids"]
    mask = inputs.get("attention_mask", np.ones_like(tokens)) != 0
    lengths = mask.sum(1).astype(np.int32)
    if (np.diff(mask.astype(int), axis=1) > 0).any() or not lengths.all():
        raise UserError("inputs: attention_mask: new_tokens needs all padding on the right")
    decoder = make_decoder(config, build(config)[0], config.vocab_size, -1)
    found = generate(decoder, decoding_weights(config, weights), tokens, lengths, new_tokens)
    start = np.full((len(tokens), 1), config.start_token)
    return np.concatenate([start, ended(np.asarray(found.tokens), options)], axis=1).astype(np.int64)


FAMILIES = tuple(
    Family(
        architectures=("T5ForConditionalGeneration",),
        model_type="t5",
        paper="arXiv:1910.10683",
        table=table(gated),
        read=read,
        write=write,
        run=run,
        prefix="",
        ignored=r"(encoder|decoder)\.embed_tokens\.weight"
        r"|decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
        fits=lambda config, gated=gated: str(config.get("feed_forward_proj")).startswith("gated") == gated,
        head="lm_head.weight",
        objective="sequence_to_sequence",
    )
    for gated in (False, True)
)

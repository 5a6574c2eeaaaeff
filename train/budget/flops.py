"""Floating-point operations of a training step, from shapes alone; nothing is computed.

Legend: T tokens of a row, S vectors that images give to a row, A actions of a row (`model.fusion.tangled_attention`).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax

from model.adapters.lora import FACTORS
from model.config import ModelConfig
from train.config import Experiment


class Shown(NamedTuple):
    """What a row shows: images, their vectors inside the encoder, and those that leave the connector."""

    images: int = 0
    encoded: int = 0
    vectors: int = 0


NOTHING_SHOWN = Shown()


def shown(experiment: Experiment) -> Shown:
    """What the rows of an experiment show; places for images count whether there is one or not."""
    vision, data = experiment.model.vision, experiment.data
    if vision.encoder == "none":
        return NOTHING_SHOWN
    images = data.images if experiment.objective.name == "conversation" else 1
    if data.image_fit == "native":
        return Shown(images, data.patches, data.patches // vision.shrink**2)
    return Shown(images, images * (vision.grid * vision.columns + vision.class_token), images * vision.vectors)


def flops_per_token(
    config: ModelConfig, weights: Any, context: int, frozen: Any = None, shown: Shown = NOTHING_SHOWN
) -> int:
    """Floating-point operations of one training step per token, counted as PaLM does (arXiv:2204.02311, appendix B).

    Six per weight and vector that it multiplies (the head's table counts, looked-up tables do not; one that layers
    share counts for each of them; of experts those that a token meets), and for attention 12 per query, key and unit of
    the heads' width, not halved for causality; keys of the text are what `ModelConfig.keys_seen` says. Operations done
    again by rematerialisation do not count. Four per weight of `frozen`, for which no gradient is made. What images
    take is shared out among the `context` tokens of their row; of convolutions as if they had a stride of one patch.
    """
    products = 6 * _multiplied(config, weights, context, shown)
    products += 4 * (0 if frozen is None else _multiplied(config, frozen, context, shown))
    if config.tied_head and config.kind != "vision" and config.fusion != "contrastive":
        products += (6 if frozen is None else 4) * config.vocab_size * config.embed_dim * context
    return round((products + 12 * _attended(config, context, shown)) / context)


def met_by_token(path: tuple[str, ...], size: int, config: ModelConfig) -> int:
    """How much of a weight one token meets: of the experts' matrices, those of its experts."""
    if "moe" not in path or "shared" in path or path[-1] != "kernel":
        return size
    return size * config.experts_per_token // config.experts


def _multiplied(config: ModelConfig, weights: Any, context: int, shown: Shown) -> float:
    """Products of weights and vectors in a row; those of a weight that layers share for each of them."""
    times = config.layers // len(config.pattern) // config.layer_sets()
    computed = 1 - config.vision.unused_layers / config.vision.layers
    count = 0.0
    for keys, leaf in jax.tree_util.tree_leaves_with_path(weights):
        path = tuple(part.key for part in keys)
        if path[-1] in ("kernel", "router", *FACTORS):
            met = met_by_token(path, math.prod(leaf.shape), config) * _often(path, config, context, shown)
            of_encoder = path[0] == "vision" and "stack" in path
            count += met * (computed if of_encoder else times if path[0] != "vision" and "groups" in path else 1)
    return count


def _often(path: tuple[str, ...], config: ModelConfig, context: int, shown: Shown) -> int:
    """How many vectors of a row a weight multiplies."""
    keys = not {"key", "value"}.isdisjoint(path)
    if path[0] == "vision":
        if "perceiver" in path and keys:
            return shown.encoded + shown.vectors
        if "map_pool" in path and not keys:
            return shown.images
        return shown.encoded if "encoder" in path or "map_pool" in path else shown.vectors
    if path[0] == "streams":
        return _often_in_streams(path, config, context, shown)
    if path[0] in ("text_projection", "image_projection") or config.kind == "vision":
        return 1
    return shown.vectors if keys and any(part.startswith("gate_") for part in path) else context


def _often_in_streams(path: tuple[str, ...], config: ModelConfig, context: int, shown: Shown) -> int:
    """The same beside the text's layers; of the last connection only what reaches the text is computed."""
    keys = not {"key", "value"}.isdisjoint(path)
    stream = path[2] if path[1].startswith("connection_") else path[1]
    to_text = stream in ("text", "of_text", "text_attention", "text_keys", "text_values")
    to_text |= (stream == "of_regions" and keys) or (stream == "of_actions" and "query" in path)
    if path[1].endswith(f"_{config.vision.connections - 1}") and not to_text:
        return 0
    if stream in ("text_attention", "image_attention"):
        return shown.vectors if keys == (stream == "text_attention") else context
    if stream in ("text", "of_text"):
        return context
    if stream.startswith(("images", "regions", "of_regions")):
        return shown.vectors
    return shown.images * config.vision.actions


def _attended(config: ModelConfig, context: int, shown: Shown) -> float:
    """Pairs of a query and a key in a row, times the width of all heads."""
    vision, groups = config.vision, config.layers // len(config.pattern)
    total = 0.0
    if config.kind != "vision":
        keys = sum(config.keys_seen(kind, context) for kind in config.pattern)
        keys += sum(config.looks(i) for i in range(len(config.pattern))) * shown.vectors
        total += config.heads * config.head_dim * context * keys * groups
    if vision.encoder == "none":
        return total
    each = vision.grid * vision.columns + vision.class_token
    if vision.encoder == "vit":
        total += (vision.layers - vision.unused_layers) * vision.embed_dim * shown.encoded * each
    if vision.pool == "map":
        total += config.vision.encoder_width * shown.encoded
    if vision.connector == "perceiver":
        width = vision.connector_layers * vision.connector_heads * vision.connector_head_dim
        total += width * shown.vectors * (each + vision.latents)
    if config.fusion in ("co", "tangled"):
        total += _streams_attended(config, context, shown.vectors, shown.images * vision.actions)
    return total


def _streams_attended(config: ModelConfig, t: int, s: int, a: int) -> float:
    """The same in the connections of T tokens, S vectors and A actions, and in the layers after them but the text's."""
    stacked = config.vision.tangled == "paper"
    if config.fusion == "co":
        to_text, others, layers = t * s, s * t, config.source_width * s * s
    else:
        to_text = t * t + a * s + stacked * t * a
        others = a * t + s * s + a * a + stacked * s * a
        layers = config.source_width * s * s + config.heads * config.head_dim * a * a
    width, connections = config.vision.connection_dim, config.vision.connections
    return connections * width * to_text + (connections - 1) * (width * others + layers)

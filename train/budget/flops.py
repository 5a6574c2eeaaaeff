"""Floating-point operations of training, from the program and its shapes; nothing is computed.

Products of weights and activations are counted in the program (`train.budget.products`): experts those that a token
meets, layers that share weights each, convolutions without their padding, and no gradient where nothing needs one.
Attention goes by a formula, as PaLM's (arXiv:2204.02311, appendix B): all keys of a row, not half of them for
causality, those of the text as `ModelConfig.keys_seen` says. What rematerialisation does again does not count.

Legend: T tokens of a row, S vectors that images give to a row, A actions of a row (`model.fusion.tangled_attention`).
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from model import kinds
from model.attention.cross_attention import Source
from model.config import ModelConfig
from model.place import Place
from model.weights import bind
from train.budget.products import Products, weight_products
from train.config import Experiment
from train.layout import abstract_batch, layout_of
from train.objectives.roles import by_role, models, of_state
from train.objectives.table import objective_of
from train.step import frozen_mask


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
    if data.image_fit == "native":
        return Shown(data.images, data.patches, data.patches // vision.shrink**2)
    images = layout_of(experiment)["images"].shape[1]
    return Shown(images, images * (vision.grid * vision.columns + vision.class_token), images * vision.vectors)


class Operations(NamedTuple):
    """Of one row."""

    forward: int
    backward: int


def operations(experiment: Experiment) -> Operations:
    """Floating-point operations of one row of a resolved experiment, forward and backward."""
    one = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, batch_size=1))
    one.model = _counted(experiment.model)
    batch = abstract_batch(one)
    products = _products(one, batch)
    inputs = batch["inputs"].shape[1] if "inputs" in batch else 0
    text = _text_attended(one.model, batch["tokens"].shape[1], inputs, shown(one))
    sides = {False: text, True: _vision_attended(one.model, shown(one))}
    backward = sum(8 * pairs * products.attends[side] for side, pairs in sides.items())
    return Operations(products.forward + round(4 * sum(sides.values())), products.backward + round(backward))


def flops_per_token(experiment: Experiment) -> int:
    """Floating-point operations of one training step per token of a resolved experiment.

    Where every weight is trained, six per weight and activation that it multiplies (four where the activation is what
    is read, such as pixels) and twelve per query, key and unit of the heads' width. What images take is shared out
    among the tokens of their row.
    """
    return round(sum(operations(experiment)) / experiment.data.context)


def decoding_flops_per_token(experiment: Experiment, context: int) -> int:
    """Floating-point operations of drawing one more token after `context` others; images have been seen before."""
    config = _counted(experiment.model)
    graphdef, weights, _ = kinds.build(config)
    nowhere = jax.ShapeDtypeStruct((1, 0), jnp.int32)
    width = config.embed_dim if config.kind == "encoder_decoder" else config.source_width
    reads = config.kind == "encoder_decoder" or config.fusion == "cross"
    source = Source(jax.ShapeDtypeStruct((1, 0, width), jnp.float32), Place(nowhere, nowhere)) if reads else None

    def logits(weights: Any, tokens: jax.Array, source: Source | None) -> jax.Array:
        model, place = bind(graphdef, weights), Place(jnp.ones_like(tokens), jnp.zeros_like(tokens))
        if config.fusion == "cross":
            source = source._replace(queries=place)
        return model.head(model(tokens, place, **({} if source is None else {"source": source}))[0])

    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    products = weight_products(logits, weights, jax.tree.map(lambda _: False, weights), token, source)
    return round(products.forward + 4 * _text_attended(config, context, 0, NOTHING_SHOWN) / context)


def _counted(config: ModelConfig) -> ModelConfig:
    """The model in the form in which its products are read: layers and groups of rows in one operation each."""
    plain = {"platform": "gpu", "compute_dtype": "float32", "attention": "plain", "layer_loop": "scan"}
    return dataclasses.replace(config, **plain, remat="none", capacity_factor=0.0)


def _products(experiment: Experiment, batch: Any) -> Products:
    """The products of weights in a forward pass with its loss over a batch, and what of them is differentiated."""
    objective, patterns = objective_of(experiment), experiment.optimizer.frozen
    found = models(experiment, objective.roles(experiment))
    trained = {name: model.trained for name, model in found.items() if model.trained is not None}
    frozen = {name: model.frozen for name, model in found.items() if model.frozen is not None}
    moves = jax.tree.map(lambda _: True, trained)
    if patterns:
        still = frozen_mask(of_state(trained), patterns)
        moves = by_role(found, jax.tree.map(lambda stays: not stays, still))

    def loss(weights: Any, batch: Any, carried: Any) -> jax.Array:
        bound = {name: of.bind(weights["trained"].get(name), weights["frozen"].get(name)) for name, of in found.items()}
        return sum(objective.sums(bound, batch, experiment, None, carried).trained.values())

    marks = {"trained": moves, "frozen": jax.tree.map(lambda _: False, frozen)}
    carried = jax.eval_shape(lambda: objective.carried(experiment))
    return weight_products(loss, {"trained": trained, "frozen": frozen}, marks, batch, carried)


def met_by_token(path: tuple[str, ...], size: int, config: ModelConfig) -> int:
    """How much of a weight one token meets: of the experts' matrices, those of its experts."""
    if "moe" not in path or "shared" in path or path[-1] != "kernel":
        return size
    return size * config.experts_per_token // config.experts


def _text_attended(config: ModelConfig, tokens: int, inputs: int, shown: Shown) -> float:
    """Pairs of a query and a key in the layers of a row's text and between it and images, times the width of all heads.

    inputs: tokens that an encoder before the decoder reads.
    """
    if config.kind == "vision":
        return 0.0
    keys, groups = sum(config.keys_seen(kind, tokens) for kind in config.pattern), config.layers // len(config.pattern)
    if config.kind == "encoder_decoder":
        pairs = config.layers * inputs * inputs + config.decoder_layers * tokens * (tokens + inputs)
        return float(config.heads * config.head_dim * pairs)
    keys += sum(config.looks(i) for i in range(len(config.pattern))) * shown.vectors
    total = float(config.heads * config.head_dim * tokens * keys * groups)
    if config.fusion in ("co", "tangled"):
        total += _streams_attended(config, tokens, shown.vectors, shown.images * config.vision.actions)
    return total


def _vision_attended(config: ModelConfig, shown: Shown) -> float:
    """The same in the encoder of images and the connector."""
    vision, total = config.vision, 0.0
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

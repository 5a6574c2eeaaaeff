"""Which class computes a `model.kind` and a `model.fusion`."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from model import weights
from model.bert import Bert
from model.config import ModelConfig
from model.encoder_decoder import EncoderDecoder
from model.fields.fusion import CONTRASTIVE, LATE
from model.fusion.contrastive import Contrastive
from model.fusion.late import Late
from model.transformer import Transformer
from model.vision.image_classifier import ImageClassifier
from model.weights import Weights

MAKE: dict[str, type[nnx.Module]] = {
    "decoder": Transformer,
    "encoder": Bert,
    "encoder_decoder": EncoderDecoder,
    "vision": ImageClassifier,
}

# Fusions that are no part of the text's own layers
OF_FUSION: dict[str, type[nnx.Module]] = {CONTRASTIVE: Contrastive, LATE: Late}


def maker(config: ModelConfig) -> type[nnx.Module]:
    """The class of a model of this shape."""
    return OF_FUSION.get(config.fusion, MAKE[config.kind])


def build(config: ModelConfig) -> tuple[nnx.GraphDef, Weights, Any]:
    """As `model.weights.build`, for every kind."""
    return weights.build(config, maker(config))


def init(config: ModelConfig, key: jax.Array) -> Weights:
    """As `model.weights.init`, for every kind."""
    return weights.init(config, key, maker(config))

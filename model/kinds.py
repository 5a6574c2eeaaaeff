"""Which class computes a `model.kind`."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from model import transformer
from model.bert import Bert
from model.config import ModelConfig
from model.encoder_decoder import EncoderDecoder
from model.transformer import Transformer, Weights

MAKE: dict[str, type[nnx.Module]] = {"decoder": Transformer, "encoder": Bert, "encoder_decoder": EncoderDecoder}


def build(config: ModelConfig) -> tuple[nnx.GraphDef, Weights, Any]:
    """As `model.transformer.build`, for every kind."""
    return transformer.build(config, MAKE[config.kind])


def init(config: ModelConfig, key: jax.Array) -> Weights:
    """As `model.transformer.init`, for every kind."""
    return transformer.init(config, key, MAKE[config.kind])

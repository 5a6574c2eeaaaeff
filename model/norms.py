"""Layer normalisation (arXiv:1607.06450) and root-mean-square normalisation (arXiv:1910.07467), computed in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from model.config import ModelConfig
from model.linear import ones, parameter, zeros


class Norm(nnx.Module):
    """Normalises the last dimension, whose size and logical axis are given, as `config.norm` (or `kind`) says."""

    def __init__(self, config: ModelConfig, size: int, axis: str, rngs: nnx.Rngs, kind: str | None = None):
        self.kind = kind or config.norm
        self.eps = config.norm_eps
        self.scale = parameter(rngs, (size,), (axis,), config.weight_dtype, ones)
        with_bias = self.kind == "layernorm" and config.norm_bias
        self.bias = parameter(rngs, (size,), (axis,), config.weight_dtype, zeros) if with_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., size] -> the same shape and dtype."""
        y = x.astype(jnp.float32)
        if self.kind == "layernorm":
            y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        y = y * self.scale.get_value().astype(jnp.float32)
        if self.bias is not None:
            y = y + self.bias.get_value().astype(jnp.float32)
        return y.astype(x.dtype)

"""Layer normalisation (arXiv:1607.06450) and root-mean-square normalisation (arXiv:1910.07467), computed in float32."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from model.config import ModelConfig
from model.linear import ones, parameter, zeros


class Norm(nnx.Module):
    """Normalises the last dimension, whose size and logical axis are given, as `config.norm` (or `kind`) says."""

    def __init__(self, config: ModelConfig, size: int, axis: str, rngs: nnx.Rngs, kind: str | None = None):
        self.kind = kind or config.norm
        self.eps, self.offset = config.norm_eps, 1.0 if config.norm_unit_offset else 0.0
        self.scale = parameter(rngs, (size,), (axis,), config.weight_dtype, zeros if self.offset else ones)
        with_bias = self.kind == "layernorm" and config.norm_bias
        self.bias = parameter(rngs, (size,), (axis,), config.weight_dtype, zeros) if with_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., size] -> the same shape and dtype."""
        bias = None if self.bias is None else self.bias.get_value()
        return _normalize(self.kind, self.eps, self.offset, x, self.scale.get_value(), bias)


@functools.partial(jax.checkpoint, static_argnums=(0, 1, 2))
def _normalize(
    kind: str, eps: float, offset: float, x: jax.Array, scale: jax.Array, bias: jax.Array | None
) -> jax.Array:
    """Checkpointed: the backward pass computes the float32 intermediates again, which costs less than storing them."""
    scale, bias = (w if w is None else jax.lax.broadcast_to_rank(w.astype(jnp.float32), x.ndim) for w in (scale, bias))
    y = x.astype(jnp.float32)
    if kind == "layernorm":
        y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps) * (scale + offset)
    return (y if bias is None else y + bias).astype(x.dtype)

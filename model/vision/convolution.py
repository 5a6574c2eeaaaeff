"""Convolutions over images, and the plain stack of them: convolve, normalise, rectify, pool, once per stage.

Legend: R images, H, W pixels or vectors along a side, C channels, K pixels of a kernel along a side.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from model.config import ModelConfig
from model.linear import convolve, ones, parameter, zeros


class Convolution(nnx.Module):
    """x * W + b with W [K, K, C in, C out].

    Padding is K // 2 zeros on every side, so that a stride of 1 keeps the size (of torch's convolutions, `padding`).
    Standardised, every filter of W has mean 0 and variance 1 before it is used (arXiv:1903.10520).
    """

    def __init__(
        self,
        config: ModelConfig,
        size: int,
        inputs: int,
        outputs: int,
        rngs: nnx.Rngs,
        stride: int = 1,
        bias: bool = False,
        standardized: bool = False,
    ):
        def draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            return math.sqrt(2 / (size * size * inputs)) * jax.random.normal(key, shape)  # He, arXiv:1502.01852

        shape, axes = (size, size, inputs, outputs), ("taps", "taps", "channels", "embed")
        self.kernel = parameter(rngs, shape, axes, config.weight_dtype, draw)
        self.bias = parameter(rngs, (outputs,), ("norm",), config.weight_dtype, zeros) if bias else None
        self.stride, self.padding, self.standardized = stride, size // 2, standardized
        self.compute_dtype = config.compute_dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [R, H, W, C in] -> [R, ceil(H / stride), ceil(W / stride), C out] in the compute dtype."""
        kernel = self.kernel.get_value()
        y = convolve(x, kernel, self.stride, self.padding, self.compute_dtype, self.standardized)
        return y if self.bias is None else y + self.bias.get_value().astype(y.dtype)


class GroupNorm(nnx.Module):
    """Normalises runs of channels over an image (arXiv:1803.08494), in float32.

    There are 32 of them, or as many as divide both 32 and the number of channels.
    """

    def __init__(self, config: ModelConfig, channels: int, rngs: nnx.Rngs):
        self.groups, self.eps = math.gcd(channels, 32), config.vision.norm_eps
        self.scale = parameter(rngs, (channels,), ("norm",), config.weight_dtype, ones)
        self.bias = parameter(rngs, (channels,), ("norm",), config.weight_dtype, zeros)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [R, H, W, C] -> the same shape and dtype."""
        y = x.astype(jnp.float32).reshape(*x.shape[:3], self.groups, -1)
        mean, variance = y.mean((1, 2, 4), keepdims=True), y.var((1, 2, 4), keepdims=True)
        y = ((y - mean) * jax.lax.rsqrt(variance + self.eps)).reshape(x.shape)
        return (y * self.scale.get_value() + self.bias.get_value()).astype(x.dtype)


def pooled(x: jax.Array, size: int, stride: int, padding: int = 0) -> jax.Array:
    """The maximum over windows of `size` pixels square of x [R, H, W, C]."""
    pads = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    return jax.lax.reduce_window(
        x, np.array(-np.inf, x.dtype), jax.lax.max, (1, size, size, 1), (1, stride, stride, 1), pads
    )


class CNN(nnx.Module):
    """For each of vision.widths: a convolution of 3 x 3, group normalisation, ReLU, the maximum of 2 x 2."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        inputs, self.stages = config.vision.channels, len(config.vision.widths)
        for i, width in enumerate(config.vision.widths):
            setattr(self, f"convolution_{i}", Convolution(config, 3, inputs, width, rngs))
            setattr(self, f"norm_{i}", GroupNorm(config, width, rngs))
            inputs = width

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [R, H, W, C] -> [R, H / 2^S, W / 2^S, width of the last of S stages]."""
        for i in range(self.stages):
            x = pooled(jax.nn.relu(getattr(self, f"norm_{i}")(getattr(self, f"convolution_{i}")(x))), 2, 2)
        return x

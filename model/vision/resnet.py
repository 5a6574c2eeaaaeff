"""Residual networks (arXiv:1512.03385): basic and bottleneck blocks, the stride in the 3 x 3 convolution (v1.5) or,
as in the paper, in the first.

Normalised by groups, with standardised kernels (arXiv:1912.11370), which has no state and trains with any batch; or by
the statistics that a trained network with batch normalisation (arXiv:1502.03167) brings, which stay as they are.

Legend: R images, H, W pixels or vectors along a side, C channels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from model.config import ModelConfig
from model.linear import ones, parameter, zeros
from model.mlp import ACTIVATIONS
from model.vision.convolution import Convolution, GroupNorm, pooled

EXPANSION = 4  # of a bottleneck: its outputs for each of its inner channels
BATCH_NORM_EPS = 1e-5
FIXED_STATISTICS = ("mean", "variance")  # the names of what batch normalisation holds and no training moves


class FixedNorm(nnx.Module):
    """Batch normalisation by fixed mean and variance, which take no gradient."""

    def __init__(self, config: ModelConfig, channels: int, rngs: nnx.Rngs):
        self.scale = parameter(rngs, (channels,), ("norm",), config.weight_dtype, ones)
        self.bias = parameter(rngs, (channels,), ("norm",), config.weight_dtype, zeros)
        self.mean = parameter(rngs, (channels,), ("norm",), config.weight_dtype, zeros)
        self.variance = parameter(rngs, (channels,), ("norm",), config.weight_dtype, ones)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [R, H, W, C] -> the same shape and dtype."""
        mean, variance = (jax.lax.stop_gradient(w.get_value()) for w in (self.mean, self.variance))
        scale = self.scale.get_value() * jax.lax.rsqrt(variance + BATCH_NORM_EPS)
        return ((x.astype(jnp.float32) - mean) * scale + self.bias.get_value()).astype(x.dtype)


class Unit(nnx.Module):
    """A convolution and its normalisation."""

    def __init__(self, config: ModelConfig, size: int, inputs: int, outputs: int, rngs: nnx.Rngs, stride: int = 1):
        by_group = config.vision.conv_norm == "group"
        self.convolution = Convolution(config, size, inputs, outputs, rngs, stride, standardized=by_group)
        self.norm = (GroupNorm if by_group else FixedNorm)(config, outputs, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [R, H, W, C in] -> [R, H / stride, W / stride, C out]."""
        return self.norm(self.convolution(x))


class ResNetBlock(nnx.Module):
    """Two units of 3 x 3, or a bottleneck of 1 x 1, 3 x 3 and 1 x 1, beside x or, where the shape changes, a unit."""

    def __init__(self, config: ModelConfig, inputs: int, outputs: int, stride: int, rngs: nnx.Rngs):
        if config.vision.block == "basic":
            sizes = [(3, inputs, outputs, stride), (3, outputs, outputs, 1)]
        else:
            inner = outputs // EXPANSION
            first, second = (stride, 1) if config.vision.reduces_first else (1, stride)
            sizes = [(1, inputs, inner, first), (3, inner, inner, second), (1, inner, outputs, 1)]
        self.count, self.activation = len(sizes), ACTIVATIONS[config.vision.conv_activation]
        for i, (size, of, to, step) in enumerate(sizes):
            setattr(self, f"unit_{i}", Unit(config, size, of, to, rngs, step))
        changes = stride != 1 or inputs != outputs
        self.shortcut = Unit(config, 1, inputs, outputs, rngs, stride) if changes else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [R, H, W, C in] -> [R, H / stride, W / stride, C out]."""
        y = x
        for i in range(self.count):
            y = getattr(self, f"unit_{i}")(y if i == 0 else jax.nn.relu(y))
        return self.activation(y + (x if self.shortcut is None else self.shortcut(x)))


class ResNet(nnx.Module):
    """A stem of 7 x 7 with stride 2 and the maximum of 3 x 3, then stages of blocks, of which all but the first
    halve the sides, and it too with vision.first_stride."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        vision = config.vision
        self.stem = Unit(config, 7, vision.channels, vision.stem_width, rngs, 2)
        self.depths, inputs = vision.depths, vision.stem_width
        self.activation = ACTIVATIONS[vision.conv_activation]
        for stage, (width, depth) in enumerate(zip(vision.widths, vision.depths, strict=True)):
            for block in range(depth):
                stride = 1 if block else 2 if stage else vision.first_stride
                setattr(self, f"stage_{stage}_{block}", ResNetBlock(config, inputs, width, stride, rngs))
                inputs = width

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [R, H, W, C] -> [R, H / F, W / F, width of the last stage] with F = 2^(stages + 1) first_stride."""
        x = pooled(self.activation(self.stem(x)), 3, 2, 1)
        for stage, depth in enumerate(self.depths):
            for block in range(depth):
                x = getattr(self, f"stage_{stage}_{block}")(x)
        return x

"""The only place where an activation meets a weight matrix.

A weight is an array, or a small pytree class with a method `matmul(x, contract, dtype)` (a low-rank adapted, pruned or
quantised weight); no other file knows which.

Legend: N rows (all leading dimensions), I inputs, O outputs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from model.config import ModelConfig
from tpu import rules

Initializer = Callable[[jax.Array, tuple[int, ...], int, int], jax.Array]


def parameter(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], dtype: str, initialize: Callable
) -> nnx.Param:
    """Declares one weight: shape, one logical axis per dimension, and `initialize(key, shape)`, drawn in float32."""
    if len(axes) != len(shape):
        raise ValueError(f"axes {axes} do not name the dimensions of {shape}")
    return nnx.Param(initialize(rngs.params(), shape).astype(dtype), axes=axes)


def zeros(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The start of a bias."""
    return jnp.zeros(shape)


def ones(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The start of a norm's scale."""
    return jnp.ones(shape)


def initializer(config: ModelConfig, residual: bool = False) -> Initializer:
    """How weight matrices start: (key, shape, fan_in, fan_out) -> float32 array.

    "gpt2" (GPT-2 report, section 2.3): normal(init_std), and for projections into the residual stream divided by the
    square root of the number of such projections, 2 * layers. "normal": the same without that division. "fan_in":
    normal with variance 1 / fan_in (LeCun). "xavier": uniform with variance 2 / (fan_in + fan_out) (Glorot).
    """

    def initialize(key: jax.Array, shape: tuple[int, ...], fan_in: int, fan_out: int) -> jax.Array:
        if config.init == "xavier":
            limit = math.sqrt(6 / (fan_in + fan_out))
            return jax.random.uniform(key, shape, minval=-limit, maxval=limit)
        std = 1 / math.sqrt(fan_in) if config.init == "fan_in" else config.init_std
        if config.init == "gpt2" and residual:
            std /= math.sqrt(2 * config.layers)
        return std * jax.random.normal(key, shape)

    return initialize


class Linear(nnx.Module):
    """y = x W + b, contracting the last `len(inputs)` dimensions of x.

    Args:
      config: gives dtypes, initialisation and the form of the product.
      inputs, outputs: (size, logical axis) of each contracted and each produced dimension.
      bias: whether b exists (starts at zero).
      residual: whether the result is added to the residual stream.
    """

    def __init__(
        self,
        config: ModelConfig,
        inputs: tuple[tuple[int, str], ...],
        outputs: tuple[tuple[int, str], ...],
        bias: bool,
        rngs: nnx.Rngs,
        residual: bool = False,
    ):
        fan_in, fan_out = math.prod(s for s, _ in inputs), math.prod(s for s, _ in outputs)
        shape, axes = zip(*inputs, *outputs, strict=True)
        draw = initializer(config, residual)
        self.kernel = parameter(rngs, shape, axes, config.weight_dtype, lambda k, s: draw(k, s, fan_in, fan_out))
        out_shape, out_axes = zip(*outputs, strict=True)
        self.bias = parameter(rngs, out_shape, out_axes, config.weight_dtype, zeros) if bias else None
        self.contract = len(inputs)
        self.compute_dtype = config.compute_dtype
        self.platform = config.platform

    def __call__(self, x: jax.Array, dtype: str | None = None) -> jax.Array:
        """Returns [..., *outputs] in `dtype` (default: the compute dtype)."""
        kernel, result = self.kernel.get_value(), dtype or self.compute_dtype
        y = matmul(x, kernel, self.contract, self.compute_dtype, self.platform, result=result)
        return self.finish(y, dtype)

    def finish(self, y: jax.Array, dtype: str | None = None) -> jax.Array:
        """Adds the bias to the product y [..., *outputs] and rounds it to `dtype` (default: the compute dtype)."""
        if self.bias is not None:
            y = y + self.bias.get_value()
        return y.astype(dtype or self.compute_dtype)


def together(x: jax.Array, *linears: Linear) -> list[jax.Array]:
    """The results of several Linears of one input x [..., I].

    On CPU as one product, which is faster there. Where heads or columns lie along several devices, the gradients for x
    are one product too: devices then sum one partial result instead of several.
    """
    kernels = [linear.kernel.get_value() for linear in linears]
    first = linears[0]
    if not all(isinstance(kernel, jax.Array) for kernel in kernels):
        return [linear(x) for linear in linears]
    if first.platform != "cpu":
        if rules.devices_along("mlp") == 1:
            return [linear(x) for linear in linears]
        products = _fan_out(x, kernels, first.compute_dtype)
        return [linear.finish(y) for linear, y in zip(linears, products, strict=True)]
    widths = [math.prod(kernel.shape[1:]) for kernel in kernels]
    joined = jnp.concatenate([k.reshape(-1, width) for k, width in zip(kernels, widths, strict=True)], axis=1)
    parts = jax.lax.split(matmul(x, joined, 1, first.compute_dtype, "cpu"), widths, axis=x.ndim - 1)
    return [
        linear.finish(part.reshape(*x.shape[:-1], *kernel.shape[1:]))
        for linear, part, kernel in zip(linears, parts, kernels, strict=True)
    ]


def matmul(
    x: jax.Array,
    weight: Any,
    contract: int,
    dtype: str,
    platform: str,
    transposed: bool = False,
    result: str = "float32",
) -> jax.Array:
    """x [..., *inputs] times weight [*inputs, *outputs] -> [..., *outputs]; transposed, weight is [outputs, inputs].

    Operands are rounded to `dtype`; products are accumulated in float32 and returned in it (CPU) or rounded to `result`
    (elsewhere: what devices sum or exchange is then half as large). `contract` is the number of input dimensions;
    `platform` ("cpu", "gpu", "tpu") chooses the form that the compiler there does best.
    """
    if not isinstance(weight, jax.Array):
        return weight.matmul(x, contract, dtype)
    if platform != "cpu":
        return _matmul(x, weight, contract, dtype, transposed, result)
    rows, width = x.shape[: x.ndim - contract], math.prod(x.shape[x.ndim - contract :])
    if transposed:
        return _cpu_matmul(x.reshape(-1, width), weight, dtype, True).reshape(*rows, weight.shape[0])
    y = _cpu_matmul(x.reshape(-1, width), weight.reshape(width, -1), dtype, False)
    return y.reshape(*rows, *weight.shape[contract:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _matmul(x: jax.Array, w: jax.Array, contract: int, dtype: str, transposed: bool, result: str) -> jax.Array:
    """As `matmul`, with gradients that round the cotangent before they multiply, and write what they need, rounded."""
    w_axes = (w.ndim - 1,) if transposed else tuple(range(contract))
    return _dot(x.astype(dtype), w.astype(dtype), tuple(range(x.ndim - contract, x.ndim)), w_axes, result)


def _matmul_forward(
    x: jax.Array, w: jax.Array, contract: int, dtype: str, transposed: bool, result: str
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _matmul(x, w, contract, dtype, transposed, result), (x, w)


def _matmul_backward(
    contract: int, dtype: str, transposed: bool, result: str, saved: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, w = saved
    g = jax.lax.optimization_barrier(g.astype(dtype))  # Else what g is made of is computed anew for every tile.
    rows = x.ndim - contract
    outputs, leading = tuple(range(rows, g.ndim)), tuple(range(rows))
    dx = _dot(g, w.astype(dtype), outputs, (0,) if transposed else tuple(range(contract, w.ndim)), x.dtype)
    left, right = (g, x.astype(dtype)) if transposed else (x.astype(dtype), g)
    return _at_once(dx, _dot(left, right, leading, leading, w.dtype))


_matmul.defvjp(_matmul_forward, _matmul_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _fan_out(x: jax.Array, kernels: list[jax.Array], dtype: str) -> list[jax.Array]:
    """x [..., I] times each of the kernels [I, *outputs], rounded to `dtype`; gradients as those of `_matmul`."""
    return [_matmul(x, kernel, 1, dtype, False, dtype) for kernel in kernels]


def _fan_out_forward(
    x: jax.Array, kernels: list[jax.Array], dtype: str
) -> tuple[list[jax.Array], tuple[jax.Array, list[jax.Array]]]:
    return _fan_out(x, kernels, dtype), (x, kernels)


def _fan_out_backward(
    dtype: str, saved: tuple[jax.Array, list[jax.Array]], gradients: list[jax.Array]
) -> tuple[jax.Array, list[jax.Array]]:
    x, kernels = saved
    gradients = jax.lax.optimization_barrier([g.astype(dtype) for g in gradients])
    leading = tuple(range(x.ndim - 1))
    d_kernels = [_dot(x.astype(dtype), g, leading, leading, w.dtype) for g, w in zip(gradients, kernels, strict=True)]
    dx = jnp.zeros((), x.dtype)
    for shape in dict.fromkeys(kernel.shape for kernel in kernels):
        alike = [i for i, kernel in enumerate(kernels) if kernel.shape == shape]
        w = jnp.stack([kernels[i].astype(dtype) for i in alike])  # [n, I, *outputs]
        g = jnp.stack([gradients[i] for i in alike], len(leading))  # [..., n, *outputs]
        outputs = tuple(range(len(leading), g.ndim))
        dx = dx + _dot(g, w, outputs, (0, *range(2, w.ndim)), x.dtype)
    return _at_once(dx, d_kernels)


_fan_out.defvjp(_fan_out_forward, _fan_out_backward)


def _at_once(dx: jax.Array, d_weights: Any) -> tuple[jax.Array, Any]:
    """The gradients, of which neither is used before both are there.

    Else XLA leaves the weights' for the end of a layer, and keeps for it what was gathered along the tensor axis.
    """
    if rules.devices_along("mlp") == 1:
        return dx, d_weights
    return jax.lax.optimization_barrier((dx, d_weights))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _cpu_matmul(x: jax.Array, w: jax.Array, dtype: str, transposed: bool) -> jax.Array:
    """x [N, I] times w [I, O] (transposed: w [O, I]) -> [N, O] float32, with gradients in XLA:CPU's fast forms.

    Only products of two bfloat16 operands accumulated and returned in float32 reach the bfloat16 instructions, and a
    transposition folded into a product leaves the fast kernels (docs/performance.md).
    """
    return _dot(x.astype(dtype), w.astype(dtype), (1,), (1,) if transposed else (0,))


def _cpu_matmul_forward(x: jax.Array, w: jax.Array, dtype: str, transposed: bool) -> tuple[jax.Array, tuple]:
    return _cpu_matmul(x, w, dtype, transposed), (x.astype(dtype), jnp.zeros((0,), x.dtype), w)


def _cpu_matmul_backward(dtype: str, transposed: bool, saved: tuple, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, like_x, w = saved
    g = g.astype(dtype)
    dx = _dot(g, w.astype(dtype), (1,), (0,) if transposed else (1,))
    left, right = (g, x) if transposed else (x, g)
    if dtype == "float32":
        dw = _dot(left, right, (0,), (0,))
    else:
        dw = _dot(_moved(left), right, (1,), (0,))
    return dx.astype(like_x.dtype), dw.astype(w.dtype)


_cpu_matmul.defvjp(_cpu_matmul_forward, _cpu_matmul_backward)


def _dot(
    a: jax.Array, b: jax.Array, a_axes: tuple[int, ...], b_axes: tuple[int, ...], dtype: Any = jnp.float32
) -> jax.Array:
    return jax.lax.dot_general(a, b, ((a_axes, b_axes), ((), ())), preferred_element_type=dtype)


def _moved(a: jax.Array) -> jax.Array:
    """The transpose of a [N, I], moved in memory: the reshape keeps XLA from folding it into the product."""
    a = jax.lax.optimization_barrier(a)
    n, i = a.shape
    blocks = 2 if n % 2 == 0 else 1
    return a.reshape(blocks, n // blocks, i).transpose(2, 0, 1).reshape(i, n)

"""The only place where an activation meets a weight matrix.

A weight is an array or a `model.weights.Weight` (low-rank adapted, pruned or quantised); no other file asks which. One
that adapts another weight has that as `kernel`, and `adapt(x, y, contract, dtype, platform)` makes its product of the
kernel's. The doors: `matmul` and `together` for most products, `GroupedLinear.matrices` for those of experts, `look_up`
for rows of tables, `convolve` for images.

Legend: N rows (all leading dimensions), I inputs, O outputs, E groups of rows with a matrix each.
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
from model.weights import dense, is_weight
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
      start: what the kernel's initial values are multiplied by.
    """

    def __init__(
        self,
        config: ModelConfig,
        inputs: tuple[tuple[int, str], ...],
        outputs: tuple[tuple[int, str], ...],
        bias: bool,
        rngs: nnx.Rngs,
        residual: bool = False,
        start: float = 1.0,
    ):
        fan_in, fan_out = math.prod(s for s, _ in inputs), math.prod(s for s, _ in outputs)
        shape, axes = zip(*inputs, *outputs, strict=True)
        draw = initializer(config, residual)
        self.kernel = parameter(
            rngs, shape, axes, config.weight_dtype, lambda k, s: start * draw(k, s, fan_in, fan_out)
        )
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
            y = y + jax.lax.broadcast_to_rank(self.bias.get_value(), y.ndim)
        return y.astype(dtype or self.compute_dtype)


class GroupedLinear(nnx.Module):
    """Matrices W[e] [I, O] of the experts; where their rows are decides between `grouped_matmul` and `batched_matmul`.

    Args:
      config: gives dtypes and initialisation.
      inputs, outputs: (size, logical axis) of the contracted and the produced dimension.
      residual: whether the result is added to the residual stream.
    """

    def __init__(
        self,
        config: ModelConfig,
        inputs: tuple[int, str],
        outputs: tuple[int, str],
        rngs: nnx.Rngs,
        residual: bool = False,
    ):
        shape, axes = zip((config.experts, "experts"), inputs, outputs, strict=True)
        draw = initializer(config, residual)
        self.axes, self.compute_dtype = axes, config.compute_dtype
        self.kernel = parameter(rngs, shape, axes, config.weight_dtype, lambda k, s: draw(k, s, inputs[0], outputs[0]))

    def matrices(self) -> jax.Array:
        """All W [E, I, O] as one array: the products of groups take no other weight."""
        kernel = self.kernel.get_value()
        return kernel.dense().astype(self.compute_dtype) if is_weight(kernel) else kernel


def together(x: jax.Array, *linears: Linear) -> list[jax.Array]:
    """The results of several Linears of one input x [..., I].

    On CPU as one product, which is faster there. Where heads or columns lie along several devices, the gradients for x
    are one product too: devices then sum one partial result instead of several.
    """
    weights = [linear.kernel.get_value() for linear in linears]
    kernels, first = [_innermost(weight) for weight in weights], linears[0]
    if any(is_weight(kernel) for kernel in kernels):
        return [linear(x) for linear in linears]
    if first.platform != "cpu":
        if rules.devices_along("mlp") == 1:
            return [linear(x) for linear in linears]
        products = _fan_out(x, kernels, first.compute_dtype)
        return [linear.finish(_adapted(x, y, linear)) for linear, y in zip(linears, products, strict=True)]
    widths = [math.prod(kernel.shape[1:]) for kernel in kernels]
    joined = jnp.concatenate([k.reshape(-1, width) for k, width in zip(kernels, widths, strict=True)], axis=1)
    parts = jax.lax.split(matmul(x, joined, 1, first.compute_dtype, "cpu"), widths, axis=x.ndim - 1)
    return [
        linear.finish(_adapted(x, part.reshape(*x.shape[:-1], *kernel.shape[1:]), linear))
        for linear, part, kernel in zip(linears, parts, kernels, strict=True)
    ]


def _innermost(weight: Any) -> Any:
    """What is left of a weight without what adapts it."""
    return _innermost(weight.kernel) if hasattr(weight, "adapt") else weight


def _adapted(x: jax.Array, y: jax.Array, linear: Linear) -> jax.Array:
    """The product of x [..., I] and a Linear's weight from y, the product with its innermost kernel."""

    def adapted(weight: Any) -> jax.Array:
        if not hasattr(weight, "adapt"):
            return y
        return weight.adapt(x, adapted(weight.kernel), 1, linear.compute_dtype, linear.platform)

    return adapted(linear.kernel.get_value())


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
    if is_weight(weight):
        return weight.matmul(x, contract, dtype, platform, result, transposed)
    if platform != "cpu":
        return _matmul(x, weight, contract, dtype, transposed, result)
    rows, width = x.shape[: x.ndim - contract], math.prod(x.shape[x.ndim - contract :])
    if transposed:
        return _cpu_matmul(x.reshape(-1, width), weight, dtype, True).reshape(*rows, weight.shape[0])
    y = _cpu_matmul(x.reshape(-1, width), weight.reshape(width, -1), dtype, False)
    return y.reshape(*rows, *weight.shape[contract:])


def look_up(table: Any, indices: Any) -> jax.Array:
    """The rows [..., D] of a table [N, D] at `indices` [...] int32; in the table's dtype, of a `Weight` float32."""
    return table.rows(indices) if is_weight(table) else jnp.take(table, indices, axis=0)


def convolve(x: jax.Array, weight: Any, stride: int, padding: int, dtype: str, standardized: bool = False) -> jax.Array:
    """x [R, H, W, C in] convolved with weight [K, K, C in, C out] -> [R, H', W', C out] in `dtype`, as the operands.

    Standardised, every filter has mean 0 and variance 1 before it is used (arXiv:1903.10520).
    """
    kernel = dense(weight).astype(jnp.float32)
    if standardized:
        mean, variance = kernel.mean((0, 1, 2)), kernel.var((0, 1, 2))
        kernel = (kernel - mean) * jax.lax.rsqrt(variance + 1e-5)
    return jax.lax.conv_general_dilated(
        x.astype(dtype),
        kernel.astype(dtype),
        (stride, stride),
        [(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def exact_matmul(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [..., I] times weight [I, O] -> [..., O] float32, in float32 also where products are rounded by default."""
    axes = ((x.ndim - 1,), (0,)), ((), ())
    return jax.lax.dot_general(x.astype(jnp.float32), weight, axes, precision=jax.lax.Precision.HIGHEST)


def batched_matmul(x: jax.Array, weight: jax.Array, dtype: str) -> jax.Array:
    """x [E, N, I] times weight [E, I, O] -> [E, N, O] in `dtype`, to which the operands are rounded too."""
    axes = ((2,), (1,)), ((0,), (0,))
    y = jax.lax.dot_general(x.astype(dtype), weight.astype(dtype), axes, preferred_element_type=jnp.float32)
    return y.astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def grouped_matmul(x: jax.Array, weight: jax.Array, sizes: jax.Array, dtype: str, platform: str) -> jax.Array:
    """x [N, I], whose rows lie in E groups of `sizes` [E] int32, each times its own weight [E, I, O] -> [N, O].

    The work is that of the rows that there are. Rows behind the last group give zeros, and take none but zero
    gradients. Operands are rounded to `dtype`, which the result has; products are accumulated in float32.
    """
    return _grouped(x.astype(dtype), weight.astype(dtype), sizes, platform)


def _grouped_forward(
    x: jax.Array, weight: jax.Array, sizes: jax.Array, dtype: str, platform: str
) -> tuple[jax.Array, tuple]:
    return grouped_matmul(x, weight, sizes, dtype, platform), (x, weight, sizes)


def _grouped_backward(dtype: str, platform: str, saved: tuple, g: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x, weight, sizes = saved
    g = g.astype(dtype)
    dx = _grouped(g, weight.astype(dtype).swapaxes(1, 2), sizes, platform)
    return dx.astype(x.dtype), _outer_products(x.astype(dtype), g, sizes, platform).astype(weight.dtype), None


grouped_matmul.defvjp(_grouped_forward, _grouped_backward)


def _grouped(x: jax.Array, weight: jax.Array, sizes: jax.Array, platform: str) -> jax.Array:
    if platform == "cpu":  # A ragged product there is one with every matrix for every row.
        return _in_blocks(x, weight, sizes)
    y = jax.lax.ragged_dot(x, weight, sizes, preferred_element_type=x.dtype)
    return jnp.where(jnp.arange(len(x))[:, None] < sizes.sum(), y, 0)


def _outer_products(x: jax.Array, g: jax.Array, sizes: jax.Array, platform: str) -> jax.Array:
    """The sums of x [N, I] times g [N, O] over the rows of each group -> [E, I, O] float32 or, on TPU, their dtype."""
    if platform == "cpu":
        return _outer_products_in_blocks(x, g, sizes)
    tile = math.gcd(len(x), 512)
    if platform == "tpu" and tile >= 128:  # XLA makes one product for every group of all rows, masked.
        from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

        tiles = tile, min(1024, x.shape[1]), min(1024, g.shape[1])
        return tgmm(x.swapaxes(0, 1), g, sizes, x.dtype, tiles)
    numbers = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
    return jax.lax.ragged_dot_general(x, g, sizes, numbers, preferred_element_type=jnp.float32)


def _in_blocks(x: jax.Array, weight: jax.Array, sizes: jax.Array) -> jax.Array:
    """As `_grouped`, by a loop over blocks of rows; what a block has of the next group, that group writes over."""
    block, starts = _block(x), jnp.cumsum(sizes) - sizes
    rows = jnp.pad(x, ((0, block), (0, 0)))

    def group(e: jax.Array, out: jax.Array) -> jax.Array:
        def at(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            w, out = carry
            start = starts[e] + i * block
            y = _dot(jax.lax.dynamic_slice_in_dim(rows, start, block), w, (1,), (0,))
            return w, jax.lax.dynamic_update_slice_in_dim(out, y.astype(out.dtype), start, 0)

        def all_blocks(out: jax.Array) -> jax.Array:
            return jax.lax.fori_loop(0, -(-sizes[e] // block), at, (weight[e], out))[1]

        return jax.lax.cond(sizes[e] > 0, all_blocks, lambda out: out, out)

    out = jax.lax.fori_loop(0, len(weight), group, jnp.zeros((len(rows), weight.shape[2]), x.dtype))[: len(x)]
    return jnp.where(jnp.arange(len(x))[:, None] < sizes.sum(), out, 0)


def _outer_products_in_blocks(x: jax.Array, g: jax.Array, sizes: jax.Array) -> jax.Array:
    block, starts = _block(x), jnp.cumsum(sizes) - sizes
    x, g = (jnp.pad(a, ((0, block), (0, 0))) for a in (x, g))

    def group(_: None, e: jax.Array) -> tuple[None, jax.Array]:
        def add(i: jax.Array, total: jax.Array) -> jax.Array:
            left, right = (jax.lax.dynamic_slice_in_dim(a, starts[e] + i * block, block) for a in (x, g))
            mine = jnp.arange(block)[:, None] < sizes[e] - i * block
            return total + _dot(left, jnp.where(mine, right, 0), (0,), (0,))

        return None, jax.lax.fori_loop(0, -(-sizes[e] // block), add, jnp.zeros((x.shape[1], g.shape[1])))

    return jax.lax.scan(group, None, jnp.arange(len(sizes)))[1]


def _block(x: jax.Array) -> int:
    """Rows that XLA:CPU multiplies at a time: enough to reach its full speed, few enough to leave little over."""
    return min(128, len(x))


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

"""Low-rank adaptation (LoRA, arXiv:2106.09685): y = x W + scale (x A) B, where W is not trained and B starts at zero.

A weight matrix of a layer is adapted by putting a `LoRA` where the matrix was (`applied`); `model.linear` multiplies by
it as by any other weight. The same factors, one pair per layer, are what layers that share a matrix may differ by
(`model.stack`; relaxed recursive transformers, arXiv:2410.20672, section 2.3).

Legend: I inputs, O outputs (either may be several dimensions), R rank, L layers, B rows.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from model.dropout import dropout
from model.linear import look_up, matmul
from model.weights import axes_of, dense, inputs

FACTORS = ("lora_a", "lora_b")


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["kernel", *FACTORS, "keys"], meta_fields=["scale", "rate"]
)
@dataclasses.dataclass
class LoRA:
    """A `Weight` W [I, O] and what is added to it. Weights of stacked layers have more dimensions before these."""

    kernel: Any  # W: an array or another Weight
    lora_a: jax.Array  # A [I, R]
    lora_b: jax.Array  # B [R, O]
    keys: jax.Array | None = None  # [B] random keys of the dropout of x before A; None: no dropout
    scale: float = 1.0
    rate: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        """That of W."""
        return self.kernel.shape

    def matmul(
        self, x: jax.Array, contract: int, dtype: str, platform: str, result: str, transposed: bool = False
    ) -> jax.Array:
        """As `model.linear.matmul`."""
        y = matmul(x, self.kernel, contract, dtype, platform, transposed, result)
        if not transposed:
            return self.adapt(x, y, contract, dtype, platform)
        low = matmul(x, self.lora_b, contract, dtype, platform, transposed)
        added = matmul(low, self.lora_a, 1, dtype, platform, transposed)
        return (y.astype(jnp.float32) + self.scale * added).astype(y.dtype)

    def rows(self, indices: jax.Array) -> jax.Array:
        """The rows of a table W [N, D] and of what is added to it."""
        low = look_up(self.lora_a, indices).astype(jnp.float32)
        added = jnp.matmul(low, self.lora_b.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
        return look_up(self.kernel, indices).astype(jnp.float32) + self.scale * added

    def adapt(self, x: jax.Array, y: jax.Array, contract: int, dtype: str, platform: str) -> jax.Array:
        """The product of x [..., I] and this weight, from y [..., O], that of x and the kernel; in y's dtype."""
        x = dropout(x, self.rate, self.keys)
        low = matmul(x, self.lora_a, contract, dtype, platform)  # [..., R]
        added = matmul(low, self.lora_b, 1, dtype, platform)  # [..., O] float32
        return (y.astype(jnp.float32) + self.scale * added).astype(y.dtype)

    def dense(self) -> jax.Array:
        """W + scale A B as one float32 array, of one layer or of stacked ones."""
        return dense(self.kernel).astype(jnp.float32) + self.change()

    def axes(self, names: tuple[str, ...]) -> LoRA:
        """The logical axes of the parts, from those of W."""
        keys = None if self.keys is None else (*names[: self.stacking], "batch")
        pair = {name: axes for name, (_, axes) in factors(self.shape, names, self.lora_a.shape[-1]).items()}
        return dataclasses.replace(self, kernel=axes_of(self.kernel, names), **pair, keys=keys)

    def change(self) -> jax.Array:
        """scale A B in float32, with W's shape."""
        a, b, lead = self.lora_a.astype(jnp.float32), self.lora_b.astype(jnp.float32), self.stacking
        flat_a, flat_b = a.reshape(*a.shape[:lead], -1, a.shape[-1]), b.reshape(*b.shape[: lead + 1], -1)
        return self.scale * jnp.matmul(flat_a, flat_b, precision=jax.lax.Precision.HIGHEST).reshape(self.shape)

    @property
    def stacking(self) -> int:
        """The number of dimensions before I."""
        return self.lora_a.ndim + self.lora_b.ndim - 2 - len(self.shape)


def factors(shape: tuple[int, ...], axes: tuple[str, ...], rank: int) -> dict[str, tuple[tuple, tuple]]:
    """Shape and logical axes of A [L, I, R] and B [L, R, O] for a kernel [L, I, O] with these; experts are stacked as
    layers are."""
    lead, cut = inputs(axes).start, inputs(axes).stop
    return {
        "lora_a": ((*shape[:cut], rank), (*axes[:cut], "rank")),
        "lora_b": ((*shape[:lead], rank, *shape[cut:]), (*axes[:lead], "rank", *axes[cut:])),
    }


def draw_a(key: jax.Array, shape: tuple[int, ...], axes: tuple[str, ...]) -> jax.Array:
    """The start of A [L, I, R]: uniform with variance 1 / (3 I), as the authors' code has it. B starts at zero."""
    limit = 1 / math.sqrt(math.prod(shape[inputs(axes).start : -1]))
    return jax.random.uniform(key, shape, minval=-limit, maxval=limit)


def applied(weights: dict[str, Any], changes: dict[str, Any], adapt: Callable[..., Any] = LoRA) -> dict[str, Any]:
    """The nested weights with those of `changes` put in: whole weights as they are, pairs of factors around the old.

    `adapt` makes the adapted weight of the old one and, by name, the factors.
    """
    new = dict(weights)
    for name, change in changes.items():
        if isinstance(change, dict) and "lora_a" in change:
            new[name] = adapt(weights[name], **change)
        elif isinstance(change, dict):
            new[name] = applied(weights.get(name, {}), change, adapt)
        else:
            new[name] = change
    return new

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
from model.linear import matmul

FACTORS = ("lora_a", "lora_b")


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["kernel", *FACTORS, "keys"], meta_fields=["scale", "rate"]
)
@dataclasses.dataclass
class LoRA:
    """A weight W [I, O] and what is added to it. Weights of stacked layers have more dimensions before these."""

    kernel: Any  # W: an array, or another weight with a `matmul`
    lora_a: jax.Array  # A [I, R]
    lora_b: jax.Array  # B [R, O]
    keys: jax.Array | None = None  # [B] random keys of the dropout of x before A; None: no dropout
    scale: float = 1.0
    rate: float = 0.0

    def matmul(self, x: jax.Array, contract: int, dtype: str, platform: str, result: str) -> jax.Array:
        """As `model.linear.matmul`."""
        return self.adapt(
            x, matmul(x, self.kernel, contract, dtype, platform, result=result), contract, dtype, platform
        )

    def adapt(self, x: jax.Array, y: jax.Array, contract: int, dtype: str, platform: str) -> jax.Array:
        """The product of x [..., I] and this weight, from y [..., O], that of x and the kernel; in y's dtype."""
        x = dropout(x, self.rate, self.keys)
        low = matmul(x, self.lora_a, contract, dtype, platform)  # [..., R]
        added = matmul(low, self.lora_b, 1, dtype, platform)  # [..., O] float32
        return (y.astype(jnp.float32) + self.scale * added).astype(y.dtype)

    def merged(self) -> jax.Array:
        """W + scale A B as one float32 array, of one layer or of stacked ones."""
        return self.kernel.astype(jnp.float32) + self.change()

    def change(self) -> jax.Array:
        """scale A B in float32, with W's shape."""
        a, b, lead = self.lora_a.astype(jnp.float32), self.lora_b.astype(jnp.float32), self.stacking
        flat_a, flat_b = a.reshape(*a.shape[:lead], -1, a.shape[-1]), b.reshape(*b.shape[: lead + 1], -1)
        return self.scale * jnp.matmul(flat_a, flat_b, precision=jax.lax.Precision.HIGHEST).reshape(self.kernel.shape)

    @property
    def stacking(self) -> int:
        """The number of dimensions before I."""
        return self.lora_a.ndim + self.lora_b.ndim - 2 - self.kernel.ndim


def input_dimensions(axes: tuple[str, ...]) -> int:
    """How many dimensions of a kernel with these logical axes, those that stack layers left out, are inputs.

    Into the residual stream, all but the last are; out of it, the first.
    """
    return len(axes) - 1 if axes[-1] == "embed" else 1


def factors(shape: tuple[int, ...], axes: tuple[str, ...], rank: int) -> dict[str, tuple[tuple, tuple]]:
    """Shape and logical axes of A [L, I, R] and B [L, R, O] for a kernel [L, I, O] with these."""
    lead = axes.index("layers") + 1
    cut = lead + input_dimensions(axes[lead:])
    return {
        "lora_a": ((*shape[:cut], rank), (*axes[:cut], "rank")),
        "lora_b": ((*shape[:lead], rank, *shape[cut:]), (*axes[:lead], "rank", *axes[cut:])),
    }


def draw_a(key: jax.Array, shape: tuple[int, ...], axes: tuple[str, ...]) -> jax.Array:
    """The start of A [L, I, R]: uniform with variance 1 / (3 I), as the authors' code has it. B starts at zero."""
    limit = 1 / math.sqrt(math.prod(shape[axes.index("layers") + 1 : -1]))
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

"""Weight-decomposed low-rank adaptation (DoRA, arXiv:2402.09353): the length of every column is trained by itself.

W' = m V / |V| with V = W + scale A B (equation 5), where |V| is the length over the inputs of each output's column. It
is taken for a constant of the differentiation (section 4.3). What is trained of m is how much it differs from |W|: this
starts at zero, and an untouched weight is then the same to the last bit.

Legend as in `model.adapters.lora`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from model.adapters.lora import LoRA
from model.linear import matmul
from model.weights import dense


@functools.partial(jax.tree_util.register_dataclass, data_fields=["low_rank", "magnitude"], meta_fields=[])
@dataclasses.dataclass
class DoRA:
    """A low-rank adapted weight whose columns are longer than the kernel's by `magnitude` [O]."""

    low_rank: LoRA
    magnitude: jax.Array

    @property
    def kernel(self) -> Any:
        """What is adapted."""
        return self.low_rank.kernel

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the kernel."""
        return self.low_rank.shape

    def matmul(
        self, x: jax.Array, contract: int, dtype: str, platform: str, result: str, transposed: bool = False
    ) -> jax.Array:
        """As `model.linear.matmul`."""
        if transposed:
            x = (x.astype(jnp.float32) * self._stretch()).astype(x.dtype)
            return self.low_rank.matmul(x, contract, dtype, platform, result, transposed)
        y = matmul(x, self.kernel, contract, dtype, platform, result=result)
        return self.adapt(x, y, contract, dtype, platform)

    def rows(self, indices: jax.Array) -> jax.Array:
        """The rows of a table [N, D]."""
        return self.low_rank.rows(indices) * self._stretch()

    def adapt(self, x: jax.Array, y: jax.Array, contract: int, dtype: str, platform: str) -> jax.Array:
        """As `LoRA.adapt`."""
        y = self.low_rank.adapt(x, y, contract, dtype, platform)
        return (y.astype(jnp.float32) * self._stretch()).astype(y.dtype)

    def dense(self) -> jax.Array:
        """m V / |V| as one float32 array, of one layer or of stacked ones."""
        v, lead = self.low_rank.dense(), self.low_rank.stacking
        return v * jnp.expand_dims(self._stretch(), tuple(range(lead, lead + v.ndim - self.magnitude.ndim)))

    def axes(self, names: tuple[str, ...]) -> DoRA:
        """The logical axes of the parts, from those of the kernel."""
        low_rank = self.low_rank.axes(names)
        return DoRA(low_rank, tuple(name for name in low_rank.lora_b if name != "rank"))

    def _stretch(self) -> jax.Array:
        """m / |V|, [L, O]."""
        lead, inputs = self.low_rank.stacking, len(self.shape) - self.magnitude.ndim
        old = jax.lax.stop_gradient(dense(self.kernel).astype(jnp.float32))
        change = jax.lax.stop_gradient(self.low_rank.change())
        over_inputs = tuple(range(lead, lead + inputs))
        squares = jnp.square(old).sum(over_inputs)
        grown = (change * (2 * old + change)).sum(over_inputs)  # |V|^2 - |W|^2
        # In this form it is one to the last bit where nothing is changed, in whatever order the squares are summed.
        return (1 + self.magnitude / jnp.sqrt(squares)) / jnp.sqrt(1 + grown / squares)

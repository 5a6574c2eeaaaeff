"""From tokens to vectors, and from vectors to the logits of tokens."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from model.config import ModelConfig
from model.linear import Linear, initializer, look_up, matmul, parameter
from model.weights import axes_of
from tpu import rules


class Embedding(nnx.Module):
    """A table with one row per token or position; a tied head multiplies by its transpose."""

    def __init__(self, config: ModelConfig, rows: int, axis: str, rngs: nnx.Rngs):
        draw = initializer(config)
        if config.init in ("fan_in", "xavier"):

            def initialize(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
                return config.init_std * jax.random.normal(key, shape)
        else:

            def initialize(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
                return draw(key, shape, *shape)

        self.embedding = parameter(
            rngs, (rows, config.embed_dim), (axis, "table_embed"), config.weight_dtype, initialize
        )
        self.compute_dtype, self.platform = config.compute_dtype, config.platform

    def __call__(self, indices: jax.Array) -> jax.Array:
        """indices [B, T] int32 -> [B, T, D] in the compute dtype."""
        table = self.embedding.get_value()
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            return look_up(table, indices).astype(self.compute_dtype)
        rows = rules.partition_spec(("batch", "residual_sequence"), mesh, indices.shape)
        by_column = ("positions", "embed")
        columns = rules.partition_spec(by_column, mesh, table.shape)
        shared = tuple(axis for axis in rules.axes_in(columns) if axis in rules.axes_in(PartitionSpec(rows[0])))

        def lay_out(part: jax.Array, names: tuple[str, ...]) -> PartitionSpec:
            kept_whole = tuple(axis for axis in mesh.axis_names if axis not in shared)
            return rules.without(rules.partition_spec(names, mesh, part.shape), kept_whole)

        def on_device(table: Any, indices: jax.Array) -> jax.Array:
            # Each device looks up some columns for the rows of all: exchanging those moves less than the table would.
            if shared:
                indices = jax.lax.all_gather(indices, shared, axis=0, tiled=True)
            h = look_up(table, indices)
            return jax.lax.all_to_all(h, shared, split_axis=0, concat_axis=2, tiled=True) if shared else h

        layout = PartitionSpec(*rows, None)
        across = jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(jax.tree.map(lay_out, table, axes_of(table, by_column)), rows),
            out_specs=layout,
            axis_names=rules.free_axes(mesh),
            check_vma=False,
        )
        return across(table, indices).astype(self.compute_dtype)

    def logits(self, h: jax.Array) -> jax.Array:
        """h [..., D] -> [..., V] float32."""
        return matmul(h, self.embedding.get_value(), 1, self.compute_dtype, self.platform, transposed=True)


class Head(nnx.Module):
    """The output projection, tied to the token embedding or its own, with an optional soft-cap on the logits."""

    def __init__(self, config: ModelConfig, embedding: Embedding, rngs: nnx.Rngs):
        self.embedding = embedding if config.tied_head else None
        embed, vocab = ((config.embed_dim, "table_embed"),), ((config.vocab_size, "vocab"),)
        self.linear = None if config.tied_head else Linear(config, embed, vocab, False, rngs)
        self.softcap = config.logits_softcap

    def __call__(self, h: jax.Array) -> jax.Array:
        """h [..., D] -> logits [..., V] float32."""
        logits = self.linear(h, "float32") if self.embedding is None else self.embedding.logits(h)
        return self.softcap * jnp.tanh(logits / self.softcap) if self.softcap else logits

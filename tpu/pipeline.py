"""Pipeline parallelism: stages of layers on different devices, micro-batches passing through them in a circle.

The circular schedule of Megatron's interleaving (arXiv:2104.04473, section 2.2), all stages in step: at tick t, stage s
works on item k = t - s, which is repeat r = k // S mod R of micro-batch m = k // (R S) S + k mod S. A micro-batch
leaves the last stage just as the first needs it again, so one ring of activations is the only buffer.

Legend: S stages, R repeats (parts of the model per stage), M micro-batches, P groups of layers per part, b rows of a
micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from tpu.rules import RULES

(STAGE,) = RULES["layers"]


def bubble_fraction(stages: int, repeats: int, microbatches: int) -> float:
    """The share of ticks in which a stage works on nothing that counts: (S - 1) / (M R + S - 1)."""
    return (stages - 1) / (microbatches * repeats + stages - 1)


def pipeline(
    part: Callable[[Any, jax.Array, jax.Array, Any, jax.Array], tuple[jax.Array, Any]],
    weights: Any,
    x: jax.Array,
    side: Any,
    microbatches: int,
) -> tuple[jax.Array, Any]:
    """Sends the rows of x through all layers, as parts that lie on the devices of the stage axis.

    Call under `jax.set_mesh` with a stage axis above 1; every other axis stays automatic inside `part`.

    Args:
      part: (weights of the stage [R, P, ...], repeat, activations [b, ...], side of these rows, number of the first
        group of layers) -> (activations, figures: pytree of [P, ...] leaves, sums over the rows). What it takes of the
        weights inside a `jax.checkpoint` is not saved.
      weights: leaves [R, S * P, ...], their second dimension cut along the stage axis; the order of the groups of
        layers is the order of the leaves' first two dimensions.
      x: activations [B, ...] before the first layer.
      side: pytree of [B, ...] leaves that every part reads (segments, positions, random keys).
      microbatches: M, a multiple of S that divides B.

    Returns:
      The activations [B, ...] after the last layer, and the figures [R, S * P, ...] summed over all rows.
    """
    mesh = jax.sharding.get_abstract_mesh()
    stages, repeats = mesh.shape[STAGE], jax.tree.leaves(weights)[0].shape[0]
    groups = jax.tree.leaves(weights)[0].shape[1] // stages
    ticks = microbatches * repeats + stages - 1
    ring = [(s, (s + 1) % stages) for s in range(stages)]

    def split(a: jax.Array) -> jax.Array:
        # Every M-th row, not every run of B / M: each device then keeps the rows it has.
        return a.reshape(-1, microbatches, *a.shape[1:]).swapaxes(0, 1)

    def run(numbers: jax.Array, weights: Any, x: jax.Array, side: Any) -> tuple[jax.Array, Any]:
        stage = numbers[0]

        def tick(carry: tuple[jax.Array, jax.Array, Any], t: jax.Array) -> tuple[tuple, None]:
            h, done, sums = carry
            # Before its first and after its last item a stage does one of them again, and nobody reads the result.
            item = jnp.clip(t - stage, 0, microbatches * repeats - 1)
            repeat = item // stages % repeats
            row = item // (repeats * stages) * stages + item % stages
            h = jnp.where((stage == 0) & (repeat == 0), x[row], h)
            first = (repeat * stages + stage) * groups
            h, figures = part(weights, repeat, h, jax.tree.map(lambda a: a[row], side), first)
            done = done.at[row].set(jnp.where(repeat == repeats - 1, h, done[row]))
            counts = item == t - stage
            sums = jax.tree.map(lambda s, f: s.at[repeat].add(jnp.where(counts, f, 0)), sums, figures)
            return (jax.lax.ppermute(h, STAGE, ring), done, sums), None

        shapes = jax.eval_shape(part, weights, 0, x[0], jax.tree.map(lambda a: a[0], side), 0)[1]
        zeros = jax.tree.map(lambda f: jnp.zeros((repeats, *f.shape), f.dtype), shapes)
        _, done, sums = jax.lax.scan(tick, (x[0], x, zeros), jnp.arange(ticks))[0]
        return done[None], sums

    along = PartitionSpec(STAGE)
    staged = jax.shard_map(
        run,
        mesh=mesh,
        axis_names={STAGE},
        check_vma=False,  # so that `part` may hold shard_maps of its own
        in_specs=(along, PartitionSpec(None, STAGE), PartitionSpec(), PartitionSpec()),
        out_specs=(along, PartitionSpec(None, STAGE)),
    )
    done, sums = staged(jnp.arange(stages), weights, split(x), jax.tree.map(split, side))
    return done[-1].swapaxes(0, 1).reshape(x.shape), sums

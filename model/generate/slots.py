"""Rows that come and go while others are being generated: pure functions on `model.generate.decode.Rows`.

A server and a rollout keep so many rows going. `vacant` makes room for them, `put` gives a place to a prompt that has
been read by itself, `decode` draws for all of them, and `end` stops those that are done with. A row's tokens are those
that it would get alone.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from model.attention.cache import row_axes
from model.generate.decode import Rows


def vacant(row: Rows, count: int) -> Rows:
    """`count` places, each with room for a row like `row`, a single one; they count as finished."""
    rows = _by_row(lambda axis, a: jnp.repeat(a, count, axis), row)
    return rows._replace(finished=jnp.ones((count,), bool))


def put(rows: Rows, index: jax.Array, row: Rows) -> Rows:
    """`rows` with `row`, a single one of as many slots, in the place number `index`, whatever was there before."""
    return _by_row(lambda axis, a, b: jax.lax.dynamic_update_slice_in_dim(a, b, index, axis), rows, row)


def end(rows: Rows, which: jax.Array) -> Rows:
    """`rows`, of which those where `which` [B] bool draw no more tokens."""
    return rows._replace(finished=rows.finished | which)


def _by_row(function: Callable[..., jax.Array], *several: Rows) -> Rows:
    """`function` of the dimension of the rows and the arrays themselves, for every array of Rows alike in structure."""
    first = several[0]
    axes = jax.tree.map(lambda _: 0, first)
    axes = axes._replace(cache=axes.cache._replace(layers=row_axes(first.cache.layers)))
    return jax.tree.map(function, axes, *several)

"""Weights from files onto a mesh, a piece at a time: the host holds one piece, the devices the rest."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from model.families.mapping import PeerWeights
from model.kinds import build
from model.weights import Weights
from tpu import rules

Read = Callable[[tuple[int, ...], tuple[slice, ...]], np.ndarray]


def load(peer: PeerWeights, config: Any, mesh: jax.sharding.Mesh) -> Weights:
    """The weights of a peer's files for a placed model, laid out on `mesh` as `tpu.rules` says."""
    _, abstract, axes = build(config)
    shardings = rules.tree_shardings(mesh, axes, abstract)

    def put(path: tuple, leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        target = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        return assemble(target, peer.lead(name), functools.partial(peer.read, name))

    return jax.tree_util.tree_map_with_path(put, abstract, shardings)


def shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """The shape of every weight of a placed model by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(build(config)[1])
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape for path, leaf in leaves}


def assemble(target: jax.ShapeDtypeStruct, lead: int, read: Read) -> jax.Array:
    """An array of this shape, dtype and sharding.

    `read(where, region)` gives what lies at `where` along the first `lead` dimensions, of it the region. A callback for
    whole shards (jax.make_array_from_callback) would need the host to hold all layers of one at once.
    """
    parts = []
    for device, index in target.sharding.addressable_devices_indices_map(target.shape).items():
        index = tuple(slice(*s.indices(size)[:2]) for s, size in zip(index, target.shape, strict=True))
        onto = jax.sharding.SingleDeviceSharding(device)
        if not lead:
            parts.append(jax.block_until_ready(jax.device_put(read((), index), onto).astype(target.dtype)))
            continue
        part = jnp.zeros([s.stop - s.start for s in index], target.dtype, device=onto)
        for where in itertools.product(*(range(s.start, s.stop) for s in index[:lead])):
            offset = tuple(at - s.start for at, s in zip(where, index[:lead], strict=True))
            # The host would otherwise read on, and hold what has not yet arrived.
            part = jax.block_until_ready(_put(part, jax.device_put(read(where, index[lead:]), onto), offset))
        parts.append(part)
    return jax.make_array_from_single_device_arrays(target.shape, target.sharding, parts)


@functools.partial(jax.jit, donate_argnums=0)
def _put(array: jax.Array, piece: jax.Array, offset: tuple[int, ...]) -> jax.Array:
    return array.at[offset].set(piece.astype(array.dtype))

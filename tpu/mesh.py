"""The device mesh: one call site, all six axes always present, sizes from the experiment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import jax
from jax.sharding import AxisType, Mesh

from tpu.errors import UserError
from tpu.rules import MESH_AXES


class MeshSizes(Protocol):
    """What `make_mesh` reads: the number of devices along each axis."""

    data: int
    fsdp: int
    tensor: int
    sequence: int
    expert: int
    stage: int


def make_mesh(sizes: MeshSizes, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arranges `devices` (default: all) along the mesh axes.

    Axis types are Auto: the compiler propagates shardings from the constraints of `tpu.rules`.
    Raises UserError where the sizes do not multiply to the device count.
    """
    shape = tuple(getattr(sizes, axis) for axis in MESH_AXES)
    product = 1
    for size in shape:
        product *= size
    devices = jax.devices() if devices is None else devices
    if product != len(devices):
        given = (
            " * ".join(f"mesh.{axis}={size}" for axis, size in zip(MESH_AXES, shape, strict=True) if size > 1) or "mesh"
        )
        raise UserError(f"{given} needs {product} devices: there are {len(devices)}")
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices)

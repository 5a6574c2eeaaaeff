"""The device mesh: one call site, all six axes always present, sizes from the experiment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from tpu.errors import UserError
from tpu.rules import MESH_AXES


class MeshSizes(Protocol):
    """What `make_mesh` reads: the number of devices along each axis, of which `slices` lie along `slice_axis`."""

    data: int
    fsdp: int
    tensor: int
    sequence: int
    expert: int
    stage: int
    slices: int
    slice_axis: str


def make_mesh(sizes: MeshSizes, devices: Sequence[Any] | None = None) -> Mesh:
    """Arranges `devices` (default: all) along the mesh axes, near ones along the axes that talk most.

    Within a slice the order follows the physical torus; a mesh axis takes whole torus axes where its size allows it.
    Several slices lie along `slice_axis`, outermost there. Axis types are Auto: the compiler propagates shardings from
    the constraints of `tpu.rules`. Raises UserError where the sizes do not multiply to the device count, or where the
    devices are another number of slices.
    """
    shape = [getattr(sizes, axis) for axis in MESH_AXES]
    devices = list(jax.devices() if devices is None else devices)
    if np.prod(shape) != len(devices):
        named = [f"mesh.{axis}={size}" for axis, size in zip(MESH_AXES, shape, strict=True) if size > 1]
        raise UserError(f"{' * '.join(named) or 'mesh'} needs {np.prod(shape)} devices: there are {len(devices)}")
    at = MESH_AXES.index(sizes.slice_axis)
    shape[at] //= sizes.slices
    blocks = [_arranged(shape, part) for part in _slices(devices, sizes.slices)]
    return Mesh(np.concatenate(blocks, axis=at), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _arranged(shape: Sequence[int], devices: list[Any]) -> np.ndarray:
    try:
        return mesh_utils.create_device_mesh(shape, devices)
    except NotImplementedError:  # No product of whole torus axes has these sizes.
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def _slices(devices: list[Any], count: int) -> list[list[Any]]:
    """The devices of each slice; simulated devices and GPUs are cut into runs of equal length."""
    index = [getattr(device, "slice_index", 0) for device in devices]  # absent where there is but one
    if devices[0].platform != "tpu":
        index = [i * count // len(devices) for i in range(len(devices))]
    found = sorted(set(index))
    if len(found) != count:
        raise UserError(f"mesh.slices={count}: the devices form {len(found)}")
    return [[device for device, of in zip(devices, index, strict=True) if of == wanted] for wanted in found]

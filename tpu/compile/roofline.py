"""How long a compiled step takes by the public figures of its chip: a model of a few lines, not a measurement.

    step = max(compute, memory) + exposed network

- compute: libtpu's `estimated_cycles` over the clock, and the FLOPs of attention kernels, of which libtpu estimates
  nothing, at KERNEL_UTILISATION of the peak. Where there is no estimate of cycles, all FLOPs at the peak.
- memory: the bytes that instructions move over the bandwidth of HBM.
- network: what a ring algorithm moves (Chan et al. 2007, doi:10.1002/cpe.1206) over the links of the torus dimensions
  that the mesh axis takes: two links per closed ring, one per open line. Between slices, the chip's share of its host's
  network. Exposed is what the compiler left blocking, and what of the rest exceeds max(compute, memory).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from tpu.chips import Topology

if TYPE_CHECKING:
    from tpu.compile.hlo_collectives import Collective
    from tpu.compile.hlo_counts import Counts

KERNEL_UTILISATION = 0.5  # of the peak, by flash attention kernels at a head_dim of 128


@dataclasses.dataclass
class Roofline:
    """Seconds of one step on one device."""

    compute: float
    memory: float
    network: dict[str, float]  # by mesh axis; "data (dcn)" between slices
    exposed: float

    @property
    def step(self) -> float:
        """The expected seconds of a step."""
        return max(self.compute, self.memory) + self.exposed

    @property
    def limit(self) -> str:
        """What takes the most: compute, memory or network."""
        seconds = {"compute": self.compute, "memory": self.memory, "network": sum(self.network.values())}
        return max(seconds, key=seconds.get)


def roofline(counts: Counts, kernel_flops: float, topology: Topology, mesh: Any) -> Roofline:
    """The seconds of what one device does.

    Args:
      counts: from the compiled program.
      kernel_flops: operations of opaque kernels, per device.
      topology: whose chip is known.
      mesh: the jax mesh that the program was compiled for.
    """
    chip = topology.chip
    peak = chip.peak_flops / chip.devices
    if counts.cycles:
        compute = counts.cycles / chip.clock + kernel_flops / (peak * KERNEL_UTILISATION)
    else:
        compute = (counts.matmul_flops + kernel_flops) / peak
    memory = counts.memory_bytes / (chip.hbm_bandwidth / chip.devices)
    network: dict[str, float] = {}
    blocking = 0.0
    for row in counts.collectives:
        seconds = collective_seconds(row, topology, mesh)
        name = row.axis if row.network == "ici" else f"{row.axis} ({row.network})"
        network[name] = network.get(name, 0.0) + seconds
        blocking += seconds * row.blocking_bytes / row.bytes if row.bytes else 0.0
    beside = sum(network.values()) - blocking
    return Roofline(compute, memory, network, blocking + max(0.0, beside - max(compute, memory)))


def collective_seconds(row: Collective, topology: Topology, mesh: Any) -> float:
    """Seconds on the links of all executions of one row."""
    chip, n = topology.chip, max(row.group, 1)
    if row.network == "dcn":
        lengths: list[tuple[int, bool]] = []
        link = bandwidth = chip.network_bandwidth / chip.devices
    else:
        lengths = rings(row.axis, topology, mesh)
        link = chip.link_bandwidth / chip.devices
        bandwidth = sum(2 * link if closed else link for _, closed in lengths) or link
    others = (n - 1) / n
    if row.kind in ("all-gather", "reduce-scatter"):
        return row.bytes * others / bandwidth
    if row.kind == "all-reduce":
        return 2 * row.bytes * others / bandwidth
    if row.kind == "collective-permute":  # to neighbours, as a rule half of them each way
        return row.bytes / (2 * link if any(closed for _, closed in lengths) else link)
    # All-to-all: on a ring the bytes go a quarter of it on average, over two links; a line's middle link sees half.
    return max((row.bytes * length / (8 if closed else 4) for length, closed in lengths), default=row.bytes) / link


def rings(axis: str, topology: Topology, mesh: Any) -> list[tuple[int, bool]]:
    """The dimensions of the torus along which lie the devices of mesh axes such as "data+fsdp": (length, closed)."""
    names = axis.removesuffix(" in part").split("+")
    if not set(names) <= set(mesh.axis_names):
        return [(topology.chips, False)]
    first = tuple(slice(None) if name in names else 0 for name in mesh.axis_names)
    devices = mesh.devices[first].flatten()
    slices = {getattr(device, "slice_index", 0) for device in devices}
    devices = [device for device in devices if getattr(device, "slice_index", 0) == min(slices)]
    found = []
    for dimension, whole in enumerate(topology.shape):
        length = len({device.coords[dimension] for device in devices})
        if length > 1:
            found.append((length, length == whole and length % topology.chip.ring_lengths == 0))
    return found

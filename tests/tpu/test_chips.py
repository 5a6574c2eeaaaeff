"""The table of chips, names of topologies, and what a step costs by the figures in the table."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tpu import chips
from tpu.chips import CHIPS, Topology, parse_topology, smallest
from tpu.compile.cost import run_cost
from tpu.compile.hlo_collectives import Collective
from tpu.compile.hlo_counts import Counts
from tpu.compile.roofline import collective_seconds, rings, roofline
from tpu.errors import UserError

GIB = 2**30


def test_names_round_trip_for_every_shape():
    for chip in CHIPS.values():
        for shape in chips.shapes(chip):
            topology = parse_topology(f"{chip.name}:{'x'.join(map(str, shape))}")
            assert (topology.chip, topology.shape, topology.chips) == (chip, shape, math.prod(shape))
            assert parse_topology(str(topology)) == topology
            assert topology.chips <= chip.most_chips
    assert parse_topology("cpu:8") == Topology(None, (8,))
    assert parse_topology("v7x:2x2x1").devices == 8  # two cores a chip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5p:3x3x3", r"--topology=v5p:3x3x3: no such slice; valid: v5p:2x2x1, .*v5p:8x8x8.*multiples of 4"),
        ("v5p:8x8", "no such slice"),
        ("v5p:8x8x4", "no such slice"),
        ("v5p:", "no such slice"),
        ("v5e:32x32", "valid: v5e:1x1, v5e:2x2, v5e:2x4, v5e:4x4, v5e:4x8, v5e:8x8, v5e:8x16, v5e:16x16$"),
        ("v9:2x2", "no such chip; valid: v4, v5e, v5p, v6e, v7x, cpu"),
        ("", "no such chip"),
        ("cpu:0", "number of simulated devices"),
        ("cpu:2x2", "number of simulated devices"),
    ],
)
def test_other_names_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        parse_topology(text)


def test_the_smallest_slice_is_the_smallest():
    assert str(smallest(CHIPS["v5p"], 512)) == "v5p:8x8x8"
    assert str(smallest(CHIPS["v5e"], 5)) == "v5e:2x4"
    assert smallest(CHIPS["v5e"], 257) is None
    for chip in CHIPS.values():
        for count in (1, 3, 17, 64, 200):
            assert smallest(chip, count).chips == min(n for n in map(math.prod, chips.shapes(chip)) if n >= count)


def test_peaks_agree_with_clocks_and_matrix_units():
    """The peak is what the matrix units do in a cycle, times the clock; v5p as published at 459 TFLOP/s."""
    for name, cells in (("v4", 8 * 128**2), ("v5e", 4 * 128**2), ("v5p", 8 * 128**2), ("v6e", 4 * 256**2)):
        assert CHIPS[name].peak_flops == pytest.approx(2 * cells * CHIPS[name].clock, rel=0.01)
    assert CHIPS["v7x"].peak_flops == pytest.approx(2 * 2 * 4 * 256**2 * CHIPS["v7x"].clock, rel=0.01)
    assert [CHIPS[name].hbm_bytes // GIB for name in ("v4", "v5e", "v5p", "v6e")] == [32, 16, 95, 32]
    assert chips.gpu_chip("NVIDIA H200").name == "h200"
    with pytest.raises(UserError, match=r"no figures for 'GeForce' .* known: a100, h100, h200"):
        chips.gpu_chip("GeForce")


def mesh_on(shape: tuple[int, ...], axes: dict[str, int]) -> SimpleNamespace:
    """A mesh that takes the coordinates of a slice in order."""
    devices = np.array([SimpleNamespace(coords=c) for c in np.ndindex(*shape)]).reshape(tuple(axes.values()))
    return SimpleNamespace(devices=devices, axis_names=tuple(axes), size=devices.size)


def test_rings_of_a_mesh_axis():
    topology = parse_topology("v5p:8x8x8")
    mesh = mesh_on((8, 8, 8), {"fsdp": 64, "tensor": 8})
    assert rings("tensor", topology, mesh) == [(8, True)]
    assert rings("fsdp", topology, mesh) == [(8, True), (8, True)]
    assert rings("fsdp+tensor", topology, mesh) == [(8, True)] * 3
    half = mesh_on((8, 8, 8), {"fsdp": 128, "tensor": 4})
    assert rings("tensor", topology, half) == [(4, False)]
    small = mesh_on((4, 4), {"fsdp": 4, "tensor": 4})
    assert rings("tensor", parse_topology("v5e:4x4"), small) == [(4, False)]  # closed at 16 only


def test_seconds_of_collectives_by_their_formulas():
    topology, size = parse_topology("v5p:8x8x8"), 10**9
    mesh = mesh_on((8, 8, 8), {"fsdp": 64, "tensor": 8})

    def seconds(kind: str, axis: str = "tensor", group: int = 8, network: str = "ici") -> float:
        return collective_seconds(Collective(kind, axis, group, network, 1, 1, size), topology, mesh)

    ring = 2 * CHIPS["v5p"].link_bandwidth
    assert seconds("all-gather") == pytest.approx(size * 7 / 8 / ring)
    assert seconds("all-gather", "fsdp", 64) == pytest.approx(size * 63 / 64 / (2 * ring))
    assert seconds("all-reduce") == pytest.approx(2 * seconds("all-gather"))
    assert seconds("reduce-scatter") == pytest.approx(seconds("all-gather"))  # counted by what is scattered
    assert seconds("collective-permute") == pytest.approx(size / ring)
    assert seconds("all-to-all") == pytest.approx(size * 8 / 8 / CHIPS["v5p"].link_bandwidth)
    assert seconds("all-gather", group=2, network="dcn") == pytest.approx(size / 2 / 6.25e9)


def test_the_step_is_the_slower_of_compute_and_memory_and_what_is_exposed():
    topology, mesh = parse_topology("v5p:8x8x8"), mesh_on((8, 8, 8), {"fsdp": 64, "tensor": 8})
    gather = Collective("all-gather", "tensor", 8, "ici", 1, 1, 10**9, blocking_bytes=0)
    counts = Counts(matmul_flops=1, cycles=1_750_000_000, memory_bytes=2765 * 10**9 // 2, collectives=[gather])
    found = roofline(counts, 0, topology, mesh)
    assert (found.compute, found.memory) == (pytest.approx(1.0), pytest.approx(0.5))
    assert (found.exposed, found.step, found.limit) == (0.0, pytest.approx(1.0), "compute")
    gather.blocking_bytes = gather.bytes // 2
    assert roofline(counts, 0, topology, mesh).step == pytest.approx(1.0 + found.network["tensor"] / 2)
    gather.bytes, gather.blocking_bytes = 10**12, 0
    slow = roofline(counts, 0, topology, mesh)
    assert slow.step == pytest.approx(slow.network["tensor"])
    assert slow.limit == "network"
    assert roofline(counts, 459e12, topology, mesh).compute == pytest.approx(1.0 + 2.0)  # kernels at half of the peak
    counts.cycles = 0
    counts.matmul_flops = 459 * 10**12
    assert roofline(counts, 0, topology, mesh).compute == pytest.approx(1.0)


def test_the_cost_of_a_run():
    prices = json.loads((Path(chips.__file__).parent / "compile" / "prices.json").read_text())
    assert set(prices["prices"]) == set(CHIPS)
    assert prices["source"].startswith("https://")
    assert prices["date"].startswith("20")
    found = run_cost(step_seconds=36.0, steps=1000, chip=CHIPS["v5p"], chips=512, prices=prices)
    assert found["chip_hours"] == pytest.approx(5120)
    assert found["cost"] == pytest.approx(5120 * prices["prices"]["v5p"])
    assert found["kwh_estimate"] == pytest.approx(5120 * CHIPS["v5p"].watts / 1000)
    prices["prices"]["v5p"] = None
    assert run_cost(36.0, 1000, CHIPS["v5p"], 512, prices)["cost"] is None

"""Public figures of the chips that a program can be compiled for, and the shapes in which they are rented.

Rates are in decimal units per second, memory in binary. The sources:

- v4: https://cloud.google.com/tpu/docs/v4; links, clock: Jouppi et al. 2023, arXiv:2304.01433, table 4
- v5e: https://cloud.google.com/tpu/docs/v5e; v5p: https://cloud.google.com/tpu/docs/v5p
- v6e: https://cloud.google.com/tpu/docs/v6e; v7x: https://cloud.google.com/tpu/docs/tpu7x
- Links: these pages give the bandwidth of a chip over all its links and both directions; `link_bandwidth` is that
  divided by twice the number of links, two per dimension of the torus.
- Clocks of v5e to v7x: the peak divided by the operations of a cycle, two for each cell of four matrix units a core
  (128 x 128 cells up to v5p, 256 x 256 after). They turn libtpu's `estimated_cycles` into seconds.
- Power: v4 as measured by Google, the highest value, on the page named above; v7x from "nearly 10 MW" for 9,216 chips,
  hosts and network included (https://blog.google/products/google-cloud/ironwood-tpu-age-of-inference/). Of the others
  Google has published none: they stand at 0.7 W per peak TFLOP/s, as v4 has, and are guesses.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re

from tpu.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip. Where jax counts cores as devices (v7x), a device has its share of all rates and of the memory."""

    name: str
    libtpu_name: str
    peak_flops: float  # bfloat16 operations per second
    hbm_bytes: int
    hbm_bandwidth: float  # bytes per second
    link_bandwidth: float  # bytes per second over one link in one direction
    torus: int  # dimensions
    ring_lengths: int  # a dimension of a multiple of this length is closed to a ring
    network_bandwidth: float  # bytes per second in one direction between slices
    clock: float  # cycles per second
    devices: int  # that jax counts per chip
    watts: float
    small_shapes: tuple[tuple[int, ...], ...]  # of a slice; in three dimensions also all multiples of 4
    most_chips: int  # in a slice


_PLANES = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_BOXES = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))

CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "v4", 275e12, 32 * GIB, 1200e9, 50e9, 3, 4, 6.25e9, 1.05e9, 1, 192, _BOXES, 4096),
        Chip("v5e", "v5e", 197e12, 16 * GIB, 819e9, 50e9, 2, 16, 3.125e9, 1.5e9, 1, 138, _PLANES, 256),
        Chip("v5p", "v5p", 459e12, 95 * GIB, 2765e9, 100e9, 3, 4, 6.25e9, 1.75e9, 1, 321, _BOXES, 6144),
        Chip("v6e", "v6e", 918e12, 32 * GIB, 1638e9, 100e9, 2, 16, 12.5e9, 1.75e9, 1, 643, _PLANES, 256),
        Chip("v7x", "tpu7x", 2307e12, 192 * GIB, 7380e9, 100e9, 3, 4, 12.5e9, 2.2e9, 2, 1085, _BOXES, 9216),
    )
}

# NVIDIA's data sheets of the SXM boards, dense rates, such as https://www.nvidia.com/en-us/data-center/h200/. NVLink
# joins every chip of a host to every other.
GPUS = {
    "a100": Chip("a100", "", 312e12, 80 * 10**9, 2039e9, 300e9, 0, 1, 25e9, 1.41e9, 1, 400, (), 8),
    "h100": Chip("h100", "", 989e12, 80 * 10**9, 3350e9, 450e9, 0, 1, 50e9, 1.98e9, 1, 700, (), 8),
    "h200": Chip("h200", "", 989e12, 141 * 10**9, 4800e9, 450e9, 0, 1, 50e9, 1.98e9, 1, 700, (), 8),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """One slice of chips, or a number of simulated CPU devices."""

    chip: Chip | None  # None: CPU
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        """The number of chips."""
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        """The number of devices that jax counts."""
        return self.chips * (self.chip.devices if self.chip else 1)

    def __str__(self) -> str:
        return f"{self.chip.name if self.chip else 'cpu'}:{'x'.join(map(str, self.shape))}"


def parse_topology(text: str) -> Topology:
    """The topology of a name such as "v5p:8x8x8" or "cpu:8". Raises UserError, with the valid names."""
    name, _, rest = text.partition(":")
    if name == "cpu":
        if not re.fullmatch(r"[1-9]\d{0,3}", rest):
            raise UserError(f"--topology={text}: give the number of simulated devices, such as cpu:8")
        return Topology(None, (int(rest),))
    if name not in CHIPS:
        raise UserError(f"--topology={text}: no such chip; valid: {', '.join(CHIPS)}, cpu, as in v5p:4x4x4 or cpu:8")
    chip = CHIPS[name]
    shape = tuple(map(int, rest.split("x"))) if re.fullmatch(r"\d+(x\d+)*", rest) else ()
    if shape not in shapes(chip):
        known = [f"{name}:{'x'.join(map(str, s))}" for s in shapes(chip) if math.prod(s).bit_count() == 1]
        more = ", and other multiples of 4 in rising order" if chip.torus == 3 else ""
        raise UserError(f"--topology={text}: no such slice; valid: {', '.join(known)}{more}")
    return Topology(chip, shape)


def shapes(chip: Chip) -> list[tuple[int, ...]]:
    """The shapes of slices of a chip, small ones first."""
    found = list(chip.small_shapes)
    if chip.torus == 3:
        cubes = itertools.combinations_with_replacement(range(4, 29, 4), 3)
        found += [shape for shape in cubes if math.prod(shape) <= chip.most_chips]
    return sorted(found, key=lambda shape: (math.prod(shape), shape[-1] - shape[0]))


def smallest(chip: Chip, chips: int) -> Topology | None:
    """The smallest slice with at least so many chips, nearest to a cube; None where there is none so large."""
    return next((Topology(chip, shape) for shape in shapes(chip) if math.prod(shape) >= chips), None)


def gpu_chip(kind: str) -> Chip:
    """The figures of a GPU by the name that its driver gives. Raises UserError for one that is not in the table."""
    for name, chip in GPUS.items():
        if name in kind.lower():
            return chip
    raise UserError(f"--platform=gpu: no figures for {kind!r} in tpu/chips.py; known: {', '.join(GPUS)}")

"""Collects the collectives of a compiled program by kind and by the axes of the mesh along which they go.

`distinct` counts channels, `count` executions, `bytes` those of the results, times executions; of a reduce-scatter they
are those of what is scattered, so that it compares with an all-gather. The start, the steps and the end of an
asynchronous collective count once. An all-reduce fused with the slice of its result (`all-reduce-scatter`) is a
reduce-scatter. Between slices, libtpu sends and receives through the host: network "dcn".
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict

import numpy as np

from tpu.compile.hlo import Visit, all_bytes, arrays

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all", "ragged-all-to-all")
_AXIS_PART = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")


@dataclasses.dataclass
class Collective:
    """The collectives of one kind along the same axes of the mesh."""

    kind: str
    axis: str  # such as "fsdp" or "data+fsdp"; "?" where the groups do not follow the mesh
    group: int  # devices that exchange with each other
    network: str  # "ici" within a slice, "dcn" between slices
    distinct: int = 0
    count: int = 0
    bytes: int = 0
    blocking_bytes: int = 0  # of `bytes`: those of executions beside which nothing else runs


class Collectives:
    """Collects collectives by kind and axes."""

    def __init__(self, mesh: dict[str, int], slices: int, slice_axis: str):
        self.names, self.slices, self.slice_axis = list(mesh), slices, slice_axis
        self.shape = tuple(mesh.values())
        self.found: dict[tuple, Collective] = {}
        self.channels: dict[tuple, set[str]] = defaultdict(set)
        self.met: set[tuple[str, str, int]] = set()

    def add(self, visit: Visit) -> None:
        """Adds the instruction if it is a collective that was not yet met in this run of its computation."""
        instruction = visit.instruction
        kind = instruction.opcode.removesuffix("-start")
        network, result = "ici", all_bytes(instruction.type)
        blocking = instruction.opcode in _KINDS and visit.fusion is None
        if kind == "recv" and "_xla_megascale_transfer_type" in instruction.line:
            transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.line)[1]
            kind, network = transfer.lower().replace("_", "-"), "dcn"
            axis, group = self.slice_axis, self.slices
            result = arrays(instruction.type)[0].bytes
        elif kind in _KINDS:
            axis, group = self.along(instruction.line)
            if group == 1:  # XLA:CPU leaves sums over axes of one device in the program
                return
            if instruction.opcode.endswith("-start") and kind != "all-reduce":
                operands = sum(all_bytes(visit.computation.instructions[name].type) for name in instruction.operands)
                result = sum(a.bytes for a in arrays(instruction.type) if a.shape) - operands
            elif kind == "reduce-scatter":
                result = sum(all_bytes(visit.computation.instructions[name].type) for name in instruction.operands)
            if kind == "all-reduce" and visit.computation.name.startswith("all-reduce-scatter"):
                kind, blocking = "reduce-scatter", True
        else:
            return
        channel = instruction.attribute("channel_id") or instruction.name
        if channel == "1":  # jax gives this channel to every collective that a `shard_map` writes out
            source = re.search(r'op_name="([^"]*)"', instruction.line)
            channel = f"{kind} {result} {source[1] if source else instruction.name}"
        met = (network, channel, visit.scope)
        if met in self.met:
            return
        self.met.add(met)
        key = (kind, axis, group, network)
        row = self.found.setdefault(key, Collective(*key))
        self.channels[key].add(channel)
        row.count += visit.times
        row.bytes += visit.times * result
        row.blocking_bytes += visit.times * result * blocking

    def rows(self) -> list[Collective]:
        """What was collected, the most bytes first."""
        for key, row in self.found.items():
            row.distinct = len(self.channels[key])
        return sorted(self.found.values(), key=lambda row: -row.bytes)

    def along(self, line: str) -> tuple[str, int]:
        """The mesh axes along which a collective's devices differ, and how many exchange."""
        groups = device_groups(line, math.prod(self.shape))
        if groups is None:
            return "?", 0
        shape = self.shape
        if self.slices > 1 and groups.max() < math.prod(shape) // self.slices:  # numbered within a slice
            at = self.names.index(self.slice_axis)
            shape = shape[:at] + (shape[at] // self.slices,) + shape[at + 1 :]
        places = np.stack(np.unravel_index(groups, shape), axis=-1)  # [groups, devices of a group, axes]
        differ = (places != places[:, :1]).any(axis=(0, 1))
        size = math.prod(n for n, along in zip(shape, differ, strict=True) if along)
        pairs = "source_target_pairs" in line
        axis = "+".join(name for name, along in zip(self.names, differ, strict=True) if along)
        if pairs or size == groups.shape[1]:
            return axis, size
        return f"{axis} in part", groups.shape[1]


def device_groups(line: str, devices: int) -> np.ndarray | None:
    """The devices, by their number in the mesh, that a collective joins: [groups, devices of a group].

    Reads `{{0,1},{2,3}}`, `[groups,size]<=[dimensions]T(permutation)`, `mesh['a'=2,'b'=4] {'a'}` and pairs of source
    and target; no groups are one of all devices. None for a form that is none of these.
    """
    if found := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)+)\}", line):
        return np.array(re.findall(r"\{(\d+),(\d+)\}", found[1]), int)
    if "replica_groups={}" in line or "replica_groups=" not in line:
        return np.arange(devices)[None]
    if found := re.search(r"replica_groups=\{((?:\{[\d,]+\},?)+)\}", line):
        groups = [list(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", found[1])]
        return np.array(groups) if len({len(group) for group in groups}) == 1 else None
    if found := re.search(r"replica_groups=(\[[^ ]+?)(?:, |$)", line):
        return _iota(found[1])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", line):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
        ids = _iota(found[2]) if found[2] else np.arange(math.prod(sizes.values()))
        return None if ids is None else _mesh_groups(sizes, ids, found[3])
    return None


def _iota(text: str) -> np.ndarray | None:
    """The array that `[2,4]<=[4,2]T(1,0)` says; flat where only `[4,2]T(1,0)` or a list of numbers is given."""
    if re.fullmatch(r"[\d,]+", text):
        return np.array(list(map(int, text.split(","))))
    found = re.fullmatch(r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?", text)
    if not found:
        return None
    shape, source, order = (list(map(int, part.split(","))) if part else None for part in found.groups())
    source = source or shape  # without "<=" the shape is that from which they are put in order
    ids = np.arange(math.prod(source)).reshape(source).transpose(order)
    return ids.reshape(shape) if found[2] else ids.flatten()


def _mesh_groups(sizes: dict[str, int], ids: np.ndarray, joined: str) -> np.ndarray:
    """Groups along the named axes of a mesh; `'a':(2)4` is the part of size 4 below one of size 2 of axis a."""
    split: list[tuple[str, int, int]] = []  # axis, elements before this part of it, its size
    parts = {name: (int(before or 1), int(size or sizes[name])) for name, before, size in _AXIS_PART.findall(joined)}
    for name, size in sizes.items():
        before, part = parts.get(name, (1, size))
        split += [(name, 1, before), (name, before, part), (name, before * part, size // before // part)]
    grid = ids.reshape([size for *_, size in split])
    inside = [i for i, (name, before, _) in enumerate(split) if name in parts and parts[name][0] == before]
    inside = [i for i in inside if split[i][2] == parts[split[i][0]][1]]
    outside = [i for i in range(len(split)) if i not in inside]
    width = math.prod(split[i][2] for i in inside)
    return grid.transpose(outside + inside).reshape(-1, width)

"""Counts what one device does in one run of a compiled program: products, cycles, memory traffic, collectives.

- matmul FLOPs: two per multiply-add of every `dot` and `convolution` (into which libtpu turns a `dot`), times the trip
  counts of the loops around it. What rematerialisation computes again counts; Pallas kernels, being opaque, do not.
- cycles: the `estimated_cycles` that libtpu writes beside instructions once code is generated, times trip counts.
  Collectives and Pallas kernels carry none, nor does anything from other compilers.
- collectives: `tpu.compile.hlo_collectives`.
- memory traffic: bytes that unfused instructions read from and write to main memory; of a stacked array that a loop
  slices, the slice.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections import defaultdict
from collections.abc import Callable

import numpy as np

from tpu.compile.hlo import Array, Computation, Instruction, Module, all_bytes, arrays
from tpu.compile.hlo_collectives import Collective, Collectives

# These move nothing themselves: they name, they nest, or their other half is counted.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"}
_FREE |= {"partition-id", "replica-id", "optimization-barrier", "async-start", "async-update", "async-done"}
_FREE |= {"copy-done", "send", "send-done", "recv", "recv-done", "iota", "reshape"}


@dataclasses.dataclass
class Kernel:
    """An opaque call: a Pallas kernel on TPU, cuDNN's attention on GPU."""

    name: str
    elements: int  # of its first operand of more than two dimensions; of attention these are the queries
    count: int
    flops: int = 0  # of one run, where it is a grouped product of mixtures of experts, its empty rows included


@dataclasses.dataclass
class Buffer:
    """An array in main memory that an unfused instruction makes."""

    type: str  # without its layout
    operation: str  # where in the program, as jax names it
    bytes: int


@dataclasses.dataclass
class Counts:
    """What one device does in one run of a program."""

    matmul_flops: int = 0
    cycles: int = 0
    memory_bytes: int = 0
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    kernels: list[Kernel] = dataclasses.field(default_factory=list)
    buffers: list[Buffer] = dataclasses.field(default_factory=list)  # different ones, the largest first
    unknown_loops: int = 0  # loops whose trip count the text does not fix, taken to run once


def count(
    module: Module, mesh: dict[str, int], slices: int = 1, slice_axis: str = "", branch: Callable = max
) -> Counts:
    """Counts a program that was partitioned for a mesh, given as its axes' sizes in the order of its dimensions.

    Of several slices, `slice_axis` is the axis along which they lie, outermost there. `branch` is that of
    `Module.walk`: which branch of a conditional counts.
    """
    counts, buffers = Counts(), {}
    collectives = Collectives(mesh, slices, slice_axis)
    for visit in module.walk(branch):
        instruction = visit.instruction
        collectives.add(visit)
        if instruction.opcode in ("dot", "convolution"):
            counts.matmul_flops += visit.times * matmul_flops(instruction, visit.computation)
        elif instruction.opcode == "custom-call" and (name := kernel_name(instruction)):
            operands = [arrays(visit.computation.instructions[o].type)[0] for o in instruction.operands]
            # A batch of one row has no dimension of its own; masks are arrays of integers.
            sizes = (math.prod(a.shape) for a in operands if len(a.shape) > 2 and a.dtype in ("f32", "bf16", "f16"))
            flops = grouped_flops(name, [a.shape for a in operands], arrays(instruction.type)[0].shape)
            counts.kernels.append(Kernel(name, next(sizes, 0), visit.times, flops))
        if visit.fusion is None:
            if found := re.search(r'"estimated_cycles":"(\d+)"', instruction.line):
                counts.cycles += visit.times * int(found[1])
            counts.memory_bytes += visit.times * memory_bytes(instruction, visit.computation, module)
            if instruction.opcode not in _FREE and not instruction.opcode.endswith(("-start", "-done")):
                buffers |= {(a.dtype, a.shape, operation(instruction)): a.bytes for a in made(instruction)}
    counts.collectives, counts.unknown_loops = collectives.rows(), module.unknown_loops
    for (dtype, shape, name), size in sorted(buffers.items(), key=lambda item: -item[1]):
        counts.buffers.append(Buffer(f"{dtype}[{','.join(map(str, shape))}]", name, size))
    return counts


def made(instruction: Instruction) -> list[Array]:
    """The arrays that an instruction leaves in main memory."""
    return [array for array in arrays(instruction.type) if array.space == 0]


def operation(instruction: Instruction) -> str:
    """Where in the program an instruction comes from, as jax names it."""
    found = re.search(r'op_name="([^"]*)"', instruction.line)
    return found[1] if found else instruction.name


def kernel_name(instruction: Instruction) -> str:
    """What an opaque call is called, "" where it is none."""
    target = re.search(r'custom_call_target="([^"]+)"', instruction.line)[1]
    if target == "tpu_custom_call":
        return instruction.name.rstrip(".0123456789")
    return target.removeprefix("__") if target.startswith("__cudnn$fmha") else ""


def grouped_flops(name: str, operands: list[tuple[int, ...]], result: tuple[int, ...]) -> int:
    """Operations of a kernel that multiplies groups of rows [N, I] by matrices [I, O], or by rows [N, O]; else 0."""
    rows = next((shape for shape in operands if len(shape) == 2), (0, 0))
    if name.startswith("ragged-dot") and len(result) == 2:
        return 2 * math.prod(result) * rows[1]
    return 2 * math.prod(result[1:]) * rows[0] if name.startswith("tgmm") else 0


def matmul_flops(instruction: Instruction, computation: Computation) -> int:
    """Operations of one `dot` or `convolution`: two per multiply-add, those with padding left out."""
    (result,) = arrays(instruction.type)
    left, right = (arrays(computation.instructions[name].type)[0] for name in instruction.operands[:2])
    if instruction.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.line)[1]
        return 2 * math.prod(result.shape) * math.prod(left.shape[int(d)] for d in contracted.split(",") if d)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.line)
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", (re.search(r"window=\{([^}]*)\}", instruction.line) or "  ")[1]))
    spatial = sorted(set(labels[2]) - {"i", "o"})
    fields = {name: window[name].split("x") for name in window}
    multiply_adds = right.shape[labels[2].index("i")]
    for label in "bf":
        multiply_adds *= result.shape[labels[3].index(label)]
    for i, label in enumerate(spatial):
        low = fields["pad"][i].split("_")[0] if "pad" in fields else "0"
        numbers = {name: int(fields[name][i]) for name in ("stride", "lhs_dilate", "rhs_dilate") if name in fields}
        multiply_adds *= _valid_positions(
            left.shape[labels[1].index(label)],
            right.shape[labels[2].index(label)],
            result.shape[labels[3].index(label)],
            int(low),
            **numbers,
        )
    return 2 * multiply_adds


@functools.cache
def _valid_positions(
    size: int, kernel: int, out: int, low: int, stride: int = 1, lhs_dilate: int = 1, rhs_dilate: int = 1
) -> int:
    """Pairs (output, kernel element) of one dimension whose input is an element, not padding or a dilation's gap."""
    at = np.arange(out)[:, None] * stride + np.arange(kernel)[None, :] * rhs_dilate - low
    return int(((at >= 0) & (at % lhs_dilate == 0) & (at // lhs_dilate < size)).sum())


def memory_bytes(instruction: Instruction, computation: Computation, module: Module) -> int:
    """Bytes that an unfused instruction reads from and writes to main memory."""
    if instruction.opcode in _FREE:
        return 0
    operands = [computation.instructions[name] for name in instruction.operands]
    if instruction.opcode in ("dynamic-slice", "gather", "slice"):
        read = all_bytes(instruction.type) if _in_memory(operands[0].type) else 0
        return read + _in_memory(instruction.type)
    if instruction.opcode == "dynamic-update-slice":
        written = all_bytes(operands[1].type) if _in_memory(instruction.type) else 0
        return written + _in_memory(operands[1].type)
    if instruction.opcode != "fusion":
        written = arrays(instruction.type)[:1] if instruction.opcode.endswith("-start") else arrays(instruction.type)
        return sum(a.bytes for a in written if a.space == 0) + sum(_in_memory(o.type) for o in operands)
    inner = module.computations[instruction.called()[0]]
    total = 0
    for operand, name in zip(operands, inner.parameters, strict=True):
        partial = _sliced_bytes(inner, name)
        if partial is None or not _in_memory(operand.type):
            partial = _in_memory(operand.type)
        total += partial
    root = inner.instructions[inner.root]
    results = [inner.instructions[n] for n in root.operands] if root.opcode == "tuple" else [root]
    for result, array in zip(results, arrays(instruction.type), strict=False):
        if array.space == 0:
            updates = result.opcode == "dynamic-update-slice"
            total += all_bytes(inner.instructions[result.operands[1]].type) if updates else array.bytes
    return total


def _sliced_bytes(computation: Computation, name: str) -> int | None:
    """Bytes that a fusion reads of a parameter of which it takes slices only; None where it reads all of it."""
    total, waiting = 0, [name]
    users = _users(computation.instructions)
    while waiting:
        source = waiting.pop()
        for user in users.get(source, []):
            if user.opcode == "bitcast":
                waiting.append(user.name)
            elif user.opcode in ("dynamic-slice", "gather") and user.operands[0] == source:
                total += all_bytes(user.type)
            elif user.opcode != "dynamic-update-slice" or user.operands[0] != source:
                return None
    return total


def _users(instructions: dict[str, Instruction]) -> dict[str, list[Instruction]]:
    users: dict[str, list[Instruction]] = defaultdict(list)
    for instruction in instructions.values():
        for operand in instruction.operands:
            users[operand].append(instruction)
    return users


def _in_memory(kind: str) -> int:
    return sum(array.bytes for array in arrays(kind) if array.space == 0)

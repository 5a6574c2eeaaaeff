"""Reads an optimised HLO module, as text, and walks through what one run of it executes.

The text of XLA is the one place that shows what the compiler decided: what is computed again, which collectives it
chose, how the loops lie. `cost_analysis()` counts the body of a loop once; `Module.walk` says how often it runs.
What is counted on the walk is in `tpu.compile.hlo_counts`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator

_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"  (ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\(([^)]*)\)")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_MOST_TRIPS = 100_000
_ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "maximum": max,
    "minimum": min,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
}
_COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
}
_SAME = ("copy", "bitcast", "convert", "reshape", "optimization-barrier")

# What is known of a computation's parameters: (parameter, element of it where it is a tuple) -> integer, None: unknown.
Arguments = Callable[[int, int | None], int | None]


@dataclasses.dataclass(frozen=True)
class Array:
    """An array type as it lies on the device."""

    dtype: str
    shape: tuple[int, ...]
    space: int  # of memory; on TPU 0 is HBM, 1 vector memory, 5 the host's

    @property
    def bytes(self) -> int:
        """The size without padding."""
        bits = {"pred": 8, "token": 0, "c64": 64, "c128": 128}.get(self.dtype)
        bits = bits if bits is not None else int(re.search(r"\d+", self.dtype)[0])
        return math.prod(self.shape) * bits // 8


@functools.lru_cache(maxsize=100_000)
def arrays(kind: str) -> tuple[Array, ...]:
    """The arrays of a type in HLO text; those of a tuple in order, whatever its nesting."""
    found = []
    for dtype, shape, layout in _ARRAY.findall(kind):
        space = re.search(r"S\((\d+)\)", layout)
        found.append(Array(dtype, tuple(map(int, filter(None, shape.split(",")))), int(space[1]) if space else 0))
    return tuple(found)


def all_bytes(kind: str) -> int:
    """The bytes of all arrays of a type, in whatever memory."""
    return sum(array.bytes for array in arrays(kind))


@dataclasses.dataclass
class Instruction:
    """One line of a computation."""

    name: str
    type: str  # such as f32[8,128]{1,0:T(8,128)S(1)}, or a tuple of them
    opcode: str
    operands: list[str]
    literal: str  # what stands in place of operands, such as the value of a constant or the number of a parameter
    line: str

    def attribute(self, name: str) -> str:
        """The computation, or other single word, that an attribute names; "" where there is none."""
        found = re.search(rf"[ ,]{name}=%?([\w.\-]+)", self.line)
        return found[1] if found else ""

    def called(self) -> list[str]:
        """The computations that run as part of this instruction, but for the scalar ones of reductions and sorts."""
        if self.opcode == "while":
            return [self.attribute("condition"), self.attribute("body")]
        if self.opcode == "conditional":
            if found := re.search(r"branch_computations=\{([^}]*)\}", self.line):
                return _NAME.findall(found[1])
            return re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", self.line)
        if self.opcode in ("fusion", "async-start"):
            return [self.attribute("calls")]
        return [self.attribute("to_apply")] if self.opcode == "call" else []


@dataclasses.dataclass
class Computation:
    """Instructions by name, in order."""

    name: str
    instructions: dict[str, Instruction] = dataclasses.field(default_factory=dict)
    root: str = ""

    @functools.cached_property
    def parameters(self) -> list[str]:
        """The names of its parameters by their number."""
        found = [i for i in self.instructions.values() if i.opcode == "parameter"]
        return [i.name for i in sorted(found, key=lambda i: int(i.literal))]


@dataclasses.dataclass
class Visit:
    """An instruction that runs."""

    instruction: Instruction
    computation: Computation
    times: int  # runs in one run of the program
    fusion: Instruction | None  # the outermost one that it lies in
    scope: int  # a number of the run of an unfused computation that it lies in


@dataclasses.dataclass
class Module:
    """The computations of a program by name."""

    computations: dict[str, Computation]
    entry: str
    partitions: int
    unknown_loops: int = 0  # met by `walk`, and counted as running once

    def walk(self, branch: Callable[..., list[Visit]] = max) -> Iterator[Visit]:
        """Every instruction that runs; a loop of unknown length runs once.

        Of a conditional one branch runs: with `branch=max` the one that makes the most bytes, with `min` the fewest.
        """
        self.unknown_loops = self._scopes = 0
        self._branch = branch
        yield from self._walk(self.computations[self.entry], 1, _nothing, None)

    def _walk(
        self, computation: Computation, times: int, known: Arguments, fusion: Instruction | None, scope: int = 0
    ) -> Iterator[Visit]:
        if fusion is None:
            self._scopes += 1
            scope = self._scopes
        for instruction in computation.instructions.values():
            yield Visit(instruction, computation, times, fusion, scope)
            called = [self.computations[name] for name in instruction.called()]
            if instruction.opcode == "while":
                trips = self.trip_count(instruction, computation, known)
                self.unknown_loops += trips is None
                trips = 1 if trips is None else trips
                inside = self._carried(instruction, computation, known)
                yield from self._walk(called[0], times * (trips + 1), inside, fusion, scope)
                yield from self._walk(called[1], times * trips, inside, fusion, scope)
            elif instruction.opcode == "fusion":
                yield from self._walk(called[0], times, _nothing, fusion or instruction, scope)
            elif instruction.opcode == "conditional":
                branches = [list(self._walk(each, times, _nothing, fusion, scope)) for each in called]
                yield from self._branch(branches, key=_bytes_made)
            elif called:
                yield from self._walk(called[0], times, self._passed(instruction, computation, known), fusion, scope)

    def trip_count(self, loop: Instruction, computation: Computation, known: Arguments) -> int | None:
        """How often a loop runs: as XLA noted it, else by following the integers that end it; None: not fixed."""
        if found := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.line):
            return int(found[1])
        condition, body = (self.computations[name] for name in loop.called())
        state = {i: self._value(computation, loop.operands[0], i, known) for i in range(len(arrays(loop.type)))}
        state = {i: value for i, value in state.items() if value is not None}
        for trips in range(_MOST_TRIPS):
            carried = functools.partial(_element, state)
            goes_on = self._value(condition, condition.root, None, carried)
            if goes_on is None:
                return None
            if not goes_on:
                return trips
            state = {i: self._value(body, body.root, i, carried) for i in state}
            state = {i: value for i, value in state.items() if value is not None}
        return None

    def _value(self, computation: Computation, name: str, index: int | None, known: Arguments) -> int | None:
        """An integer or truth value, of element `index` where it is a tuple's, as far as the text fixes it."""
        instruction = computation.instructions[name]
        opcode, operands = instruction.opcode, instruction.operands
        if opcode == "parameter":
            return known(int(instruction.literal), index)
        if opcode in _SAME:
            return self._value(computation, operands[0], index, known)
        if opcode in ("fusion", "call"):
            inner = self.computations[instruction.called()[0]]
            return self._value(inner, inner.root, index, self._passed(instruction, computation, known))
        if index is not None:
            if opcode == "tuple":
                return self._value(computation, operands[index], None, known)
            if opcode == "while" and self._invariant(instruction, index):
                return self._value(computation, operands[0], index, known)
            return None
        if opcode == "constant":
            truth = {"true": 1, "false": 0}.get(instruction.literal)
            return int(instruction.literal) if re.fullmatch(r"-?\d+", instruction.literal) else truth
        if opcode == "get-tuple-element":
            return self._value(computation, operands[0], int(instruction.attribute("index")), known)
        if opcode in _ARITHMETIC or opcode == "compare":
            values = [self._value(computation, operand, None, known) for operand in operands]
            if None in values:
                return None
            operation = _ARITHMETIC.get(opcode) or _COMPARISONS[instruction.attribute("direction")]
            return int(operation(*values))
        return None

    def _passed(self, call: Instruction, computation: Computation, known: Arguments) -> Arguments:
        """What is known of the parameters of the computation that an instruction calls."""
        return lambda number, index: self._value(computation, call.operands[number], index, known)

    def _carried(self, loop: Instruction, computation: Computation, known: Arguments) -> Arguments:
        """What is known, in every iteration, of the state of a loop."""

        def value(_: int, index: int | None) -> int | None:
            unchanged = index is not None and self._invariant(loop, index)
            return self._value(computation, loop.operands[0], index, known) if unchanged else None

        return value

    def _invariant(self, loop: Instruction, index: int) -> bool:
        """Whether the body of a loop hands on an element of its state as it is."""
        body = self.computations[loop.attribute("body")]
        root = body.instructions[body.root]
        if root.opcode != "tuple":
            return False
        found = body.instructions[root.operands[index]]
        while found.opcode in _SAME:
            found = body.instructions[found.operands[0]]
        of_state = found.opcode == "get-tuple-element" and body.instructions[found.operands[0]].opcode == "parameter"
        return of_state and int(found.attribute("index")) == index


def _bytes_made(visits: list[Visit]) -> int:
    """The bytes of all results, but for those of instructions that only name others'."""
    naming = ("parameter", "tuple", "get-tuple-element", "bitcast", "constant")
    return sum(v.times * all_bytes(v.instruction.type) for v in visits if v.instruction.opcode not in naming)


def _nothing(number: int, index: int | None) -> None:
    return None


def _element(state: dict[int, int], number: int, index: int | None) -> int | None:
    return state.get(index)


def parse(text: str) -> Module:
    """The module that a text says. Raises ValueError where it is none."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if line.startswith("  "):
            if current is not None and (found := _INSTRUCTION.match(line)):
                root, name, kind, opcode, operands = found.groups()
                current.instructions[name] = Instruction(name, kind, opcode, _NAME.findall(operands), operands, line)
                current.root = name if root else current.root
        elif found := _HEADER.match(line):
            current = computations[found[2]] = Computation(found[2])
            entry = found[2] if found[1] else entry
    if not entry:
        raise ValueError("not the text of an HLO module: it has no ENTRY")
    partitions = re.search(r"\bnum_partitions=(\d+)", text[: text.index("\n")])
    return Module(computations, entry, int(partitions[1]) if partitions else 1)

"""What a sweep varies: the values of each field, the points of a grid or of a random sequence, the names of points.

A space is a dictionary from fields of the experiment ("optimizer.learning_rate") to what they may be. A point is a
dictionary from the same fields to one value each: the overrides of one trial.
"""

from __future__ import annotations

import ast
import collections
import copy
import dataclasses
import difflib
import hashlib
import itertools
import json
import math
import random
import re
from collections.abc import Iterable
from typing import Any

from tpu.errors import UserError
from train.config import Experiment
from train.tree import check_types

EXAMPLE = "optimizer.learning_rate=log(1e-4, 1e-2); model.layers=[4, 6, 8]; optimizer.beta2=uniform(0.9, 0.99)"
LARGEST_GRID = 10_000  # Every point is checked before the first one runs.


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of some values, in no order."""

    values: tuple[Any, ...]

    def draw(self, fraction: float) -> Any:
        """The value at a fraction, at least 0 and below 1, of the way through."""
        return self.values[int(fraction * len(self.values))]

    def __str__(self) -> str:
        return repr(list(self.values))


@dataclasses.dataclass(frozen=True)
class Integers:
    """An integer from `low` to `high`, both included."""

    low: int
    high: int

    @property
    def values(self) -> range:
        """All of them."""
        return range(self.low, self.high + 1)

    def draw(self, fraction: float) -> int:
        """The integer at a fraction, at least 0 and below 1, of the way through."""
        return self.low + int(fraction * (self.high - self.low + 1))

    def __str__(self) -> str:
        return f"int({self.low}, {self.high})"


@dataclasses.dataclass(frozen=True)
class Uniform:
    """A number between two others."""

    low: float
    high: float

    def draw(self, fraction: float) -> float:
        """The number at a fraction of the way from `low` to `high`."""
        return self.rounded(self.low + fraction * (self.high - self.low))

    def rounded(self, value: float) -> float:
        """The number to a few thousandths of the range, so that the name of a trial says it in full."""
        digits = 3 - math.floor(math.log10(self.high - self.low))
        return min(max(round(value, digits), self.low), self.high)

    def __str__(self) -> str:
        return f"uniform({self.low}, {self.high})"


@dataclasses.dataclass(frozen=True)
class Log:
    """A positive number whose logarithm lies evenly between those of two others."""

    low: float
    high: float

    def draw(self, fraction: float) -> float:
        """The number at a fraction of the way from `low` to `high`, measured in logarithms."""
        return self.rounded(self.low * (self.high / self.low) ** fraction)

    def rounded(self, value: float) -> float:
        """The number to four digits, more in a narrow range, so that the name of a trial says it in full."""
        digits = 4 + max(0, -math.floor(math.log10(math.log10(self.high / self.low))))
        return min(max(float(f"{value:.{digits}g}"), self.low), self.high)

    def __str__(self) -> str:
        return f"log({self.low}, {self.high})"


Space = dict[str, Choice | Integers | Uniform | Log]
Point = dict[str, Any]
RANGES = {"log": Log, "uniform": Uniform, "int": Integers}


def parse_space(text: str) -> Space:
    """The space that a line such as EXAMPLE describes, read as Python is and never run. Raises UserError."""
    try:
        statements = ast.parse("\n".join(line.strip() for line in text.splitlines())).body
    except (SyntaxError, ValueError) as error:
        raise UserError(f"--space={text!r}: cannot be read ({error}); write it as in '{EXAMPLE}'") from None
    space: Space = {}
    for statement in statements:
        if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
            raise UserError(f"--space: {ast.unparse(statement)}: not FIELD=VALUES; write it as in '{EXAMPLE}'")
        field = ast.unparse(statement.targets[0])
        if field in space:
            raise UserError(f"--space: {field}: given twice")
        space[field] = _read(field, statement.value)
    if not space:
        raise UserError(f"--space={text!r}: names no field; write it as in '{EXAMPLE}'")
    return space


def space_of(fields: Any) -> Space:
    """The space that `sweep()` of a config file returned: {field: list of values, or a range such as "log(1, 9)"}."""
    if not isinstance(fields, dict) or not fields:
        raise UserError(f"sweep() returned {fields!r}: must be a dictionary such as {{'model.layers': [4, 6, 8]}}")
    space: Space = {}
    for field, values in fields.items():
        if isinstance(values, str):
            try:
                space[field] = _read(field, ast.parse(values.strip(), mode="eval").body)
            except (SyntaxError, ValueError) as error:
                raise UserError(f"{field}={values!r}: cannot be read ({error})") from None
        elif isinstance(values, list):
            space[field] = _choice(field, values)
        else:
            raise UserError(f"{field}={values!r}: must be a list, or a string such as 'log(1e-4, 1e-2)'")
    return space


def _read(field: str, node: ast.expr) -> Choice | Integers | Uniform | Log:
    """What one expression allows: a list of literals, or a range with literal bounds."""
    try:
        if isinstance(node, ast.List):
            return _choice(field, [ast.literal_eval(element) for element in node.elts])
        if isinstance(node, ast.Call) and not node.keywords and ast.unparse(node.func) in RANGES:
            return _range(field, ast.unparse(node.func), [ast.literal_eval(argument) for argument in node.args])
    except UserError:
        raise
    except (ValueError, TypeError):  # literal_eval, of anything that is no literal
        pass
    raise UserError(
        f"{field}={ast.unparse(node)}: must be a list such as [4, 6, 8], log(LOW, HIGH), uniform(LOW, HIGH) or "
        "int(LOW, HIGH)"
    )


def _choice(field: str, values: list[Any]) -> Choice:
    if not values:
        raise UserError(f"{field}=[]: an empty list; give at least one value")
    values = [tuple(value) if isinstance(value, list) else value for value in values]
    if repeated := [value for place, value in enumerate(values) if value in values[:place]]:
        raise UserError(f"{field}={values!r}: holds {repeated[0]!r} twice")
    return Choice(tuple(values))


def _range(field: str, kind: str, bounds: list[Any]) -> Integers | Uniform | Log:
    given = f"{field}={kind}({', '.join(map(repr, bounds))})"
    number = int if kind == "int" else (int, float)
    if len(bounds) != 2 or not all(isinstance(b, number) and not isinstance(b, bool) for b in bounds):
        raise UserError(f"{given}: needs two {'integers' if kind == 'int' else 'numbers'}, the lowest and the highest")
    low, high = bounds
    if not all(map(math.isfinite, bounds)) or low >= high:
        raise UserError(f"{given}: the first bound must be below the second, and both finite")
    if kind == "log" and low <= 0:
        raise UserError(f"{given}: a range of logarithms must lie above zero")
    return Integers(low, high) if kind == "int" else RANGES[kind](float(low), float(high))


def overridden(experiment: Experiment, point: Point) -> Experiment:
    """A copy of an experiment with the fields of a point set. Raises UserError for a field that is not there."""
    experiment = copy.deepcopy(experiment)
    for field, value in point.items():
        *branches, name = field.split(".")
        owner: Any = experiment
        for branch in branches:
            owner = _member(owner, branch, field)
        if dataclasses.is_dataclass(branch := _member(owner, name, field)):
            raise UserError(f"{field}: name one of its fields: {', '.join(vars(branch))}")
        setattr(owner, name, tuple(value) if isinstance(value, list) else value)
    return experiment


def _member(owner: Any, name: str, field: str) -> Any:
    names = vars(owner) if dataclasses.is_dataclass(owner) else {}
    if name not in names:
        close = difflib.get_close_matches(name, names, 1)
        guess = f"did you mean {close[0]}? " if close else ""
        valid = f"valid: {', '.join(names)}" if names else f"{field.removesuffix('.' + name)} has no fields"
        raise UserError(f"{field}: no such field; {guess}{valid}")
    return getattr(owner, name)


def check_space(space: Space, experiment: Experiment) -> None:
    """Raises UserError for a field that the experiment does not have, or a value that is not of the field's type."""
    check_types(experiment)
    for field, values in space.items():
        for value in values.values if isinstance(values, Choice) else (values.draw(0.0), values.draw(0.5)):
            try:
                check_types(overridden(experiment, {field: value}))
            except UserError as error:
                raise UserError(f"{error} (swept over {values})") from None


def size(space: Space) -> float:
    """The number of points; infinite where a field has a continuous range."""
    return math.prod(
        len(values.values) if isinstance(values, (Choice, Integers)) else math.inf for values in space.values()
    )


def grid_points(space: Space) -> list[Point]:
    """Every combination of values, the last field changing fastest. Raises UserError where there is no end of them."""
    for field, values in space.items():
        if not isinstance(values, (Choice, Integers)):
            raise UserError(f"{field}={values}: a grid needs a list or int(LOW, HIGH); or take --method=random or tpe")
    if size(space) > LARGEST_GRID:
        raise UserError(f"the grid has {size(space):,} points, more than {LARGEST_GRID:,}; take --method=random or tpe")
    return [dict(zip(space, p, strict=True)) for p in itertools.product(*(values.values for values in space.values()))]


def random_points(space: Space, seed: int, count: int) -> list[Point]:
    """The first `count` different points of the random sequence of a seed; all of them where there are not so many.

    A longer sequence begins with the shorter one.
    """
    count = min(count, size(space))
    generator, points = random.Random(seed), {}
    while len(points) < count:
        point = {field: values.draw(generator.random()) for field, values in space.items()}
        points.setdefault(trial_name(point), point)
    return list(points.values())


def trial_name(point: Point) -> str:
    """A directory name such as "layers=4,learning_rate=0.001": the same for the same point, in whatever order.

    Names that would be long, or hold characters that shells and file systems treat in their own way, end in a hash of
    the point.
    """
    called, name, changed = short_names(point), "", False
    for field, value in sorted(point.items()):
        text = value if isinstance(value, str) else repr(value)
        safe = re.sub(r"[^A-Za-z0-9._+-]+", "-", text)
        changed |= safe != text
        name += f"{',' * bool(name)}{called[field]}={safe}"
    if not changed and len(name) <= 100:
        return name
    return f"{name[:90]}-{hashlib.sha256(json.dumps(point, sort_keys=True).encode()).hexdigest()[:8]}"


def short_names(fields: Iterable[str]) -> dict[str, str]:
    """The last word of each field, or the whole of it where another field has the same."""
    words = {field: field.rpartition(".")[2] for field in fields}
    count = collections.Counter(words.values())
    return {field: word if count[word] == 1 else field for field, word in words.items()}


def describe(space: Space) -> str:
    """The space as `parse_space` reads it."""
    return "; ".join(f"{field}={values}" for field, values in space.items())

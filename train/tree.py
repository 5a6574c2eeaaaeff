"""Trees of typed dataclasses: their types and limits, their JSON form, what differs between two."""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from typing import Any

from model.fields.limits import check_field
from tpu.errors import UserError

_hints = functools.cache(typing.get_type_hints)  # A planner checks ten thousands of experiments.


def check_types(tree: Any, prefix: str = "") -> None:
    """Raises UserError for the first field of a dataclass tree whose value is not of its declared type, or not within
    its limits (`model.fields.limits`)."""
    hints = _hints(type(tree))
    for field in dataclasses.fields(tree):
        value, hint, name = getattr(tree, field.name), hints[field.name], prefix + field.name
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, hint):
                raise UserError(f"{name}={value!r}: must be a {hint.__name__}")
            check_types(value, name + ".")
        elif not _is_of(value, hint):
            raise UserError(f"{name}={value!r}: must be {type_name(hint)}")
        else:
            check_field(name, value, field.metadata)


def _is_of(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_is_of(v, typing.get_args(hint)[0]) for v in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def type_name(hint: Any) -> str:
    """A declared type in words."""
    if typing.get_origin(hint) is tuple:
        return f"a tuple of {typing.get_args(hint)[0].__name__}"
    return {"int": "an integer", "float": "a finite number", "bool": "true or false", "str": "a string"}[hint.__name__]


def to_dict(tree: Any) -> dict[str, Any]:
    """The tree as nested dictionaries that `json` can write (tuples become lists)."""
    return {
        f.name: to_dict(v) if dataclasses.is_dataclass(v) else list(v) if isinstance(v, tuple) else v
        for f in dataclasses.fields(tree)
        for v in [getattr(tree, f.name)]
    }


def from_dict(cls: type, tree: dict[str, Any], prefix: str = "") -> Any:
    """Builds the dataclass `cls` from what `to_dict` gave. Raises UserError for a field that `cls` does not have."""
    hints = _hints(cls)
    unknown = sorted(set(tree) - set(hints))
    if unknown:
        raise UserError(
            f"{prefix}{unknown[0]}: no such field; valid: {', '.join(hints)}; where another version of this code wrote "
            "it, use that version, or take the field out of the file"
        )
    values = {}
    for name, value in tree.items():
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            value = from_dict(hint, value, f"{prefix}{name}.")
        elif typing.get_origin(hint) is tuple:
            value = tuple(value)
        values[name] = value
    return cls(**values)


def differences(a: Any, b: Any, prefix: str = "") -> list[str]:
    """The fields in which two trees of one type differ, as `name: value of a, value of b`."""
    rows = []
    for field in dataclasses.fields(a):
        x, y, name = getattr(a, field.name), getattr(b, field.name), prefix + field.name
        if dataclasses.is_dataclass(x):
            rows += differences(x, y, name + ".")
        elif x != y:
            rows.append(f"{name}: {x!r}, {y!r}")
    return rows

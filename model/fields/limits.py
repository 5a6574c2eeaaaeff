"""What a field may hold, said where it is declared: `layers: int = number(6, at_least=1)`.

`number`, `choice` and `given` are dataclass fields with metadata. Besides limits these say of a field that it is

free       may differ from that of the checkpoint it goes on with: it changes no weight, nor what weights mean
from_base  taken from the checkpoint that an adapter is trained on
of         fields by whose values it has an effect, such as {"model.fusion": ("co", "tangled")}; (): any but 0
zero       of a field for which its 0 stands
"""

import dataclasses
import functools
import operator
from collections.abc import Mapping
from typing import Any

from tpu.errors import UserError

COMPARISONS = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt}
Of = Mapping[str, tuple[Any, ...]]


def number(
    default: float,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    **marks: Any,
) -> Any:
    """A field of a number between limits; `marks` as those of `given`."""
    limits = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    return given(default, **{name: limit for name, limit in limits.items() if limit is not None}, **marks)


def choice(*valid: Any, default: Any = None, **marks: Any) -> Any:
    """A field of one of some values, the first where no default is given; `marks` as those of `given`."""
    return given(valid[0] if default is None else default, valid=valid, **marks)


def given(default: Any, *, of: Of | None = None, **metadata: Any) -> Any:
    """A field without limits, which may be `free`, `from_base` or `of` others."""
    return dataclasses.field(default=default, metadata=metadata | ({"of": of} if of else {}))


def marked(branch: type, mark: str) -> tuple[str, ...]:
    """Names of the fields of a dataclass with a mark, such as "free"."""
    return tuple(field.name for field in dataclasses.fields(branch) if field.metadata.get(mark))


def check_field(name: str, value: Any, metadata: Mapping[str, Any]) -> None:
    """Raises UserError where the value of the field `name` is not within the limits of its metadata."""
    if "valid" in metadata and value not in metadata["valid"]:
        raise UserError(f"{name}={value!r}: valid: {', '.join(map(str, metadata['valid']))}")
    for word, fits in COMPARISONS.items():
        if word in metadata and not fits(value, metadata[word]):
            limits = {word: metadata[word] for word in COMPARISONS if word in metadata}
            raise UserError(f"{name}={value}: must be {_in_words(limits)}")


def check_fields(branch: Any, name: str) -> None:
    """Raises UserError for the first field of a dataclass, itself called `name`, that is not within its limits."""
    for field in _told(type(branch)):
        check_field(f"{name}.{field.name}", getattr(branch, field.name), field.metadata)


def check_effects(branch: Any, name: str, root: Any) -> None:
    """Raises UserError for a field of a branch, called `name`, that is no default and has no effect in the tree
    `root`."""
    for field in _told(type(branch)):
        value = getattr(branch, field.name)
        if value == field.default or "of" not in field.metadata:
            continue
        if value in [operator.attrgetter(path)(root) for path in field.metadata.get("zero", ())]:
            continue
        for path, valid in field.metadata["of"].items():
            found = operator.attrgetter(path)(root)
            fits = set(found if isinstance(found, tuple) else (found,)) & set(valid) if valid else found
            if not fits:
                only = f"only with {', '.join(map(str, valid))}" if valid else f"give {path}"
                raise UserError(f"{name}.{field.name}={value!r}: has no effect with {path}={found!r}, {only}")


@functools.cache  # A planner checks ten thousands of experiments.
def _told(branch: type) -> tuple[dataclasses.Field, ...]:
    """The fields of which anything is said."""
    return tuple(field for field in dataclasses.fields(branch) if field.metadata)


def _in_words(limits: Mapping[str, float]) -> str:
    if limits == {"above": 0}:
        return "positive"
    if set(limits) == {"at_least", "at_most"}:
        return f"between {limits['at_least']} and {limits['at_most']}"
    return " and ".join(f"{word.replace('_', ' ')} {limit}" for word, limit in limits.items())

"""Products of activations and weight matrices, counted in a program's jaxpr; nothing is computed.

What a value comes from is followed through the program: from matrices alone (converted, turned, scaled), or from
activations too. An activation times a matrix counts twice for each multiply-add; and once more as much for the gradient
of each of the two factors that something trained is in. Products of two activations are attention's, whose work
`train.budget.flops` takes from a formula, for a program may compute more of them than its masks let through.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.interpreters import partial_eval

from model.weights import MATRICES, names

SCOPE = "vision"  # the named scope of what sees


class Origin(NamedTuple):
    """What a value is made of."""

    activation: bool = False
    matrix: bool = False
    trained: bool = False  # whether a gradient flows back through it

    def joined(self, other: Origin) -> Origin:
        """The origin of what is made of both."""
        return Origin(*(a or b for a, b in zip(self, other, strict=True)))


@dataclasses.dataclass
class Products:
    """Operations of all products of activations and matrices, and what products of two activations train.

    `attends` says of each side, of what sees (True) and of the rest (False), whether gradients flow through them.
    """

    forward: int = 0
    backward: int = 0
    attends: dict[bool, bool] = dataclasses.field(default_factory=lambda: {True: False, False: False})

    def add(self, other: Products, times: int = 1) -> None:
        """Adds so many times another's."""
        self.forward += times * other.forward
        self.backward += times * other.backward
        self.attends = {side: found or other.attends[side] for side, found in self.attends.items()}


def weight_products(function: Callable[..., Any], weights: Any, trained: Any, *arguments: Any) -> Products:
    """The products in function(weights, *arguments), whose result is what is differentiated.

    Args:
      weights: abstract. trained: alike in structure, whether each is. arguments: abstract; all of them activations.
    Raises ValueError where a mesh of several devices is in use: a program's parts have other shapes there.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
        raise ValueError("products are counted outside of jax.set_mesh")
    closed = jax.make_jaxpr(function)(weights, *arguments)
    used = [isinstance(v, Literal) or jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in closed.jaxpr.outvars]
    jaxpr, kept = partial_eval.dce_jaxpr(closed.jaxpr, used)

    def origin(path: tuple, is_trained: bool) -> Origin:
        matrix = not {*MATRICES, "router"}.isdisjoint(names(path))
        return Origin(activation=not matrix, matrix=matrix, trained=is_trained)

    marked = jax.tree_util.tree_map_with_path(origin, trained)
    origins = jax.tree.leaves(marked, is_leaf=lambda node: isinstance(node, Origin))
    origins += [Origin(activation=True)] * len(jax.tree.leaves(arguments))
    found = Products()
    _walk(jaxpr, [o for o, keep in zip(origins, kept, strict=True) if keep], "", found)
    return found


def _walk(jaxpr: Jaxpr, given: list[Origin], scope: str, found: Products) -> list[Origin]:
    """Adds the products of a program whose arguments come from `given`; returns where its results come from."""
    known = dict(zip(jaxpr.invars, given, strict=True)) | dict.fromkeys(jaxpr.constvars, Origin())
    for equation in jaxpr.eqns:
        origins = [Origin() if isinstance(v, Literal) else known[v] for v in equation.invars]
        inner = f"{scope}/{equation.source_info.name_stack}"
        results = _through(equation, origins, inner, found)
        for variable, result in zip(equation.outvars, results, strict=True):
            floats = jnp.issubdtype(variable.aval.dtype, jnp.inexact)
            known[variable] = result._replace(trained=result.trained and floats)
    return [Origin() if isinstance(v, Literal) else known[v] for v in jaxpr.outvars]


def _through(equation: Any, origins: list[Origin], scope: str, found: Products) -> list[Origin]:
    """Adds the products of one operation; returns where its results come from."""
    name, parameters = equation.primitive.name, equation.params
    if name == "scan":
        return _loop(parameters["jaxpr"].jaxpr, origins, parameters["num_consts"], parameters, scope, found)
    if name == "while":
        return _while(parameters, origins, scope, found)
    if name == "cond":
        parts = [Products() for _ in parameters["branches"]]
        ends = [
            _walk(branch.jaxpr, origins[1:], scope, part)
            for branch, part in zip(parameters["branches"], parts, strict=True)
        ]
        found.add(max(parts, key=lambda part: part.forward))
        return [_all(both) for both in zip(*ends, strict=True)]
    for value in parameters.values():
        if isinstance(value, (Jaxpr, ClosedJaxpr)):
            return _walk(value.jaxpr if isinstance(value, ClosedJaxpr) else value, origins, scope, found)
    if name in _OPERATIONS:
        _multiply(equation, *origins[:2], scope, found)
    result = _all(origins)
    return [result._replace(trained=result.trained and name != "stop_gradient")] * len(equation.outvars)


def _loop(
    body: Jaxpr, origins: list[Origin], consts: int, parameters: Any, scope: str, found: Products
) -> list[Origin]:
    """As `_through` of a scan; what it carries on is followed until nothing more is added to where that comes from."""
    carried = parameters["num_carry"]
    origins = list(origins)
    while True:
        part = Products()
        ends = _walk(body, origins, scope, part)
        carry = [a.joined(b) for a, b in zip(origins[consts : consts + carried], ends[:carried], strict=True)]
        if carry == origins[consts : consts + carried]:
            break
        origins[consts : consts + carried] = carry
    found.add(part, parameters["length"])
    return [*carry, *ends[carried:]]


def _while(parameters: Any, origins: list[Origin], scope: str, found: Products) -> list[Origin]:
    """As `_through` of a loop of unknown length, which may multiply no matrices."""
    skipped, consts = parameters["cond_nconsts"], parameters["body_nconsts"]
    body, origins, part = parameters["body_jaxpr"].jaxpr, origins[skipped:], Products()
    whole = {"num_carry": len(origins) - consts, "length": 1}
    ends = _loop(body, origins, consts, whole, scope, part)
    if part.forward:
        raise NotImplementedError("a loop of unknown length multiplies matrices")
    found.add(part)
    return ends


def _multiply(equation: Any, left: Origin, right: Origin, scope: str, found: Products) -> None:
    if left.activation and right.activation:
        found.attends[SCOPE in scope] |= left.trained or right.trained
    if left.activation == right.activation or not (left.matrix or right.matrix):
        return
    operations = 2 * _OPERATIONS[equation.primitive.name](equation)
    found.forward += operations
    found.backward += operations * (left.trained + right.trained)


def _dot(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    return math.prod(equation.outvars[0].aval.shape) * math.prod(shape[d] for d in contracted)


def _ragged_dot(equation: Any) -> int:
    (contracted, _), _ = equation.params["ragged_dot_dimension_numbers"].dot_dimension_numbers
    shape = equation.invars[0].aval.shape
    return math.prod(equation.outvars[0].aval.shape) * math.prod(shape[d] for d in contracted)


def _convolution(equation: Any) -> int:
    """Multiply-adds of pixels that there are: padding has none."""
    numbers, (x, kernel), (y,) = equation.params["dimension_numbers"], equation.invars, equation.outvars
    count = math.prod(y.aval.shape[d] for d in numbers.out_spec[:2]) * kernel.aval.shape[numbers.rhs_spec[1]]
    for i, (stride, (low, _)) in enumerate(
        zip(equation.params["window_strides"], equation.params["padding"], strict=True)
    ):
        size, taps, out = (
            v.aval.shape[spec[2 + i]]
            for v, spec in ((x, numbers.lhs_spec), (kernel, numbers.rhs_spec), (y, numbers.out_spec))
        )
        at = np.arange(out)[:, None] * stride + np.arange(taps) - low
        count *= int(((at >= 0) & (at < size)).sum())
    return count


_OPERATIONS = {"dot_general": _dot, "ragged_dot_general": _ragged_dot, "conv_general_dilated": _convolution}


def _all(origins: Any) -> Origin:
    result = Origin()
    for origin in origins:
        result = result.joined(origin)
    return result

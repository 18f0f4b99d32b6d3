"""The component of every equation of a program, by its `jax.named_scope`.

The innermost scope that is one of `profiling.costs.COMPONENTS` is the component. A loop or a conditional is one
equation, of the scope that it stands in; calls are opened up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr, Literal

from profiling.costs import COMPONENTS

OTHER = "other"  # work of no component, and time in which nothing runs


@dataclass(frozen=True)
class Equation:
    """One equation of a program whose calls are opened up; each variable is a number of its own."""

    component: str  # or OTHER
    primitive: Any
    parameters: dict[str, Any]
    inputs: tuple[Any, ...]  # int, a variable; anything else is a constant
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class Program:
    """A pure function as a list of equations."""

    arguments: tuple[int, ...]
    equations: tuple[Equation, ...]
    results: tuple[Any, ...]  # int, a variable; anything else is a constant

    @classmethod
    def of(cls, jaxpr: ClosedJaxpr) -> Program:
        """The program of `jax.make_jaxpr(f)(...)` or `jax.jit(f).trace(...).jaxpr`."""
        numbers = iter(range(2**62))
        arguments = tuple(next(numbers) for _ in jaxpr.jaxpr.invars)
        equations: list[Equation] = []
        results = _opened(jaxpr, arguments, "", numbers, equations)
        return cls(arguments, tuple(equations), tuple(results))

    def owners(self) -> list[str]:
        """Of each argument the component that reads it; OTHER if it is not one alone."""
        readers: dict[int, set[str]] = {}
        for equation in self.equations:
            for variable in equation.inputs:
                if isinstance(variable, int):
                    readers.setdefault(variable, set()).add(equation.component)
        found = (readers.get(argument, set()) for argument in self.arguments)
        return [next(iter(one)) if len(one) == 1 else OTHER for one in found]


class Constant:
    """The value of a constant; never an int, which is a variable."""

    def __init__(self, value: Any):
        self.value = value


def component(scope: str) -> str:
    """The innermost component in a scope such as `jit(f)/attention/scores/dot_general`; OTHER if there is none."""
    for part in reversed(scope.split("/")):
        if part.startswith(("jit(", "pjit(")):
            continue  # a function's name
        bare = part.rstrip(")").rpartition("(")[2]  # transformations wrap a scope: vmap(scores)
        if bare in COMPONENTS:
            return bare
    return OTHER


def _opened(
    jaxpr: ClosedJaxpr, arguments: Sequence[Any], scope: str, numbers: Iterator[int], equations: list[Equation]
) -> list[Any]:
    """Appends the equations of a jaxpr for these arguments; returns its results."""
    names: dict[Any, Any] = dict(zip(jaxpr.jaxpr.invars, arguments, strict=True))
    names |= {variable: Constant(value) for variable, value in zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True)}

    def name(atom: Any) -> Any:
        if not isinstance(atom, Literal):
            return names[atom]
        shaped: Any = atom.aval
        return Constant(np.asarray(atom.val, shaped.dtype))

    for equation in jaxpr.jaxpr.eqns:
        inside = f"{scope}/{equation.source_info.name_stack}"
        inputs = [name(atom) for atom in equation.invars]
        called = _called(equation)
        if called is None:
            outputs = [next(numbers) for _ in equation.outvars]
            equations.append(
                Equation(component(inside), equation.primitive, equation.params, tuple(inputs), tuple(outputs))
            )
        else:
            outputs = _opened(called, inputs, inside, numbers, equations)
        names |= zip(equation.outvars, outputs, strict=True)
    return [name(atom) for atom in jaxpr.jaxpr.outvars]


def _called(equation: Any) -> ClosedJaxpr | None:
    """What a call calls, None for an equation that is no call. Of a custom derivative it is the function itself."""
    if equation.primitive.name not in ("jit", "closed_call", "custom_jvp_call", "custom_vjp_call"):
        return None
    called = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
    return called if isinstance(called, ClosedJaxpr) else None

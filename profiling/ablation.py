"""What each component of a program costs, by leaving it out: no trace, no hook in the model.

    seconds = by_ablation(calls)                                 # component -> float64 [rounds], per call

The program's equations are sorted by the scope that they were written under (`profiling.scopes`). Once, what every
component hands to the others is recorded. Then the program is compiled without the equations of one component, and
given what they would have handed on: the rest does the same work on the same values. What it alone would have read is
handed out, else the producers would be optimized away with it. Its time is what this saves over the whole program with
the same additional arguments and results: each of them costs a call a microsecond or more.

What this cannot see:

* Fusion across the border. A loop that XLA fuses over two components is cut in two, and what went through registers is
  written and read. So a component of small elementwise work may seem to cost nothing, or less.
* The state of the caches. What a component evicts or leaves there for others changes with it.
* Overlap. On several cores the rest may take the place of what is left out; savings need not sum to the whole.
* What has no scope, and the host: the rest of the whole is theirs.

A carried array that a left-out component would have written is passed on as it came where nobody else reads it (the
keys and values of attention, the counters); else its recorded value takes its place, which costs a copy (a cached
tier's entries, without `commit`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from profiling.calls import Calls
from profiling.compiling import at_once
from profiling.costs import COMPONENTS
from profiling.scopes import Constant, Equation, Program
from profiling.timing import compare

WHOLE = "whole"
_COPY = "copy"  # of the state before the first call: no part of a call


def by_ablation(calls: Calls, repeats: int = 9, seed: int = 0) -> dict[str, np.ndarray]:
    """Seconds per call that each component's absence saves, paired in each round, and those of the WHOLE.

    Components that the program has no equation of are left out. A saving may come out below zero.

    Args:
        repeats: rounds, each of which times the whole and every program that lacks a component, in an order drawn anew.

    Returns:
        Component or WHOLE -> float64 [repeats].
    """
    sizes = [len(jax.tree.leaves(part)) for part in (calls.fixed, calls.carry)]
    traced = jax.jit(calls.step, keep_unused=True).trace(calls.fixed, calls.carry, calls.inputs[0])
    program = Program.of(traced.jaxpr)
    present = [name for name in COMPONENTS if any(one.component == name for one in program.equations)]
    given = {name: borders(program, name)[0] for name in present}
    values = _recorded(program, calls, sizes, sorted(set().union(*given.values())))

    steps: dict[str, Any] = {WHOLE: _jitted(program, None, sizes)}
    made: dict[str, list[list[jax.Array]]] = {WHOLE: [[] for _ in calls.inputs]}
    for name in present:
        steps[name] = _jitted(program, name, sizes)
        steps[_with(name)] = _jitted(program, name, sizes, left_out=False)
        made[name] = made[_with(name)] = [[one[variable] for variable in given[name]] for one in values]
    at_once(partial(_compile, step, calls, made[name][0]) for name, step in steps.items())
    runs: dict[str, Callable[[], Any]] = {_COPY: calls.fresh}
    runs |= {name: partial(_round, step, calls, made[name]) for name, step in steps.items()}
    seconds = compare(runs, repeats, seed=seed)
    number = len(calls.inputs)
    saved = {name: (seconds[_with(name)] - seconds[name]) / number for name in present}
    return {WHOLE: (seconds[WHOLE] - seconds[_COPY]) / number, **saved}


def borders(program: Program, component: str) -> tuple[list[int], list[int]]:
    """The variables that a component makes for others, and those that others make for it; ascending."""
    made: dict[bool, set[int]] = {True: set(), False: set()}  # True: by the component
    read: dict[bool, set[int]] = {True: set(), False: _variables(program.results)}
    for equation in program.equations:
        own = equation.component == component
        made[own] |= set(equation.outputs)
        read[own] |= _variables(equation.inputs)
    return sorted(made[True] & read[False]), sorted(made[False] & read[True])


def without(
    program: Program, component: str | None, carried: Sequence[tuple[int, int]], left_out: bool = True
) -> Callable[..., Any]:
    """The program less a component; all of it if that is None.

    Args:
        carried: places of an argument and of the result that takes its place in the next call.
        left_out: False: the component runs all the same, but what is taken and handed out stays.

    Returns:
        A function of the arguments and of what the component makes for others (`borders`), both lists. It gives the
        results that are carried, and the others: less those that the component makes, and with what it alone reads.
    """
    given, wanted = borders(program, component) if component else ([], [])
    owners = program.owners()
    kept = [equation for equation in program.equations if equation.component != component]
    next_arguments = {result: argument for argument, result in carried}
    alive = needed(kept, _variables(program.results) - set(given))
    wanted = [variable for variable in wanted if variable not in alive]
    equations, missing = (kept, set(given)) if left_out else (program.equations, set())

    def run(arguments: Sequence[Any], made: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        values: dict[int, Any] = dict(zip(program.arguments, arguments, strict=True))
        if left_out:
            values |= dict(zip(given, made, strict=True))
        evaluate(equations, values)
        carry, others = [], [values[variable] for variable in wanted]
        for place, result in enumerate(program.results):
            argument = next_arguments.get(place)
            if argument is None:
                others += [] if result in missing else [_value(result, values)]
            elif result in missing and owners[argument] == component:
                carry.append(arguments[argument])
            else:
                carry.append(_value(result, values))
        return carry, others

    return run


def needed(equations: Sequence[Equation], variables: set[int]) -> set[int]:
    """All variables that these are made from, themselves included."""
    found = set(variables)
    for equation in reversed(equations):
        if not found.isdisjoint(equation.outputs):
            found |= _variables(equation.inputs)
    return found


def evaluate(equations: Iterable[Equation], values: dict[int, Any]) -> None:
    """Runs equations in order; `values` holds what they read and gains what they make."""
    for equation in equations:
        inputs = [_value(one, values) for one in equation.inputs]
        found = equation.primitive.bind(*inputs, **equation.parameters)
        values |= dict(zip(equation.outputs, found if equation.primitive.multiple_results else [found], strict=True))


def _jitted(program: Program, component: str | None, sizes: Sequence[int], left_out: bool = True) -> Any:
    """`without` as a step: fixed arguments, carry (spent), ids, and what the component makes -> carry, the rest."""
    fixed, carry = sizes
    run = without(program, component, [(fixed + place, place) for place in range(carry)], left_out)

    @partial(jax.jit, donate_argnums=1, keep_unused=True)  # so that both sides take as many arguments
    def step(fixed: list[Any], carry: list[Any], ids: jax.Array, made: list[Any]) -> tuple[list[Any], list[Any]]:
        return run([*fixed, *carry, ids], made)

    return step


def _with(component: str) -> str:
    """The name of the whole program that a component's absence is timed against."""
    return f"{component}, there"


def _compile(step: Any, calls: Calls, made: list[jax.Array]) -> None:
    """For the calls that follow, which then find it compiled."""
    step.lower(jax.tree.leaves(calls.fixed), jax.tree.leaves(calls.carry), calls.inputs[0], made).compile()


def _round(step: Any, calls: Calls, made: Sequence[list[jax.Array]]) -> Any:
    fixed, carry = jax.tree.leaves(calls.fixed), jax.tree.leaves(calls.fresh())
    for ids, own in zip(calls.inputs, made, strict=True):
        carry, rest = jax.block_until_ready(step(fixed, carry, ids, own))
    return rest


def _recorded(
    program: Program, calls: Calls, sizes: Sequence[int], variables: Sequence[int]
) -> list[dict[int, jax.Array]]:
    """The values of some variables in each of the calls."""

    @jax.jit
    def step(arguments: list[Any]) -> tuple[list[Any], list[Any]]:
        values: dict[int, Any] = dict(zip(program.arguments, arguments, strict=True))
        evaluate(program.equations, values)
        carry = [_value(result, values) for result in program.results[: sizes[1]]]
        return carry, [values[variable] for variable in variables]

    fixed, carry, found = jax.tree.leaves(calls.fixed), jax.tree.leaves(calls.carry), []
    for ids in calls.inputs:
        carry, values = step([*fixed, *carry, ids])
        found.append(dict(zip(variables, values, strict=True)))
    return found


def _value(name: Any, values: dict[int, Any]) -> Any:
    return name.value if isinstance(name, Constant) else values[name]


def _variables(names: Iterable[Any]) -> set[int]:
    return {name for name in names if isinstance(name, int)}

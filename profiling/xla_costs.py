"""What XLA says that a program costs, and what it holds that XLA is known to count wrongly.

    cost = analyze(jax.jit(f).trace(*arguments))
    print(cost.flops, cost.doubts)

The numbers are XLA's own (`cost_analysis`, `memory_analysis` of the compiled program), not corrected. Where a program
holds none of the constructs in `KNOWN_ERRORS`, its operations agree with `profiling.costs`; else the analytical count
is the one to believe. Each of these errors has a test, so a version of JAX that mends one shows it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jax.stages import Traced

KNOWN_ERRORS = {
    "loop": "its body is counted once, however often it runs (scan, fori_loop, while_loop, map)",
    "conditional": "its dearest branch is counted, whichever is taken (cond, switch)",
    "opaque call": "counts -1: nothing of its own work, and one less of the rest (top_k, callbacks, library kernels)",
    "gather": "its bytes are those of the whole array that it reads from",
    "ragged product": "where it is expanded, E groups of rows cost E times the useful operations (ragged_dot)",
}

_OPCODES = {"while": "loop", "conditional": "conditional", "custom-call": "opaque call", "gather": "gather"}
_INSTRUCTION = re.compile(rf"^\s*(?:ROOT )?%?[\w.-]+ = .*? ({'|'.join(_OPCODES)})\(", re.MULTILINE)
_RAGGED = frozenset({"ragged_dot", "ragged_dot_general"})


@dataclass(frozen=True)
class XlaCost:
    """XLA's account of a compiled program."""

    flops: float  # elementwise operations included; below the truth where there are doubts, perhaps negative
    bytes: float  # read and written by its kernels, whatever stays in a cache
    argument_bytes: int
    output_bytes: int
    aliased_bytes: int  # outputs that take the place of donated arguments
    temporary_bytes: int  # largest sum of arrays in between
    doubts: dict[str, int]  # constructs of KNOWN_ERRORS in the program, and how many there are

    @property
    def peak_bytes(self) -> int:
        """Device memory that a call needs, arguments included."""
        return self.argument_bytes + self.output_bytes - self.aliased_bytes + self.temporary_bytes


def analyze(traced: Traced) -> XlaCost:
    """Compiles a traced function (`jax.jit(f).trace(*arguments)`) and reads what XLA says of it."""
    compiled = traced.lower().compile()
    costs, memory = compiled.cost_analysis(), compiled.memory_analysis()
    if costs is None or memory is None:
        raise NotImplementedError(
            "this backend gives no cost or memory analysis; analyze the program on a CPU or a GPU"
        )
    doubts = constructs(compiled.as_text() or "")
    # A ragged product is expanded while lowering, before there is any text that could name it.
    ragged = sum(equation.primitive.name in _RAGGED for equation in equations(traced.jaxpr))
    return XlaCost(
        flops=float(costs["flops"]),
        bytes=float(costs["bytes accessed"]),
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        aliased_bytes=memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        doubts=doubts | ({"ragged product": ragged} if ragged else {}),
    )


def constructs(hlo: str) -> dict[str, int]:
    """How many instructions of an optimized program's HLO text (`compiled.as_text()`) XLA's count goes wrong on.

    The keys are those of `KNOWN_ERRORS`; ragged products leave no trace in HLO.
    """
    found = Counter(_OPCODES[opcode] for opcode in _INSTRUCTION.findall(hlo))
    return {name: found[name] for name in KNOWN_ERRORS if name in found}


def explain(doubts: dict[str, int]) -> list[str]:
    """A line for people on each construct, none if XLA's count can be trusted."""
    return [f"{count} x {name}: {KNOWN_ERRORS[name]}" for name, count in doubts.items()]


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a jaxpr, those of its loops, branches and calls among them."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if hasattr(inner, "eqns"):
                    yield from equations(inner)

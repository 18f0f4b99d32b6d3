"""What the operations of a compiled program were written for.

    module = describe(jax.jit(f, keep_unused=True).trace(*arguments))
    module.instructions["fusion.7"].shares                       # (("scores", 1.0),)

A profiler's events name instructions of the optimized program. Its text keeps, for most of them, the `jax.named_scope`
of what they were made from; the innermost one that is a component (`profiling.scopes`) is theirs.

* A fusion is shared among the components of what it fuses: all of it goes to a matrix product in it, else each has the
  part of its elements. That is an estimate: nobody can say what a part of a fused loop costs.
* Where XLA made an instruction and does not say why, it belongs to the component that alone reads an argument which it
  reads (a matrix product that was rewritten and its weights), else to the nearest user that says, else to the nearest
  operand.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jax.stages import Traced

from profiling.scopes import OTHER, Program, component
from varjax.errors import InputError

Shares = tuple[tuple[str, float], ...]  # components or OTHER, and their shares of an instruction, which sum to 1

_CONTROL = frozenset({"while", "conditional", "call"})
_FREE = frozenset({"parameter", "constant", "broadcast", "bitcast", "iota", "tuple", "get-tuple-element"})
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.-]+) = (.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
_OPCODE = re.compile(r" ([\w-]+)\(")
_PARAMETER = re.compile(r" parameter\((\d+)\)")
_SHAPE = re.compile(r"\w+\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.-]+)")
_FUSED = re.compile(r" fusion\(.* calls=%([\w.-]+)")
_SCOPE = re.compile(r'op_name="([^"]*)"')
_FUNCTIONS = re.compile(r"(p?jit\([^/]*\)/?)+")  # no operation in it: XLA made the instruction


@dataclass(frozen=True)
class Instruction:
    """One operation of a compiled program."""

    shares: Shares
    control: bool  # a loop, a conditional or a call, which spans other operations


@dataclass(frozen=True)
class Module:
    """A compiled program."""

    name: str
    instructions: Mapping[str, Instruction]


def describe(traced: Traced) -> Module:
    """Compiles a traced function, `jax.jit(f, keep_unused=True).trace(*arguments)`, and reads its text.

    Raises:
        InputError: arguments that are not used were left out of the compiled program.
    """
    text = traced.lower().compile().as_text() or ""
    return read(text, Program.of(traced.jaxpr).owners())


def read(text: str, owners: Sequence[str] = ()) -> Module:
    """The text of an optimized HLO module.

    Args:
        owners: the component that reads each argument (`Program.owners`); empty if it is not known.
    """
    lines = _Lines.of(text)
    if owners and len(owners) != len(lines.arguments):
        raise InputError(
            f"the program has {len(lines.arguments)} arguments of {len(owners)}: those not used were left out and the "
            "others cannot be told apart; jit it with keep_unused=True"
        )
    owned = {name: owners[number] for name, number in lines.arguments.items()} if owners else {}
    found = {}
    for name in lines.operands:
        shares = lines.fused(name) or lines.own(name)
        if shares is None:
            read_alone = (owned.get(operand, OTHER) for operand in lines.operands[name])
            nearest = next((one for one in read_alone if one != OTHER), None)
            nearest = nearest or lines.nearest(name, lines.users) or lines.nearest(name, lines.operands)
            shares = ((nearest or OTHER, 1.0),)
        found[name] = Instruction(shares, lines.opcodes[name] in _CONTROL)
    return Module(text.removeprefix("HloModule ").split(",", 1)[0], found)


@dataclass(frozen=True)
class _Lines:
    """The instructions of all computations; their names are unique in a module."""

    opcodes: dict[str, str]
    components: dict[str, str | None]  # None: XLA does not say
    elements: dict[str, int]
    operands: dict[str, list[str]]
    users: dict[str, list[str]]
    arguments: dict[str, int]  # of the program, by number
    calls: dict[str, str]  # fusion -> its computation
    bodies: dict[str, list[str]]  # computation -> its instructions

    @classmethod
    def of(cls, text: str) -> _Lines:
        lines = cls({}, {}, {}, {}, defaultdict(list), {}, {}, defaultdict(list))
        computation, entry, results = "", False, {}
        for line in text.splitlines():
            found = _INSTRUCTION.match(line)
            if found is None:
                opening = _COMPUTATION.match(line)
                if opening:
                    entry, computation = bool(opening[1]), opening[2]
                continue
            root, name, rest = found.groups()
            lines._add(name, rest, computation)
            number = _PARAMETER.search(rest)
            if entry and number:
                lines.arguments[name] = int(number[1])
            if root:
                results[name] = computation
        for name, called in results.items():  # what a computation returns is used where it is called
            lines.users[name] += lines.users[called]
        return lines

    def _add(self, name: str, rest: str, computation: str) -> None:
        opcode, scope, shape, fused = (one.search(rest) for one in (_OPCODE, _SCOPE, _SHAPE, _FUSED))
        self.opcodes[name] = opcode[1] if opcode else ""
        said = scope is not None and not _FUNCTIONS.fullmatch(scope[1])
        self.components[name] = component(scope[1]) if scope and said else None
        self.elements[name] = math.prod(int(size) for size in shape[1].split(",") if size) if shape else 1
        self.operands[name] = _NAME.findall(rest)
        self.bodies[computation].append(name)
        if fused:
            self.calls[name] = fused[1]
        for operand in self.operands[name]:
            self.users[operand].append(name)

    def own(self, name: str) -> Shares | None:
        said = self.components[name]
        return ((said, 1.0),) if said else None

    def fused(self, name: str) -> Shares | None:
        """Of a fusion, by what it fuses; None if it is none, or nothing in it says."""
        inside = [one for one in self.bodies.get(self.calls.get(name, ""), ()) if self.components[one]]
        inside = [one for one in inside if self.opcodes[one] == "dot"] or inside
        weights: Counter[str] = Counter()
        for one in inside:
            if self.opcodes[one] not in _FREE:
                weights[str(self.components[one])] += self.elements[one]
        total = weights.total()
        return tuple((part, weight / total) for part, weight in weights.items()) if total else None

    def nearest(self, name: str, neighbors: Mapping[str, list[str]]) -> str | None:
        """The component of the nearest instruction that says, along users or operands."""
        seen, frontier = {name}, [name]
        while frontier:
            for one in frontier:
                if self.components.get(one):
                    return self.components[one]
            frontier = [other for one in frontier for other in neighbors.get(one, ()) if other not in seen]
            seen.update(frontier)
        return None

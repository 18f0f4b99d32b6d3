"""Profiler traces of a jitted program, and the time of each component in them.

    path = capture(calls, "traces", "prefill")                   # a folder that TensorBoard and XProf open
    times = component_times(path, describe(step.trace(*arguments)))

A profiler's events name instructions of the optimized program, whose text keeps for most of them the `jax.named_scope`
that they were written under. The innermost scope that is one of `profiling.costs.COMPONENTS` is their component.

* A fusion is shared among the components that it fuses: all of it goes to a matrix product in it, otherwise each has
  the share of its elements. That is an estimate, because the parts of a fused loop cannot be timed.
* An instruction that XLA created without a scope belongs to the component that alone reads an argument which it reads
  (a rewritten matrix product and its weights), otherwise to the nearest user with a scope, otherwise to the nearest
  operand.
* The event of a loop, a conditional or a call spans those inside it. Per thread only the innermost event counts, and
  across threads control flow counts only while nothing else runs.
* Wall time is shared in equal parts among the operations that run at the same time, so components and `other` sum to
  the wall time of the calls.

The traces are those of a CPU; events of other devices are used if they name their operation in the same way (`hlo_op`).
"""

from __future__ import annotations

import math
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal
from jax.profiler import ProfileData, ProfileOptions, StepTraceAnnotation
from jax.stages import Traced

from profiling.costs import COMPONENTS
from varjax.errors import InputError

OTHER = "other"  # work without a component, and time in which nothing runs

_CALL = "call"  # the annotation around each call
_CONTROL = frozenset({"while", "conditional", "call"})
_FREE = frozenset({"parameter", "constant", "broadcast", "bitcast", "iota", "tuple", "get-tuple-element"})
_LINE = re.compile(r"^\s*(ROOT )?%?([\w.-]+) = (.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
_OPCODE = re.compile(r" ([\w-]+)\(")
_PARAMETER = re.compile(r" parameter\((\d+)\)")
_SHAPE = re.compile(r"\w+\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.-]+)")
_FUSED = re.compile(r" fusion\(.* calls=%([\w.-]+)")
_SCOPE = re.compile(r'op_name="([^"]*)"')
_FUNCTIONS = re.compile(r"(p?jit\([^/]*\)/?)+")  # a scope that names no operation: XLA created the instruction


@dataclass(frozen=True)
class Instruction:
    """One operation of a compiled program."""

    shares: tuple[tuple[str, float], ...]  # components or OTHER with their shares, which sum to 1
    control: bool  # a loop, a conditional or a call, which spans other operations


@dataclass(frozen=True)
class Module:
    """A compiled program."""

    name: str
    instructions: Mapping[str, Instruction]


@dataclass(frozen=True)
class ComponentTimes:
    """Seconds of each call of a trace, float64 [calls] each."""

    wall: np.ndarray  # from the call to the end of its last operation
    seconds: dict[str, np.ndarray]  # component or OTHER -> its share of `wall`; they sum to it
    idle: np.ndarray  # the part of OTHER in which no operation ran
    # Component or OTHER -> events per call recorded in its time: those inside a loop in the loop's, others in OTHER.
    recorded: dict[str, float]


class _Line(NamedTuple):
    """One instruction of the text of a module."""

    opcode: str
    component: str | None  # None: XLA does not say
    elements: int
    operands: list[str]
    fused: str | None  # the computation of a fusion


class _Event(NamedTuple):
    start: float  # nanoseconds
    end: float
    instruction: Instruction


class _Recording(NamedTuple):
    """A trace as it is read from its file."""

    calls: list[tuple[float, float]]  # start and end of each, nanoseconds
    threads: list[list[_Event]]


_UNKNOWN = Instruction(((OTHER, 1.0),), control=False)


def _component(scope: str) -> str:
    """The innermost component in a scope."""
    for part in reversed(scope.split("/")):
        if part.startswith(("jit(", "pjit(")):
            continue  # the name of a function
        bare = part.rstrip(")").rpartition("(")[2]  # transformations wrap a scope: vmap(scores)
        if bare in COMPONENTS:
            return bare
    return OTHER


def _owners(jaxpr: ClosedJaxpr) -> list[str]:
    """The component that alone reads each argument of a program."""
    readers: list[set[str]] = [set() for _ in jaxpr.jaxpr.invars]
    _note_readers(jaxpr, readers, "")
    return [next(iter(one)) if len(one) == 1 else OTHER for one in readers]


def describe(traced: Traced) -> Module:
    """Compile a traced function and find the component of each of its instructions.

    Args:
        traced: from `jax.jit(f, keep_unused=True).trace(*arguments)`.

    Returns:
        The compiled program.

    Raises:
        InputError: unused arguments were left out of the compiled program.
    """
    return _parsed(traced.lower().compile().as_text() or "", _owners(traced.jaxpr))


def _parsed(text: str, owned: Sequence[str] = ()) -> Module:
    """Find the component of each instruction in the text of an optimized HLO module."""
    lines: dict[str, _Line] = {}  # names are unique in a module
    users: dict[str, list[str]] = defaultdict(list)
    bodies: dict[str, list[str]] = defaultdict(list)  # computation -> its instructions
    arguments, results = {}, {}
    computation, entry = "", False
    for row in text.splitlines():
        if not (found := _LINE.match(row)):
            if opening := _COMPUTATION.match(row):
                entry, computation = bool(opening[1]), opening[2]
            continue
        root, name, rest = found.groups()
        lines[name] = _line(rest)
        bodies[computation].append(name)
        for operand in lines[name].operands:
            users[operand].append(name)
        if entry and (number := _PARAMETER.search(rest)):
            arguments[name] = int(number[1])
        if root:
            results[name] = computation
    for name, called in results.items():  # what a computation returns is used where it is called
        users[name] += users[called]
    if owned and len(owned) != len(arguments):
        raise InputError(
            f"the program has {len(arguments)} arguments of {len(owned)}: unused ones were left out and the others "
            "cannot be told apart; jit it with keep_unused=True"
        )

    def fused(name: str) -> tuple[tuple[str, float], ...]:
        inside = [lines[one] for one in bodies.get(lines[name].fused or "", ()) if lines[one].component]
        inside = [one for one in inside if one.opcode == "dot"] or inside
        weights: Counter[str] = Counter()
        for one in inside:
            if one.opcode not in _FREE:
                weights[str(one.component)] += one.elements
        return tuple((part, weight / weights.total()) for part, weight in weights.items() if weights.total())

    def nearest(name: str, neighbors: Callable[[str], Iterable[str]]) -> str | None:
        seen, frontier = {name}, [name]
        while frontier:
            for one in frontier:
                if one in lines and lines[one].component:
                    return lines[one].component
            frontier = list(dict.fromkeys(other for one in frontier for other in neighbors(one) if other not in seen))
            seen.update(frontier)
        return None

    def operands(name: str) -> Iterable[str]:
        return lines[name].operands if name in lines else ()

    def inferred(name: str) -> str:
        read_alone = (owned[arguments[one]] for one in operands(name) if owned and one in arguments)
        said = next((one for one in read_alone if one != OTHER), None)
        return said or nearest(name, lambda one: users.get(one, ())) or nearest(name, operands) or OTHER

    instructions = {
        name: Instruction(fused(name) or ((line.component or inferred(name), 1.0),), line.opcode in _CONTROL)
        for name, line in lines.items()
    }
    return Module(text.removeprefix("HloModule ").split(",", 1)[0], instructions)


def capture(calls: Iterable[Callable[[], Any]], folder: str | Path, name: str) -> Path:
    """Trace calls, each from its start until its result is ready; what the iterator does in between is in no call.

    Args:
        calls: each was compiled and run before.
        folder: the log directory of TensorBoard.
        name: of this run in it; a trace of the same name is replaced.

    Returns:
        The file written, `folder/plugins/profile/name/*.xplane.pb`.
    """
    run = Path(folder) / "plugins" / "profile" / name
    for old in run.glob("*.xplane.pb"):
        old.unlink()
    options = ProfileOptions()
    options.python_tracer_level = 0  # Python's own calls would cost more time than they show
    options.session_id = name
    with jax.profiler.trace(folder, profiler_options=options):
        for index, call in enumerate(calls):
            with StepTraceAnnotation(_CALL, step_num=index):
                jax.block_until_ready(call())
    (path,) = run.glob("*.xplane.pb")
    return path


def wall_times(calls: Iterable[Callable[[], Any]]) -> np.ndarray:
    """Time calls as `capture` makes them, without a trace.

    Args:
        calls: each was compiled before.

    Returns:
        Seconds, float64 [calls].
    """
    found = []
    for call in calls:
        start = time.perf_counter()
        jax.block_until_ready(call())
        found.append(time.perf_counter() - start)
    return np.array(found)


def component_times(path: str | Path, program: Module) -> ComponentTimes:
    """Divide the time of the calls of a trace among the components.

    Args:
        path: what `capture` returned.
        program: that ran; operations of other programs are OTHER.

    Returns:
        The times.

    Raises:
        InputError: a trace without a call, or without an operation of this program.
    """
    calls, threads = _read(path, program)
    if not calls or all(event.instruction is _UNKNOWN for thread in threads for event in thread):
        raise InputError(
            f"{path}: {len(calls)} calls and no operation of {program.name}; give the program that `capture` traced"
        )
    stretches, recorded = [], dict.fromkeys((*COMPONENTS, OTHER), 0.0)
    for thread in threads:
        innermost, around = _nested(thread)
        stretches += innermost
        for instruction in around:
            for name, share in instruction.shares:
                recorded[name] += share / len(calls)
    seconds, idle = _shared(stretches, calls)
    return ComponentTimes(np.array([end - start for start, end in calls]) * 1e-9, seconds, idle, recorded)


def operations(path: str | Path) -> tuple[np.ndarray, float]:
    """The calls of a trace without their components.

    Args:
        path: what `capture` returned.

    Returns:
        Seconds of each call, float64 [calls], and recorded operations per call.
    """
    calls, threads = _read(path, Module("", {}))
    wall = np.array([end - start for start, end in calls]) * 1e-9
    return wall, sum(map(len, threads)) / len(calls)


def _note_readers(jaxpr: ClosedJaxpr, arguments: Sequence[set[str] | None], scope: str) -> list[set[str] | None]:
    """Add the components that read each argument to its set, also inside calls; return the sets of the results."""
    known: dict[Any, set[str] | None] = dict(zip(jaxpr.jaxpr.invars, arguments, strict=True))

    def given(atoms: Iterable[Any]) -> list[set[str] | None]:
        return [None if isinstance(atom, Literal) else known.get(atom) for atom in atoms]

    for equation in jaxpr.jaxpr.eqns:
        inside = f"{scope}/{equation.source_info.name_stack}"
        called = None
        if equation.primitive.name in ("jit", "closed_call", "custom_jvp_call", "custom_vjp_call"):
            called = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
        if isinstance(called, ClosedJaxpr):
            known |= zip(equation.outvars, _note_readers(called, given(equation.invars), inside), strict=True)
        else:
            for readers in given(equation.invars):
                if readers is not None:
                    readers.add(_component(inside))
    return given(jaxpr.jaxpr.outvars)


def _line(rest: str) -> _Line:
    opcode, scope, shape, fused = (one.search(rest) for one in (_OPCODE, _SCOPE, _SHAPE, _FUSED))
    said = scope is not None and not _FUNCTIONS.fullmatch(scope[1])
    return _Line(
        opcode[1] if opcode else "",
        _component(scope[1]) if scope and said else None,
        math.prod(int(size) for size in shape[1].split(",") if size) if shape else 1,
        _NAME.findall(rest),
        fused[1] if fused else None,
    )


def _read(path: str | Path, program: Module) -> _Recording:
    calls, threads = [], []
    for plane in ProfileData.from_file(str(path)).planes:
        for line in plane.lines:
            thread = []
            for event in line.events:
                if event.name == _CALL:
                    calls.append((event.start_ns, event.end_ns))
                    continue
                about = dict(event.stats)
                if "hlo_op" in about:
                    known = program.instructions if str(about.get("hlo_module")) == program.name else {}
                    thread.append(_Event(event.start_ns, event.end_ns, known.get(str(about["hlo_op"]), _UNKNOWN)))
            threads.append(thread)
    return _Recording(sorted(calls), threads)


def _nested(events: Iterable[_Event]) -> tuple[list[_Event], list[Instruction]]:
    """Of one thread: disjoint stretches with the innermost operation of each, and what encloses each event."""
    stretches, around = [], []
    stack: list[_Event] = []
    at = 0.0  # up to here stretches are known
    last = _Event(math.inf, math.inf, _UNKNOWN)
    for event in [*sorted(events, key=lambda event: (event.start, -event.end)), last]:
        while stack and stack[-1].end <= event.start:
            over = stack.pop()
            if over.end > at:
                stretches.append(_Event(at, over.end, over.instruction))
                at = over.end
        if stack and event.start > at:
            stretches.append(_Event(at, event.start, stack[-1].instruction))
        around.append(stack[-1].instruction if stack else _UNKNOWN)
        at = max(at, event.start)
        stack.append(event)
    return stretches, around[:-1]


def _shared(
    stretches: Iterable[_Event], calls: Sequence[tuple[float, float]]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Wall time of each call by component, and how long nothing ran in it; seconds."""
    points: list[tuple[float, int, Instruction | int]] = []  # an int is the index of a call
    spans: list[Any] = [*stretches, *((*call, index) for index, call in enumerate(calls))]
    for start, end, what in spans:
        points += [(start, 1, what), (end, -1, what)]
    seconds = {name: np.zeros(len(calls)) for name in (*COMPONENTS, OTHER)}
    idle = np.zeros(len(calls))
    work: Counter[Instruction] = Counter()
    control: Counter[Instruction] = Counter()
    call, before = -1, 0.0  # -1: between two calls
    for now, change, what in sorted(points, key=lambda point: point[:2]):
        elapsed, before = (now - before) * 1e-9, now
        if call >= 0 and elapsed > 0:
            running = +work or +control
            for instruction, number in running.items():
                for name, share in instruction.shares:
                    seconds[name][call] += elapsed * share * number / running.total()
            if not running:
                idle[call] += elapsed
        if isinstance(what, int):
            call = what if change > 0 else -1
        else:
            (control if what.control else work)[what] += change
    seconds[OTHER] += idle
    return seconds, idle

"""Profiler traces of a jitted program, and the time of each component in them.

    path = capture(calls, "traces", "prefill")                   # a folder that TensorBoard and XProf open
    times = component_times(path, describe(step.trace(*arguments)))

A profiler's events name instructions of the optimized program, whose text keeps for most of them the `jax.named_scope`
that they were written under. The innermost scope that is one of `profiling.costs.COMPONENTS` is their component.

* A fusion is shared among the components that it fuses: all of it goes to a matrix product in it, otherwise each has
  the share of its elements. That is an estimate, because the parts of a fused loop cannot be timed.
* An instruction that XLA created without a scope belongs to the nearest user with a scope, otherwise to the nearest
  operand with one.
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
from jax.profiler import ProfileData, ProfileOptions, StepTraceAnnotation
from jax.stages import Traced

from profiling.costs import COMPONENTS
from varjax.errors import InputError

OTHER = "other"  # work without a component, and time in which nothing runs

_CALL = "call"  # the annotation around each call
_CONTROL = frozenset({"while", "conditional", "call"})
_FREE = frozenset({"parameter", "constant", "broadcast", "bitcast", "iota", "tuple", "get-tuple-element"})
_LINE = re.compile(r"^\s*(ROOT )?%?([\w.-]+) = (.*)$")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) .*\{$")
_OPCODE = re.compile(r" ([\w-]+)\(")
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


def describe(traced: Traced) -> Module:
    """Compile a traced function and find the component of each of its instructions.

    Args:
        traced: from `jax.jit(f).trace(*arguments)`.

    Returns:
        The compiled program.
    """
    return _parsed(traced.lower().compile().as_text() or "")


def _parsed(text: str) -> Module:
    """The component of each instruction in the text of an optimized HLO module."""
    lines: dict[str, _Line] = {}  # names are unique in a module
    users: dict[str, list[str]] = defaultdict(list)
    bodies: dict[str, list[str]] = defaultdict(list)  # computation -> its instructions
    results = {}  # the root of a computation -> the computation
    computation = ""
    for row in text.splitlines():
        if found := _LINE.match(row):
            root, name, rest = found.groups()
            lines[name] = _line(rest)
            bodies[computation].append(name)
            for operand in lines[name].operands:
                users[operand].append(name)
            if root:
                results[name] = computation
        elif opening := _COMPUTATION.match(row):
            computation = opening[1]
    for name, called in results.items():  # what a computation returns is used where it is called
        users[name] += users[called]
    operands = {name: line.operands for name, line in lines.items()}

    def fused(name: str) -> tuple[tuple[str, float], ...]:
        inside = [lines[one] for one in bodies.get(lines[name].fused or "", ()) if lines[one].component]
        inside = [one for one in inside if one.opcode == "dot"] or inside
        weights: Counter[str] = Counter()
        for one in inside:
            if one.opcode not in _FREE:
                weights[str(one.component)] += one.elements
        return tuple((part, weight / weights.total()) for part, weight in weights.items() if weights.total())

    def nearest(name: str, neighbors: Mapping[str, list[str]]) -> str | None:
        seen, frontier = {name}, [name]
        while frontier:
            for one in frontier:
                if one in lines and lines[one].component:
                    return lines[one].component
            frontier = [other for one in frontier for other in neighbors.get(one, ()) if other not in seen]
            seen.update(frontier)
        return None

    instructions = {}
    for name, line in lines.items():
        shares = fused(name) or ((nearest(name, users) or nearest(name, operands) or OTHER, 1.0),)
        instructions[name] = Instruction(shares, line.opcode in _CONTROL)
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


def _read(path: str | Path, program: Module) -> tuple[list[tuple[float, float]], list[list[_Event]]]:
    """Start and end of each call in nanoseconds, and the operations of each thread."""
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
    return sorted(calls), threads


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

"""Profiler traces of a jitted program, and the time of each component in them.

    path = capture(calls, "traces", "prefill")                   # a folder that TensorBoard and XProf open
    times = component_times(path, [compiled.as_text()])

A trace names the operations of the compiled program as they run, not what they were written for. The program's own text
says that: XLA keeps the `jax.named_scope` of what an instruction was made from. The innermost scope that is one of
`profiling.costs.COMPONENTS` is the instruction's component. Where XLA put an instruction in without saying why (a copy),
it belongs to what uses it. A fusion is one operation, with the scope of its last one: work that XLA fused across the
border of two components counts for one of them.

**Time of a loop.** The event of a loop, a conditional or a call spans those inside it. On one thread only the innermost
event counts; and over all threads control flow counts only while nothing else runs.

**Wall and busy.** Independent operations may run at the same time on several threads. `seconds` shares wall time: at each
instant, in equal parts among the operations that run, so that components and `other` sum to the wall time of the calls.
`busy` adds threads up; workers that help with one operation have no events of their own and are in neither.

Read from CPU traces; events of other devices are taken if they name their operation in the same way (`hlo_op`).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.profiler import ProfileData, ProfileOptions, StepTraceAnnotation

from profiling.costs import COMPONENTS

OTHER = "other"  # no operation runs (host, dispatch, gaps), or one without a component

_CALL = "call"  # the annotation around each call
_CONTROL = frozenset({"while", "conditional", "call"})
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.-]+) = (.*)$")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) .*\{$")
_OPCODE = re.compile(r" ([\w-]+)\(")
_NAME = re.compile(r"%([\w.-]+)")
_SCOPE = re.compile(r'op_name="([^"]*)"')


@dataclass(frozen=True)
class ComponentTimes:
    """Seconds of all calls of a trace together."""

    calls: int
    wall: float  # from each call to its end, added up
    seconds: dict[str, float]  # component or OTHER -> its share of `wall`; they sum to it
    idle: float  # in OTHER: no operation ran
    busy: dict[str, float]  # component or OTHER -> time of its operations, threads added up


class Instruction(NamedTuple):
    """What the program's text says of one operation."""

    component: str  # or OTHER
    control: bool  # spans the operations of its body


class _Event(NamedTuple):
    start: float  # nanoseconds
    end: float
    instruction: Instruction


def capture(calls: Iterable[Callable[[], Any]], folder: str | Path, name: str) -> Path:
    """Traces calls, each from its start until what it returns is ready; what the iterator does between is in no call.

    Args:
        calls: each compiled and run before.
        folder: TensorBoard's log directory.
        name: of this run in it; a trace of the same name is replaced.

    Returns:
        The file written, `folder/plugins/profile/name/*.xplane.pb`.

    Raises:
        RuntimeError: another trace is being taken in this process.
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


def component_times(path: str | Path, programs: Sequence[str]) -> ComponentTimes:
    """Where the time of the calls of a trace went.

    Args:
        path: what `capture` returned.
        programs: HLO text of the compiled programs that ran (`compiled.as_text()`), each module's name once.

    Raises:
        ValueError: two programs of one name; a trace without a call, or without an operation of these programs.
    """
    known: dict[str, dict[str, Instruction]] = {}
    for text in programs:
        module = text.removeprefix("HloModule ").split(",", 1)[0]
        if module in known:
            raise ValueError(f"two programs are called {module}: the trace cannot tell them apart; trace them singly")
        known[module] = instructions(text)
    calls, threads = _read(path, known)
    if not calls or not any(event.instruction.component != OTHER for thread in threads for event in thread):
        raise ValueError(
            f"{path}: {len(calls)} calls and no operation with a component of {', '.join(known)}; "
            "give the texts of the programs that were traced by `capture`"
        )
    stretches = [stretch for thread in threads for stretch in innermost(thread)]
    seconds, idle = _shared(stretches, calls)
    busy = {name: 0.0 for name in (*COMPONENTS, OTHER)}
    for start, end, instruction in stretches:
        if not instruction.control:
            busy[instruction.component] += (end - start) * 1e-9
    return ComponentTimes(len(calls), sum(end - start for start, end in calls) * 1e-9, seconds, idle, busy)


def component(scope: str) -> str:
    """The innermost component in an `op_name` such as `jit(f)/attention/scores/dot_general`; OTHER if there is none."""
    for part in reversed(scope.split("/")):
        if part.startswith(("jit(", "pjit(")):
            continue  # a function's name, not a scope
        bare = part.rstrip(")").rpartition("(")[2]  # transformations wrap a scope: vmap(scores)
        if bare in COMPONENTS:
            return bare
    return OTHER


def instructions(text: str) -> dict[str, Instruction]:
    """Every instruction of an optimised HLO module."""
    scopes: dict[str, str] = {}
    opcodes: dict[str, str] = {}
    uses: dict[str, list[str]] = {}  # what an instruction names: operands, and the computations that it calls
    users: dict[str, list[str]] = defaultdict(list)
    computation = ""
    for line in text.splitlines():
        found = _INSTRUCTION.match(line)
        if found is None:
            opening = _COMPUTATION.match(line)
            computation = opening[1] if opening else computation
            continue
        root, name, rest = found.groups()
        scope, opcode = _SCOPE.search(rest), _OPCODE.search(rest)
        scopes[name] = component(scope[1]) if scope else OTHER
        opcodes[name] = opcode[1] if opcode else ""
        uses[name] = _NAME.findall(rest)
        for used in uses[name]:
            users[used].append(name)
        if root:  # what a computation returns is used where it is called
            uses.setdefault(computation, []).append(name)
            users[name].append(f"{computation}()")
            uses[f"{computation}()"] = []
    for name in list(users):  # a call names the computation
        for result in (one for one in users[name] if one.endswith("()")):
            users[result] = users[result[:-2]]
    return {
        name: Instruction(_nearest(name, scopes, users) or _nearest(name, scopes, uses) or OTHER, opcode in _CONTROL)
        for name, opcode in opcodes.items()
    }


def innermost(events: Iterable[_Event]) -> Iterator[tuple[float, float, Instruction]]:
    """Disjoint stretches of one thread: start, end, and the innermost operation that runs in it."""
    stack: list[_Event] = []
    at = 0.0
    last = _Event(float("inf"), float("inf"), Instruction(OTHER, True))
    for event in [*sorted(events, key=lambda one: (one.start, -one.end)), last]:
        while stack and stack[-1].end <= event.start:
            over = stack.pop()
            if over.end > at:
                yield at, over.end, over.instruction
                at = over.end
        if stack and event.start > at:
            yield at, event.start, stack[-1].instruction
        at = max(at, event.start)
        stack.append(event)


def _read(
    path: str | Path, known: dict[str, dict[str, Instruction]]
) -> tuple[list[tuple[float, float]], list[list[_Event]]]:
    """Start and end of each call, and the operations of each thread; one of an unknown program has no component."""
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
                    module = known.get(str(about.get("hlo_module")), {})
                    instruction = module.get(str(about["hlo_op"]), Instruction(OTHER, False))
                    thread.append(_Event(event.start_ns, event.end_ns, instruction))
            threads.append(thread)
    return calls, threads


def _shared(
    stretches: Iterable[tuple[float, float, Instruction]], calls: Iterable[tuple[float, float]]
) -> tuple[dict[str, float], float]:
    """Wall time of the calls by component, and what is left of it, in seconds."""
    points: list[tuple[float, int, Instruction | None]] = []  # None: a call
    for start, end, what in (*stretches, *((start, end, None) for start, end in calls)):
        points += [(start, 1, what), (end, -1, what)]
    seconds = {name: 0.0 for name in (*COMPONENTS, OTHER)}
    work: Counter[str] = Counter()
    control: Counter[str] = Counter()
    inside, before, idle = 0, 0.0, 0.0
    for time, change, what in sorted(points, key=lambda point: point[0]):
        if inside and time > before:
            running = +work or +control
            for name, number in running.items():
                seconds[name] += (time - before) * 1e-9 * number / running.total()
            if not running:
                idle += (time - before) * 1e-9
        before = time
        if what is None:
            inside += change
        else:
            (control if what.control else work)[what.component] += change
    seconds[OTHER] += idle
    return seconds, idle


def _nearest(start: str, components: dict[str, str], neighbours: dict[str, list[str]]) -> str | None:
    """The component of the nearest instruction that has one, along users or operands; None if there is none."""
    seen, frontier = {start}, [start]
    while frontier:
        for name in frontier:
            if components.get(name, OTHER) != OTHER:
                return components[name]
        frontier = [other for name in frontier for other in neighbours.get(name, ()) if other not in seen]
        seen.update(frontier)
    return None

"""Profiler traces of a jitted program, and the time of each component in them.

    path = capture(calls, "traces", "prefill")                   # a folder that TensorBoard and XProf open
    times = component_times(path, [describe(step.trace(*arguments))])

The events of a trace name the operations of the compiled program; `profiling.programs` says what these are for.

**Time of a loop.** The event of a loop, a conditional or a call spans those inside it. On one thread only the innermost
event counts; and over all threads control flow counts only while nothing else runs.

**Wall and busy.** Independent operations may run at the same time on several threads. `seconds` shares wall time: at
each instant, in equal parts among the operations that run, so that components and `other` sum to the wall time of the
calls. `busy` adds threads up; workers that help with one operation have no events of their own and are in neither.

Read from CPU traces; events of other devices are taken if they name their operation in the same way (`hlo_op`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.profiler import ProfileData, ProfileOptions, StepTraceAnnotation

from profiling.costs import COMPONENTS
from profiling.programs import Instruction, Module
from profiling.scopes import OTHER

_CALL = "call"  # the annotation around each call
_UNKNOWN = Instruction(((OTHER, 1.0),), control=False)


@dataclass(frozen=True)
class ComponentTimes:
    """Seconds of all calls of a trace together."""

    calls: int
    wall: float  # from each call to its end, added up
    seconds: dict[str, float]  # component or OTHER -> its share of `wall`; they sum to it
    idle: float  # in OTHER: no operation ran
    busy: dict[str, float]  # component or OTHER -> time of its operations, threads added up


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


def component_times(path: str | Path, programs: Sequence[Module]) -> ComponentTimes:
    """Where the time of the calls of a trace went.

    Args:
        path: what `capture` returned.
        programs: those that ran, each of a name of its own; what others ran is OTHER.

    Raises:
        ValueError: two programs of one name; a trace without a call, or without an operation of these programs.
    """
    known = {program.name: program.instructions for program in programs}
    names = ", ".join(program.name for program in programs)
    if len(known) < len(programs):
        raise ValueError(f"programs {names}: two of one name cannot be told apart in a trace; trace them singly")
    calls, threads = _read(path, known)
    if not calls or all(event.instruction is _UNKNOWN for thread in threads for event in thread):
        raise ValueError(
            f"{path}: {len(calls)} calls and no operation of {names}; give the programs that `capture` traced"
        )
    stretches = [stretch for thread in threads for stretch in innermost(thread)]
    seconds, idle = _shared(stretches, calls)
    busy = dict.fromkeys((*COMPONENTS, OTHER), 0.0)
    for start, end, instruction in stretches:
        if not instruction.control:
            for name, share in instruction.shares:
                busy[name] += (end - start) * 1e-9 * share
    return ComponentTimes(len(calls), sum(end - start for start, end in calls) * 1e-9, seconds, idle, busy)


def innermost(events: Iterable[_Event]) -> Iterator[tuple[float, float, Instruction]]:
    """Disjoint stretches of one thread: start, end, and the innermost operation that runs in it."""
    stack: list[_Event] = []
    at = 0.0
    last = _Event(float("inf"), float("inf"), _UNKNOWN)
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
    path: str | Path, known: Mapping[str, Mapping[str, Instruction]]
) -> tuple[list[tuple[float, float]], list[list[_Event]]]:
    """Start and end of each call, and the operations of each thread."""
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
                    instructions = known.get(str(about.get("hlo_module")), {})
                    instruction = instructions.get(str(about["hlo_op"]), _UNKNOWN)
                    thread.append(_Event(event.start_ns, event.end_ns, instruction))
            threads.append(thread)
    return calls, threads


def _shared(
    stretches: Iterable[tuple[float, float, Instruction]], calls: Iterable[tuple[float, float]]
) -> tuple[dict[str, float], float]:
    """Wall time of the calls by component, and how much of it nothing ran, in seconds."""
    points: list[tuple[float, int, Instruction | None]] = []  # None: a call
    for start, end, what in (*stretches, *((start, end, None) for start, end in calls)):
        points += [(start, 1, what), (end, -1, what)]
    seconds = dict.fromkeys((*COMPONENTS, OTHER), 0.0)
    work: Counter[Instruction] = Counter()
    control: Counter[Instruction] = Counter()
    inside, before, idle = 0, 0.0, 0.0
    for time, change, what in sorted(points, key=lambda point: point[0]):
        if inside and time > before:
            running = +work or +control
            for instruction, number in running.items():
                for name, share in instruction.shares:
                    seconds[name] += (time - before) * 1e-9 * share * number / running.total()
            if not running:
                idle += (time - before) * 1e-9
        before = time
        if what is None:
            inside += change
        else:
            (control if what.control else work)[what] += change
    seconds[OTHER] += idle
    return seconds, idle

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

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.profiler import ProfileData, ProfileOptions, StepTraceAnnotation

from profiling.costs import COMPONENTS
from profiling.programs import Instruction, Module
from profiling.scopes import OTHER
from varjax.errors import InputError

T = TypeVar("T")
_CALL = "call"  # the annotation around each call
_NAMES = (*COMPONENTS, OTHER)
_UNKNOWN = Instruction(((OTHER, 1.0),), control=False)


@dataclass(frozen=True)
class ComponentTimes:
    """Seconds of each call of a trace, float64 [calls] each."""

    wall: np.ndarray  # from the call to the end of its last operation
    seconds: dict[str, np.ndarray]  # component or OTHER -> its share of `wall`; they sum to it
    idle: np.ndarray  # in OTHER: no operation ran
    busy: dict[str, float]  # component or OTHER -> time of its operations, all calls and threads added up
    # Component or OTHER -> events per call recorded in its time: those inside a loop in the loop's, others in OTHER.
    recorded: dict[str, float]


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
        InputError: two programs of one name; a trace without a call, or without an operation of these programs.
    """
    known = {program.name: program.instructions for program in programs}
    names = ", ".join(program.name for program in programs)
    if len(known) < len(programs):
        raise InputError(f"programs {names}: two of one name cannot be told apart in a trace; trace them singly")
    calls, threads = _read(path, known)
    if not calls or all(event.instruction is _UNKNOWN for thread in threads for event in thread):
        raise InputError(
            f"{path}: {len(calls)} calls and no operation of {names}; give the programs that `capture` traced"
        )
    stretches = [stretch for thread in threads for stretch in innermost(thread)]
    busy, recorded = dict.fromkeys(_NAMES, 0.0), dict.fromkeys(_NAMES, 0.0)
    for start, end, instruction in stretches:
        if not instruction.control:
            for name, share in instruction.shares:
                busy[name] += (end - start) * 1e-9 * share
    for thread in threads:
        for around in enclosing(thread):
            for name, share in (around or _UNKNOWN).shares:
                recorded[name] += share / len(calls)
    seconds, idle = _shared(stretches, calls)
    wall = np.array([end - start for start, end in calls]) * 1e-9
    return ComponentTimes(wall, seconds, idle, busy, recorded)


def in_turns(
    calls: Callable[[], Iterable[Callable[[], Any]]],
    folder: str | Path,
    name: str,
    turns: int,
    read: Callable[[Path], T],
) -> tuple[np.ndarray, list[T]]:
    """Calls without a trace and with one, in turns: what else the machine does meanwhile falls on both.

    Args:
        calls: gives the same calls each time, compiled and run before.
        folder, name: of the traces, as in `capture`; the last one stays.
        read: takes what is wanted from a trace.

    Returns:
        Wall times without a trace, float64 [turns, calls], and what was read of each turn's trace.
    """
    untraced, traced = [], []
    for _ in range(turns):
        untraced.append(wall_times(calls()))
        traced.append(read(capture(calls(), folder, name)))
    return np.stack(untraced), traced


def cost_of_recording(calls: Callable[[], Iterable[Callable[[], Any]]], turns: int) -> float:
    """Seconds that the profiler takes to record one operation: by how much a trace slows calls down, over operations.

    An event is written before its operation begins and after it has ended, so what this costs lies between operations.

    Args:
        calls: as in `in_turns`; the shorter their operations, the better.
    """
    with tempfile.TemporaryDirectory() as folder:
        untraced, read = in_turns(calls, folder, "recording", turns, lambda path: _read(path, {}))
    traced = np.array([[end - start for start, end in spans] for spans, _ in read]) * 1e-9
    operations = sum(len(thread) for _, threads in read for thread in threads) / traced.size
    slower = undisturbed(traced) - undisturbed(untraced)
    return max(float(slower.mean()) / operations, 0.0)


def undisturbed(times: np.ndarray) -> np.ndarray:
    """Of times [turns, ...] the lower quartile: what other work on the machine adds is in the slower ones."""
    return np.sort(times, axis=0)[quartile(len(times))]


def quartile(turns: int) -> int:
    """The place of the lower quartile among so many sorted times."""
    return (turns - 1) // 4


def wall_times(calls: Iterable[Callable[[], Any]]) -> np.ndarray:
    """float64 [calls]: seconds of calls as `capture` makes them, without a trace."""
    found = []
    for call in calls:
        start = time.perf_counter()
        jax.block_until_ready(call())
        found.append(time.perf_counter() - start)
    return np.array(found)


def innermost(events: Iterable[_Event]) -> Iterator[tuple[float, float, Instruction]]:
    """Disjoint stretches of one thread: start, end, and the innermost operation that runs in it."""
    stack: list[_Event] = []
    at = 0.0
    last = _Event(float("inf"), float("inf"), _UNKNOWN)
    for event in [*sorted(events, key=_outer_first), last]:
        while stack and stack[-1].end <= event.start:
            over = stack.pop()
            if over.end > at:
                yield at, over.end, over.instruction
                at = over.end
        if stack and event.start > at:
            yield at, event.start, stack[-1].instruction
        at = max(at, event.start)
        stack.append(event)


def enclosing(events: Iterable[_Event]) -> Iterator[Instruction | None]:
    """Of each event of a thread, by its start, the operation that it lies in; None if in none."""
    stack: list[_Event] = []
    for event in sorted(events, key=_outer_first):
        while stack and stack[-1].end <= event.start:
            stack.pop()
        yield stack[-1].instruction if stack else None
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
    return sorted(calls), threads


def _shared(
    stretches: Iterable[tuple[float, float, Instruction]], calls: Sequence[tuple[float, float]]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Wall time of each call by component, and how much of it nothing ran, in seconds."""
    points: list[tuple[float, int, Instruction | int]] = []  # an int: a call
    for start, end, instruction in stretches:
        points += [(start, 1, instruction), (end, -1, instruction)]
    for index, (start, end) in enumerate(calls):
        points += [(start, 1, index), (end, -1, index)]
    seconds = {name: np.zeros(len(calls)) for name in _NAMES}
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


def _outer_first(event: _Event) -> tuple[float, float]:
    return event.start, -event.end

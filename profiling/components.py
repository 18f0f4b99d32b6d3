"""Where the time of a call goes, component by component, by profiler trace.

    (found,) = measure_sides(plain_model, {"decode": ids}, folder="traces")
    found.by_trace["experts"], found.explained

Calls are timed with a trace and without, in turns. A trace slows a call down: recording an operation takes a third of a
microsecond or more, and a decoding step has hundreds. This cost is measured on the plain model's decoding and
subtracted where it falls: from the time between operations, or inside a loop from the time of the loop. The sum over
components can then be compared with the untraced call.

A profiler's events name instructions of the optimized program, whose text keeps for most of them the `jax.named_scope`
that they were written under. The innermost scope that is one of `profiling.costs.COMPONENTS` is their component.

* A fusion is shared among the components that it fuses: all of it goes to a matrix product in it, otherwise each has
  the share of its elements. That is an estimate, because the parts of a fused loop cannot be timed.
* An instruction that XLA created without a scope belongs to the component that alone reads an argument which it reads
  (a rewritten matrix product and its weights), otherwise to the nearest user with a scope, otherwise to the nearest
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
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal
from jax.profiler import ProfileData, ProfileOptions, StepTraceAnnotation
from jax.stages import Traced
from matplotlib.figure import Figure

from analysis.report.figures import panels, shade
from analysis.report.report import Column, ReportFigure, Section, Table
from profiling.calls import Calls, at_once, prepare, sides
from profiling.costs import COMPONENTS
from varjax.errors import InputError
from varjax.model import VARModel

OTHER = "other"  # work without a component, and time in which nothing runs
TURN = 0.04  # seconds of calls in a turn
TURNS = 9
_WITHIN = 0.1  # of the untraced call, to which the components must sum
_HATCHES = ("", "///", "...", "\\\\\\", "xxx")

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
class _Instruction:
    """One operation of a compiled program."""

    shares: tuple[tuple[str, float], ...]  # components or OTHER with their shares, which sum to 1
    control: bool  # a loop, a conditional or a call, which spans other operations


@dataclass(frozen=True)
class _Module:
    """A compiled program."""

    name: str
    instructions: Mapping[str, _Instruction]


@dataclass(frozen=True)
class _ComponentTimes:
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
    instruction: _Instruction


_UNKNOWN = _Instruction(((OTHER, 1.0),), control=False)


@dataclass(frozen=True)
class Breakdown:
    """Seconds per call: at each call of a turn the lower quartile over turns, and their mean over the turn."""

    side: str  # "plain" or "VAR"
    phase: str  # "prefill" or "decode"
    batch: int  # B
    length: int  # T of a call
    total: float  # untraced
    traced: float  # of the call while it is traced
    recording: float  # what the trace is estimated to have added
    by_trace: dict[str, float]  # of COMPONENTS and OTHER, less `recording`
    idle: float  # the part of OTHER, less its part of `recording`, in which no operation ran

    @property
    def explained(self) -> float:
        """Sum of the components, OTHER included, over the untraced call."""
        return sum(self.by_trace.values()) / self.total

    @property
    def attributed(self) -> float:
        """Sum of the components without OTHER, over the untraced call."""
        return self.explained - self.by_trace[OTHER] / self.total

    @property
    def name(self) -> str:
        """Phase, side and batch in words."""
        return f"{self.phase} {self.side} at batch {self.batch}"


def measure_sides(
    var_model: VARModel,
    texts: Mapping[str, np.ndarray],
    *,
    folder: str | Path,
    turns: int = TURNS,
    max_calls: int = 16,
    recording: float | None = None,
) -> list[Breakdown]:
    """Measure the components of the calls of the plain model and, unless VAR is switched off, of `var_model`.

    Args:
        var_model: the model, VAR on or off.
        texts: phase -> int32 [B, T]; see `profiling.calls` for the calls that read them.
        folder: the log directory of TensorBoard, to which a trace per phase and side is added.
        turns: with a trace, and as many without.
        max_calls: decoding steps of a round; a turn repeats the round to fill `TURN` seconds.
        recording: seconds that recording an operation costs; None: it is measured.

    Returns:
        Per phase, the plain side and then VAR.

    Raises:
        InputError: an unknown phase, or texts too short.
    """
    kinds = [(side, phase, ids) for phase, ids in texts.items() for side in sides(var_model).items()]
    at_once(partial(_compile, var_model, ids, phase) for (_, var_model), phase, ids in kinds)
    if recording is None:
        phase = "decode" if "decode" in texts else next(iter(texts))
        recording = _cost_of_recording(prepare(var_model.disabled(), texts[phase], phase, max_calls), turns)
    found = []
    for (side, one), phase, ids in kinds:
        calls = prepare(one, ids, phase, max_calls)
        untraced, read = _in_turns(calls, folder, f"{phase}-{side}-batch-{len(ids)}", turns)
        # At each call of a turn, the turn counts whose wall time is the lower quartile.
        chosen = np.argsort(np.stack([times.wall for times in read]), axis=0)[_quartile(turns)]

        def mean(values: Sequence[np.ndarray], chosen: np.ndarray = chosen) -> float:
            return float(np.take_along_axis(np.stack(values), chosen[None], axis=0).mean())

        off = {part: recording * events for part, events in read[-1].recorded.items()}  # the same in all turns
        found.append(
            Breakdown(
                side=side,
                phase=phase,
                batch=len(ids),
                length=calls.inputs[0].shape[1],
                total=float(_undisturbed(untraced).mean()),
                traced=mean([times.wall for times in read]),
                recording=sum(off.values()),
                by_trace={part: mean([times.seconds[part] for times in read]) - off[part] for part in off},
                idle=mean([times.idle for times in read]) - off[OTHER],
            )
        )
    return found


def section(found: Sequence[Breakdown]) -> Section:
    """Report the components; the criterion is that they sum to the untraced call in every phase and side.

    Args:
        found: from `measure_sides`.

    Returns:
        The section with its tables and figure.
    """
    off = max(found, key=lambda one: abs(one.explained - 1))
    slower, subtracted = ([one.traced / one.total - 1 for one in found], [one.recording / one.total for one in found])
    columns = (
        *(Column("phase"), Column("side"), Column("batch"), Column("tokens"), Column("untraced", ".3f")),
        *(Column("traced", ".3f"), Column("recording", ".3f"), Column("sum by trace", ".3f")),
        *(Column("explained", ".1%"), Column("with a name", ".1%")),
    )
    rows = tuple(
        (
            *(one.phase, one.side, one.batch, one.batch * one.length),
            *(1e3 * seconds for seconds in (one.total, one.traced, one.recording, one.explained * one.total)),
            *(one.explained, one.attributed),
        )
        for one in found
    )
    parts = (Column("component"), Column("by trace [ms]", ".3f"), Column("share", ".1%"))
    return Section(
        "components",
        "Where the time of a call goes",
        "PASS" if abs(off.explained - 1) <= _WITHIN else "FAIL",
        f"components by trace sum to the untraced call within {_WITHIN:.0%}: the largest difference is {off.name}, "
        f"{off.explained:.1%}",
        (
            f"The trace slowed the calls down by {min(slower):.1%} to {max(slower):.1%}; {min(subtracted):.1%} to "
            f"{max(subtracted):.1%} of a call was subtracted as the cost of recording, which is measured on plain "
            f"decoding. `{OTHER}` is time in which no operation runs, and work without a name.",
        ),
        (
            Table("Milliseconds of a call", columns, rows),
            *(
                Table(
                    one.name,
                    parts,
                    tuple((part, 1e3 * took, took / one.total) for part, took in one.by_trace.items() if took),
                )
                for one in found
            ),
        ),
        (
            ReportFigure(
                "components",
                "Where the time of a call goes",
                "Each bar shows the components of one call, as measured by a profiler trace, from the bottom in the "
                "order of the legend. The dash across a bar is the time of the untraced call: the nearer it is to the "
                "top of the bar, the better the components explain the call.",
                "The time of a fused operation is divided among its components by the number of elements, which is an "
                "estimate. `other` is mostly time in which nothing runs; in short calls, it is spent on the host.",
                partial(_figure, found),
            ),
        ),
    )


def _figure(found: Sequence[Breakdown]) -> Figure:
    phases = list(dict.fromkeys((one.phase, one.batch) for one in found))
    parts = [part for part in (*COMPONENTS, OTHER) if any(one.by_trace[part] > 0 for one in found)]
    drawn, axes = panels(len(phases))
    for axis, phase in zip(axes, phases, strict=True):
        here = [one for one in found if (one.phase, one.batch) == phase]
        places, height = np.arange(len(here)), np.zeros(len(here))
        for index, part in enumerate(parts):
            values = np.array([1e3 * max(one.by_trace[part], 0.0) for one in here])
            look = {"color": shade(index, len(parts)), "edgecolor": "1", "linewidth": 0.3}
            axis.bar(places, values, 0.6, height, hatch=_HATCHES[index % len(_HATCHES)], label=part, **look)
            height += values
        totals = [1e3 * one.total for one in here]
        axis.hlines(totals, places - 0.4, places + 0.4, color="0", linestyles="--", linewidth=1.2)
        axis.set(title=f"{phase[0]}, batch {phase[1]}", xticks=places, xticklabels=[one.side for one in here])
    axes[0].set(ylabel="ms per call")
    handles, labels = axes[-1].get_legend_handles_labels()
    axes[-1].legend(handles[::-1], labels[::-1], fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    drawn.tight_layout()
    return drawn


def _compile(var_model: VARModel, ids: np.ndarray, phase: str) -> None:
    """Compile the step of these calls, which is then found in the cache."""
    prepare(var_model, ids, phase, max_calls=1).traced().lower().compile()


def _in_turns(calls: Calls, folder: str | Path, name: str, turns: int) -> tuple[np.ndarray, list[_ComponentTimes]]:
    """Seconds of calls without a trace, float64 [turns, calls], and the components in the trace of each turn."""
    program = _describe(calls.traced())
    _wall_times(calls.each())  # compiles
    rounds = max(round(TURN / _wall_times(calls.each()).sum()), 1)
    untraced, traced = [], []
    for _ in range(turns):
        untraced.append(_wall_times(calls.each(rounds)))
        traced.append(_component_times(_capture(calls.each(rounds), folder, name), program))  # the last trace stays
    return np.stack(untraced), traced


def _cost_of_recording(calls: Calls, turns: int) -> float:
    """Seconds that recording one operation takes: by how much a trace slows calls down, over their operations."""
    with tempfile.TemporaryDirectory() as folder:
        untraced, traced = _in_turns(calls, folder, "recording", turns)
    slower = _undisturbed(np.stack([times.wall for times in traced])) - _undisturbed(untraced)
    operations = np.mean([sum(times.recorded.values()) for times in traced])
    return max(float(slower.mean() / operations), 0.0)


def _undisturbed(times: np.ndarray) -> np.ndarray:
    """The lower quartile of times [turns, ...]: other work on the machine falls on the slower turns."""
    return np.sort(times, axis=0)[_quartile(len(times))]


def _quartile(turns: int) -> int:
    return (turns - 1) // 4


def _component(scope: str) -> str:
    """The innermost component in a scope."""
    for part in reversed(scope.split("/")):
        if part.startswith(("jit(", "pjit(")):
            continue  # the name of a function
        bare = part.rstrip(")").rpartition("(")[2]  # transformations wrap a scope: vmap(scores)
        if bare in COMPONENTS:
            return bare
    return OTHER


def _describe(traced: Traced) -> _Module:
    """Compile a traced function and find the component of each of its instructions."""
    return _parsed(traced.lower().compile().as_text() or "", _owners(traced.jaxpr))


def _owners(jaxpr: ClosedJaxpr) -> list[str]:
    """The component that alone reads each argument of a program; OTHER where there is not exactly one."""
    readers: list[set[str]] = [set() for _ in jaxpr.jaxpr.invars]
    _note_readers(jaxpr, readers, "")
    return [next(iter(one)) if len(one) == 1 else OTHER for one in readers]


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


def _parsed(text: str, owners: Sequence[str] = ()) -> _Module:
    """The component of each instruction in the text of an optimized HLO module; `owners` of its arguments if known."""
    lines: dict[str, _Line] = {}  # names are unique in a module
    users: dict[str, list[str]] = defaultdict(list)
    bodies: dict[str, list[str]] = defaultdict(list)  # computation -> its instructions
    arguments: dict[str, int] = {}  # of the program, by number
    results = {}  # the root of a computation -> the computation
    computation, entry = "", False
    for row in text.splitlines():
        if found := _LINE.match(row):
            root, name, rest = found.groups()
            lines[name] = _line(rest)
            bodies[computation].append(name)
            for operand in lines[name].operands:
                users[operand].append(name)
            if entry and (number := _PARAMETER.search(rest)):
                arguments[name] = int(number[1])
            if root:
                results[name] = computation
        elif opening := _COMPUTATION.match(row):
            entry, computation = bool(opening[1]), opening[2]
    if owners and len(owners) != len(arguments):
        raise InputError(
            f"the program has {len(arguments)} arguments of {len(owners)}: unused ones were left out and the others "
            "cannot be told apart; jit it with keep_unused=True"
        )
    owned = {name: owners[number] for name, number in arguments.items() if owners and owners[number] != OTHER}
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
        owner = line.component or next((owned[one] for one in line.operands if one in owned), None)
        owner = owner or nearest(name, users) or nearest(name, operands) or OTHER
        shares = fused(name) or ((owner, 1.0),)
        instructions[name] = _Instruction(shares, line.opcode in _CONTROL)
    return _Module(text.removeprefix("HloModule ").split(",", 1)[0], instructions)


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


def _capture(calls: Iterable[Callable[[], Any]], folder: str | Path, name: str) -> Path:
    """Trace calls that were run before, each until its result is ready, into `folder/plugins/profile/name/`.

    What the iterator does between the calls is in none of them. An earlier trace of this name is replaced.
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


def _wall_times(calls: Iterable[Callable[[], Any]]) -> np.ndarray:
    """Seconds of calls as `_capture` makes them, without a trace; float64 [calls]."""
    found = []
    for call in calls:
        start = time.perf_counter()
        jax.block_until_ready(call())
        found.append(time.perf_counter() - start)
    return np.array(found)


def _component_times(path: str | Path, program: _Module) -> _ComponentTimes:
    """Divide the time of the calls of a trace among the components; operations of other programs are OTHER."""
    calls, threads = _read(path, program)
    if not calls or all(event.instruction is _UNKNOWN for thread in threads for event in thread):
        raise InputError(
            f"{path}: {len(calls)} calls and no operation of {program.name}; give the program that was traced"
        )
    stretches, recorded = [], dict.fromkeys((*COMPONENTS, OTHER), 0.0)
    for thread in threads:
        innermost, around = _nested(thread)
        stretches += innermost
        for instruction in around:
            for name, share in instruction.shares:
                recorded[name] += share / len(calls)
    seconds, idle = _shared(stretches, calls)
    return _ComponentTimes(np.array([end - start for start, end in calls]) * 1e-9, seconds, idle, recorded)


def _read(path: str | Path, program: _Module) -> tuple[list[tuple[float, float]], list[list[_Event]]]:
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


def _nested(events: Iterable[_Event]) -> tuple[list[_Event], list[_Instruction]]:
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
    points: list[tuple[float, int, _Instruction | int]] = []  # an int is the index of a call
    spans: list[Any] = [*stretches, *((*call, index) for index, call in enumerate(calls))]
    for start, end, what in spans:
        points += [(start, 1, what), (end, -1, what)]
    seconds = {name: np.zeros(len(calls)) for name in (*COMPONENTS, OTHER)}
    idle = np.zeros(len(calls))
    work: Counter[_Instruction] = Counter()
    control: Counter[_Instruction] = Counter()
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

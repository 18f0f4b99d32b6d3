"""Where the time of a call goes, component by component, by profiler trace.

    (found,) = measure_sides(plain_model, {"decode": ids}, folder="traces")
    found.by_trace["experts"], found.explained

Calls are timed with a trace and without, in turns. A trace slows a call down: recording an operation takes a third of a
microsecond or more, and a decoding step has hundreds. This cost is measured on the plain model's decoding and
subtracted where it falls: from the time between operations, or inside a loop from the time of the loop. The sum over
components can then be compared with the untraced call.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from matplotlib.figure import Figure

from analysis.report.figures import panels, shade
from analysis.report.report import Column, ReportFigure, Section, Table
from profiling.calls import Calls, at_once, prepare, sides
from profiling.costs import COMPONENTS
from profiling.traces import OTHER, capture, component_times, describe, operations, wall_times
from varjax.model import VARModel

T = TypeVar("T")

NAME = "components"
WITHIN = 0.1  # of the untraced call, to which the components must sum
TURN = 0.04  # seconds of calls in a turn
TURNS = 9
_HATCHES = ("", "///", "...", "\\\\\\", "xxx")


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
        program = describe(calls.traced())
        name = f"{phase}-{side}-batch-{len(ids)}"
        untraced, read = _in_turns(calls, folder, name, turns, partial(component_times, program=program))
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
        NAME,
        "Where the time of a call goes",
        "PASS" if abs(off.explained - 1) <= WITHIN else "FAIL",
        f"components by trace sum to the untraced call within {WITHIN:.0%}: the largest difference is {off.name}, "
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
                NAME,
                "Where the time of a call goes",
                "Each bar is one side: the components of a call by trace, from the bottom in the order of the legend. "
                "The dash across a bar is the untraced call: the nearer to the bar's end, the better it is explained.",
                "A fused operation is shared among its components by the number of elements, which is an estimate. "
                "`other` is mostly time in which nothing runs: for short calls, that of the host.",
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


def _in_turns(
    calls: Calls, folder: str | Path, name: str, turns: int, read: Callable[[Path], T]
) -> tuple[np.ndarray, list[T]]:
    """Seconds of calls without a trace, float64 [turns, calls], and what is read from the trace of each turn."""
    wall_times(calls.each())  # compiles
    rounds = max(round(TURN / wall_times(calls.each()).sum()), 1)
    untraced, traced = [], []
    for _ in range(turns):
        untraced.append(wall_times(calls.each(rounds)))
        traced.append(read(capture(calls.each(rounds), folder, name)))  # the last trace stays
    return np.stack(untraced), traced


def _cost_of_recording(calls: Calls, turns: int) -> float:
    """Seconds that recording one operation takes: by how much a trace slows calls down, over their operations."""
    with tempfile.TemporaryDirectory() as folder:
        untraced, read = _in_turns(calls, folder, "recording", turns, operations)
    traced = np.stack([wall for wall, _ in read])
    slower = _undisturbed(traced) - _undisturbed(untraced)
    return max(float(slower.mean()) / float(np.mean([number for _, number in read])), 0.0)


def _undisturbed(times: np.ndarray) -> np.ndarray:
    """The lower quartile of times [turns, ...]: other work on the machine falls on the slower turns."""
    return np.sort(times, axis=0)[_quartile(len(times))]


def _quartile(turns: int) -> int:
    return (turns - 1) // 4

"""What a report says of the components of a call: tables, figure and how to read them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from matplotlib.figure import Figure

from analysis.report.figures import panels, shade
from analysis.report.report import Column, ReportFigure, Section, Table
from profiling.components import AGREE, SMALL, Breakdown
from profiling.costs import COMPONENTS
from profiling.scopes import OTHER

NAME = "components"
WITHIN = 0.1  # of the untraced call, where the components by trace must sum to
NOTE = ReportFigure(
    NAME,
    "Where the time of a call goes",
    "One bar per side: the components of a call by trace, from the bottom in the order of the legend, in milliseconds. "
    "Each has a gray and a hatch of its own. The dash across a bar is the call without a trace: the nearer to the "
    "bar's end, the better its time is explained.",
    "A fused operation is shared among the components of what it fuses by the number of elements, which is an "
    "estimate. `other` is the time in which nothing runs: for short calls mostly the host's.",
)
_HATCHES = ("", "///", "...", "\\\\\\", "xxx")


def section(found: Sequence[Breakdown]) -> Section:
    """The criterion: components by trace sum to the untraced call within WITHIN, in every phase and side."""
    off = max(found, key=lambda one: abs(one.explained - 1))
    differing = [
        f"{_name(one)} {part} ({1e3 * one.by_trace[part]:.3g} against {1e3 * one.by_ablation[part]:.3g} ms)"
        for one in found
        for part in one.disagreements()
    ]
    compared = sum(len(one.by_ablation) for one in found)
    agreement = "Nothing was left out, so there is no second measurement."
    if compared:
        agreement = (
            f"By leaving each component out, {compared - len(differing)} of {compared} measurements are confirmed: "
            f"within a factor {AGREE}, or within {SMALL:.0%} of the call."
        )
        if differing:
            agreement += f" Trace against ablation differ in: {'; '.join(differing)}. Take neither number for certain."
    return Section(
        NAME,
        "Where the time of a call goes",
        "PASS" if abs(off.explained - 1) <= WITHIN else "FAIL",
        f"components by trace sum to the untraced call within {WITHIN:.0%}: farthest off is {_name(off)}, "
        f"{off.explained:.1%}",
        (
            agreement,
            f"The trace slowed the calls down by {_span([one.traced / one.total - 1 for one in found])}; "
            f"{_span([one.recording / one.total for one in found])} of a call, by what plain decoding says, was taken "
            f"off as the cost of recording. `{OTHER}` is time in which no operation runs, and work without a name.",
        ),
        (
            Table("Milliseconds of a call", _CALL_COLUMNS, tuple(_call_row(one) for one in found)),
            *(Table(_name(one), _COLUMNS, tuple(_rows(one))) for one in found),
        ),
        (NOTE,),
    )


def figure(found: Sequence[Breakdown]) -> Figure:
    phases = list(dict.fromkeys((one.phase, one.batch) for one in found))
    parts = [part for part in (*COMPONENTS, OTHER) if any(one.by_trace[part] > 0 for one in found)]
    drawn, axes = panels(len(phases))
    for axis, phase in zip(axes, phases, strict=True):
        here = [one for one in found if (one.phase, one.batch) == phase]
        places = range(len(here))
        height = [0.0 for _ in here]
        for index, part in enumerate(parts):
            values = [1e3 * max(one.by_trace[part], 0.0) for one in here]
            look = {"color": shade(index, len(parts)), "edgecolor": "1", "linewidth": 0.3}
            axis.bar(places, values, 0.6, height, hatch=_HATCHES[index % len(_HATCHES)], label=part, **look)
            height = [low + value for low, value in zip(height, values, strict=True)]
        axis.hlines(
            [1e3 * one.total for one in here],
            [place - 0.4 for place in places],
            [place + 0.4 for place in places],
            color="0",
            linestyles="--",
            linewidth=1.2,
        )
        axis.set(title=f"{phase[0]}, batch {phase[1]}", xticks=places, xticklabels=[one.side for one in here])
    axes[0].set(ylabel="ms per call")
    handles, labels = axes[-1].get_legend_handles_labels()
    axes[-1].legend(handles[::-1], labels[::-1], fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    drawn.tight_layout()
    return drawn


_CALL_COLUMNS = (
    *(Column("phase"), Column("side"), Column("batch"), Column("tokens"), Column("untraced", ".3f")),
    *(Column("traced", ".3f"), Column("recording", ".3f"), Column("sum by trace", ".3f"), Column("explained", ".1%")),
    *(Column("with a name", ".1%"), Column("saved by ablation", ".1%")),
)
_COLUMNS = (
    *(Column("component"), Column("by trace [ms]", ".3f"), Column("share", ".1%")),
    *(Column("by ablation [ms]", ".3f"), Column("share of its whole", ".1%"), Column("agree")),
)


def _call_row(one: Breakdown) -> tuple[str | float | None, ...]:
    seconds = (one.total, one.traced, one.recording, one.explained * one.total)
    shares = (one.explained, one.attributed, one.saved)
    return (one.phase, one.side, one.batch, one.batch * one.length, *(1e3 * value for value in seconds), *shares)


def _rows(one: Breakdown) -> Iterator[tuple[str | float | bool | None, ...]]:
    differing = one.disagreements()
    for part, traced in one.by_trace.items():
        ablated = one.by_ablation.get(part)
        shares = (1e3 * traced, traced / one.total)
        if ablated is not None and one.whole:
            yield part, *shares, 1e3 * ablated, ablated / one.whole, part not in differing
        elif traced:
            yield part, *shares, None, None, None


def _name(one: Breakdown) -> str:
    return f"{one.phase} {one.side} at batch {one.batch}"


def _span(values: Sequence[float]) -> str:
    return f"{min(values):.1%} to {max(values):.1%}"

"""What a study says of ceilings and of the performance model: tables, figures and how to read them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from analysis.report.figures import MARKERS, panels
from analysis.report.report import Column, ReportFigure, Section, Table
from profiling.break_even import break_even, speedup
from profiling.costs import component_costs
from profiling.hardware import HARDWARE
from profiling.performance_model import TARGET, Errors, Study, seconds_by_part
from profiling.workload import Mix, Workload

NAME, ROOFLINE = "performance_model", "roofline"
PUBLISHED = "h200"  # drawn beside what was measured
LEAST_GAIN = 1.05  # a speed-up under this counts as none
NOTES = (
    ReportFigure(
        NAME,
        "Predicted against measured time",
        "Each marker is one kind of call: hollow ones calibrated the model, filled ones it had not seen. The line is "
        f"equality, the dotted ones are {TARGET:.0%} off.",
        "Both axes are logarithmic: a fifth looks small. The points share one machine and one checkpoint, and were "
        "timed in the same rounds.",
    ),
    ReportFigure(
        ROOFLINE,
        "Components at their arithmetic intensity",
        "Each marker is a component of a plain call: its operations over the bytes that it must move, and the rate at "
        "which the performance model says that it runs. Black lines: measured ceilings of this machine, the product "
        "and the bandwidths of memory (solid) and cache (dashed). Gray: published bfloat16 ceilings of an accelerator.",
        "Rates are the model's, not timed one by one. A component under its roof is not at fault where its shapes are "
        "small; bytes are counted once, whichever cache they come from. Components without products stand at the few "
        "operations that are counted for them.",
    ),
)


def section(found: Study, experts: float = 1.0, batches: Sequence[int] = (1, 2, 4, 8, 16, 32)) -> Section:
    """The criterion is the median error on unseen points.

    Args:
        experts: per token and layer under VAR, for the predicted speed-up.
        batches: of the break-even table.
    """
    unseen = found.unseen
    rows = _gains(found, experts, batches)
    model = dataclasses.asdict(found.model)
    return Section(
        NAME,
        "Ceilings and performance model",
        "PASS" if unseen.passed else "FAIL",
        f"median error on unseen points < {TARGET:.0%}: {unseen.median:.1%} [{unseen.low:.1%}, {unseen.high:.1%}] over "
        f"{len(unseen.each)} points",
        (
            f"{len(model)} numbers, fitted to {len(found.calibrated.each)} points (their own median error: "
            f"{found.calibrated.median:.1%}). Both sets were timed in the same rounds, in an order drawn anew.",
            f"Worst: {unseen.worst.point.name}, {unseen.worst.relative:+.1%}.",
            _vanishing(rows, experts),
            "Break-even is where VAR takes as long as the plain call: fewer experts than that are a gain. Predicted, "
            "for tokens that draw their experts evenly and independently.",
        ),
        (
            Table("Ceilings, measured", _CEILINGS, tuple(dataclasses.astuple(one) for one in found.ceilings.figures)),
            Table("The model's numbers", (Column("name"), Column("value", ".4g")), tuple(model.items())),
            Table("Break-even in experts per token and layer", _gain_columns(experts), tuple(rows)),
            Table("Unseen points", _POINTS, _points(unseen)),
            Table("Points that calibrated", _POINTS, _points(found.calibrated)),
        ),
        NOTES,
    )


def figure(found: Study) -> Figure:
    """Predicted against measured time."""
    drawn, (axis,) = panels(1, width=5.2, height=4.2)
    for name, errors, filled in (("calibrated", found.calibrated, False), ("unseen", found.unseen, True)):
        for phase, marker in (("prefill", "o"), ("decode", "s")):
            here = [one for one in errors.each if (one.point.workload.length == 1) == (phase == "decode")]
            measured = [one.point.seconds for one in here]
            bars = [
                [one.point.seconds - one.point.low for one in here],
                [one.point.high - one.point.seconds for one in here],
            ]
            axis.errorbar(
                measured,
                [one.predicted for one in here],
                xerr=bars,
                linestyle="",
                marker=marker,
                color="0.2",
                markerfacecolor="0.2" if filled else "1",
                markersize=5,
                elinewidth=0.6,
                label=f"{phase}, {name}",
            )
    every = [one.point.seconds for errors in (found.calibrated, found.unseen) for one in errors.each]
    ends = np.array([min(every) / 1.5, max(every) * 1.5])
    axis.plot(ends, ends, color="0.5", linewidth=0.8)
    for factor in (1 - TARGET, 1 + TARGET):
        axis.plot(ends, factor * ends, color="0.5", linewidth=0.8, linestyle=":")
    axis.set(xscale="log", yscale="log", xlabel="measured [s]", ylabel="predicted [s]")
    axis.legend(fontsize="small")
    drawn.tight_layout()
    return drawn


def roofline(found: Study) -> Figure:
    """Components of a step of decoding and of a prefill under the ceilings."""
    drawn, axes = panels(2, width=4.6, sharey=True)
    published = HARDWARE[PUBLISHED]
    intensity = np.logspace(-2, 4, 200)
    for axis, (title, workload) in zip(axes, _calls(found), strict=True):
        mix = Mix.plain(found.config, workload.tokens)
        costs = component_costs(found.config, workload, mix)
        seconds = seconds_by_part(found.model, found.config, workload, mix)
        for bandwidth, line in ((found.ceilings.memory, "-"), (found.ceilings.cache, "--")):
            axis.plot(intensity, np.minimum(found.ceilings.product, intensity * bandwidth), line, color="0", lw=1)
        axis.plot(intensity, np.minimum(published.flops, intensity * published.bandwidth), color="0.7", lw=1)
        shown = [name for name, cost in costs.items() if cost.flops and cost.bytes and seconds[name]]
        for index, name in enumerate(shown):
            cost = costs[name]
            axis.plot(
                cost.flops / cost.bytes,
                cost.flops / seconds[name],
                linestyle="",
                marker=MARKERS[index % len(MARKERS)],
                color=str(0.15 + 0.5 * index / len(shown)),
                label=name,
            )
        axis.set(title=title, xscale="log", yscale="log")
    axes[0].set(ylabel="FLOP/s")
    axes[-1].legend(fontsize="x-small", loc="lower right")
    drawn.supxlabel("FLOPs per byte")
    drawn.tight_layout()
    return drawn


def _calls(found: Study) -> tuple[tuple[str, Workload], ...]:
    decode = Workload(batch=1, length=1, cached=128, last_logits_only=True, itemsize=_itemsize(found))
    return (
        ("decode, batch 1", decode),
        ("prefill, 8 x 256", Workload(batch=8, length=256, itemsize=_itemsize(found))),
    )


def _itemsize(found: Study) -> int:
    """Bytes of a number of the model whose calls were measured."""
    return found.unseen.worst.point.workload.itemsize


def _gains(found: Study, experts: float, batches: Sequence[int]) -> list[tuple[str, int, float | None, float]]:
    """Phase, batch, break-even and predicted speed-up."""
    rows = []
    for phase in ("decode", "prefill"):
        for batch in batches:
            workload = Workload(batch, 1, cached=128, last_logits_only=True, itemsize=_itemsize(found))
            if phase == "prefill":
                workload = Workload(batch, 128, itemsize=_itemsize(found))
            at = break_even(found.model, found.config, workload)
            rows.append((phase, batch, at, speedup(found.model, found.config, workload, experts)))
    return rows


def _vanishing(rows: Sequence[tuple[str, int, float | None, float]], experts: float) -> str:
    none = [f"{phase} at batch {batch}" for phase, batch, _, gain in rows if gain < LEAST_GAIN]
    if not none:
        return f"At {experts:g} experts a gain of {LEAST_GAIN - 1:.0%} or more is predicted at every batch size here."
    return (
        f"At {experts:g} experts less than {LEAST_GAIN - 1:.0%} is predicted to be gained in " + ", ".join(none) + "."
    )


def _gain_columns(experts: float) -> tuple[Column, ...]:
    return (Column("phase"), Column("batch"), Column("break-even", ".2f"), Column(f"speed-up at {experts:g}", ".2f"))


_CEILINGS = (
    *(Column("kind"), Column("shape or size"), Column("dtype")),
    *(Column("median", ".4g"), Column("low", ".4g"), Column("high", ".4g")),
)
_POINTS = (
    *(Column("call"), Column("experts", ".2f"), Column("distinct", ".2f"), Column("measured [ms]", ".3f")),
    *(Column("low", ".3f"), Column("high", ".3f"), Column("predicted [ms]", ".3f"), Column("error", "+.1%")),
)


def _points(errors: Errors) -> tuple[tuple[str | float, ...], ...]:
    return tuple(
        (
            one.point.name,
            one.point.mix.experts,
            one.point.mix.distinct,
            *(1e3 * seconds for seconds in (one.point.seconds, one.point.low, one.point.high, one.predicted)),
            one.relative,
        )
        for one in errors.each
    )

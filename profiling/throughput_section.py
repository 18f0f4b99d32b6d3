"""What a study says of throughput: table, figure and how to read them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.figure import Figure

from analysis.criteria import EVALUATION_SPEEDUP
from analysis.report.figures import panels
from analysis.report.report import Column, ReportFigure, Section, Table
from profiling.throughput import Throughput

NAME = "throughput"
NOTE = ReportFigure(
    NAME,
    "Speed-up by batch size",
    "Dots: measured, median of paired rounds with 95 % intervals. Dashed: experts of the plain model over those that "
    "VAR runs, what arithmetic alone would give if the experts were all of the work. Dotted (decode): distinct experts "
    "that a step reads, plain over VAR; where reading weights is what takes time, no more than this can be gained.",
    "It is one machine, and the texts are given, not generated. A ratio of medians hides a slow start; tokens per "
    "second of two runs do not compare.",
)


def section(found: Sequence[Throughput]) -> Section:
    """The criterion is at batch 1 in decode, and at the largest batch in prefill."""
    alone = next(one for one in found if one.phase == "decode")
    many = [one for one in found if one.phase == "prefill"][-1]
    last = [one for one in found if one.phase == "decode"][-1]
    passed = min(alone.speedup.value, many.speedup.value) >= EVALUATION_SPEEDUP
    return Section(
        NAME,
        "Throughput by batch size",
        "PASS" if passed else "FAIL",
        f"speed-up >= {EVALUATION_SPEEDUP}x in decode at batch {alone.batch} and in prefill at batch {many.batch}: "
        f"{alone.speedup.value:.2f}x and {many.speedup.value:.2f}x",
        (
            "Paired and interleaved: each round times both sides once, in an order drawn anew; the ratio is taken "
            "inside the round.",
            f"Where the gain must vanish: at batch {last.batch} a step of decoding reads {last.distinct[0]:.1f} "
            f"distinct experts of a layer in the plain model and {last.distinct[1]:.1f} under VAR, at batch "
            f"{alone.batch} {alone.distinct[0]:.1f} and {alone.distinct[1]:.1f}. A machine whose time goes into "
            f"reading weights {_most(last.distinct)} on the experts' share at batch {last.batch}; one whose time goes "
            f"into arithmetic keeps its gain. This one measured {last.speedup.value:.2f}x there.",
        ),
        (Table("Tokens per second", _COLUMNS, tuple(_row(one) for one in found)),),
        (NOTE,),
    )


def figure(found: Sequence[Throughput]) -> Figure:
    drawn, axes = panels(2, sharey=True)
    for axis, phase in zip(axes, ("prefill", "decode"), strict=True):
        here = [one for one in found if one.phase == phase]
        batch = [one.batch for one in here]
        value = [one.speedup.value for one in here]
        bars = [
            [one.speedup.value - one.speedup.low for one in here],
            [one.speedup.high - one.speedup.value for one in here],
        ]
        axis.errorbar(batch, value, bars, color="0", marker="o", label="measured")
        axis.plot(batch, [_ratio(one.experts) for one in here], color="0.5", linestyle="--", label="experts run")
        if phase == "decode":
            axis.plot(batch, [_ratio(one.distinct) for one in here], color="0.5", linestyle=":", label="experts read")
        axis.axhline(1, color="0.8", linewidth=0.8)
        axis.set(title=phase, xscale="log", xticks=batch, xticklabels=batch)
        axis.minorticks_off()
    axes[0].set(ylabel="plain time / VAR time")
    axes[1].legend(fontsize="small")
    drawn.supxlabel("batch")
    drawn.tight_layout()
    return drawn


def _ratio(sides: Sequence[float]) -> float:
    """Plain over VAR; infinite where VAR runs nothing."""
    return sides[0] / sides[1] if sides[1] else math.inf


def _most(distinct: Sequence[float]) -> str:
    ratio = _ratio(distinct)
    return f"gains at most {ratio:.2f}x" if math.isfinite(ratio) else "has no bound (VAR reads no expert)"


_COLUMNS = (
    *(Column("phase"), Column("batch"), Column("plain", ",.0f"), Column("VAR", ",.0f")),
    *(Column("speed-up", ".2f"), Column("low", ".2f"), Column("high", ".2f"), Column("experts", ".2f")),
    *(Column("distinct, plain", ".2f"), Column("distinct, VAR", ".2f")),
)


def _row(one: Throughput) -> tuple[str | float, ...]:
    ratio = one.speedup
    return (one.phase, one.batch, one.plain, one.var, ratio.value, ratio.low, ratio.high, one.experts[1], *one.distinct)

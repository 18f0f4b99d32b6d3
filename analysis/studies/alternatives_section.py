"""What a study says of VAR and its alternatives: where VAR loses comes first. Table, figure and how to read them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from analysis.policies.scored_points import Measured
from analysis.report.figures import panels
from analysis.report.report import Column, ReportFigure, Section, Table
from analysis.resampling import Estimate
from analysis.studies.alternatives import Alternatives, Curve

NAME = "alternatives"
NOTE = ReportFigure(
    NAME,
    "VAR and its alternatives",
    "A panel for every alternative, VAR's curve in each: black dots, the ringed one is the policy that was given. "
    "White squares: the alternative, with 95 % intervals. Left is better, and so is low. On the dotted line, VAR's "
    "loss, the curve that crosses further to the left runs fewer experts. Between the thin horizontal lines the scale "
    "is linear, beyond them logarithmic; what changes by more than 100 % is not shown.",
    "Lines between points are straight, losses are not: where the points are far apart, an alternative looks worse "
    "between them than it is. All experts count the same here; what they cost in time depends on the batch.",
)
_LINEAR = 1.0  # per cent, up to which the scale of the figure is linear
_HIGHEST = 100.0  # per cent that the figure shows


def section(found: Alternatives) -> Section:
    """PASS if no alternative runs fewer experts than VAR at VAR's loss, by the estimates; ties are named."""
    lost = losses_of_var(found)
    return Section(
        NAME,
        "VAR against the simple alternatives at equal loss",
        "FAIL" if lost else "PASS",
        _outcome(found, lost),
        (
            *(
                f"VAR loses to {curve.name}: {_interval(_at(curve), '.2f')} experts per token and layer at no more "
                f"than VAR's loss, VAR runs {found.var.experts_per_token:.2f}"
                f"{'' if _at(curve).high < found.var.experts_per_token else '; the interval does not rule out a tie'}."
                for curve in lost
            ),
            *_tie_words(found),
            f"VAR as it was given, without a cached tier: perplexity {_interval(found.var.degradation, '+.2%')} "
            f"against the plain model's {found.perplexity:.3f} per token, {found.var.experts_per_token:.2f} of "
            f"{found.top_k} experts, {found.var.open_share:.1%} of tokens left to the learned router.",
            "Experts at VAR's loss: the fewest along an alternative's curve whose loss is at most VAR's, on straight "
            "lines between points; curves whose dial can be turned back to the plain model begin there. In brackets "
            f"the 95 % interval of {found.samples:,} bootstrap draws of the {found.documents:,} documents, the same "
            "draws for all; experts per token are those over all documents in each of them.",
            "Where on its curve an alternative is compared was picked on these very documents, which flatters the "
            "alternatives. VAR is compared at the one policy that was given, which is flattered only if it was chosen "
            "on these documents: give a policy that was chosen on others.",
            "To read fairly: VAR's tolerances were searched layer by layer, the rules that others proposed have one "
            "dial for all layers. One tolerance for all layers is VAR without that search. The cached tier is off in "
            "all rules but cache only.",
            "Token ids only, one tolerance for all layers, shuffled answers and VAR without answers are VAR without "
            "one thing: where they need no more experts, that thing earns nothing.",
        ),
        (_summary(found), _points(found)),
        (NOTE,),
    )


def losses_of_var(found: Alternatives) -> list[Curve]:
    """The alternatives that run fewer experts at VAR's loss, the strongest first."""
    better = [
        curve
        for curve in found.curves[1:]
        if curve.at_equal_loss is not None and curve.at_equal_loss.value < found.var.experts_per_token
    ]
    return sorted(better, key=lambda curve: _at(curve).value)


def ties(found: Alternatives) -> list[Curve]:
    """The alternatives that VAR beats by the estimate alone: their interval reaches below VAR's experts."""
    ours = found.var.experts_per_token
    return [
        curve
        for curve in found.curves[1:]
        if curve.at_equal_loss and curve.at_equal_loss.low < ours <= _at(curve).value
    ]


def figure(found: Alternatives) -> Figure:
    """A panel for every alternative: relative change of perplexity against experts per token, VAR's curve in each."""
    ours, *others = found.curves
    drawn, axes = panels(len(others), sharex=True, sharey=True)
    for axis, curve in zip(axes, others, strict=True):
        axis.axhline(100 * found.var.degradation.value, color="0.4", linestyle=":", linewidth=0.9)
        for edge in (-_LINEAR, _LINEAR):
            axis.axhline(edge, color="0.85", linewidth=0.6)
        _draw(axis, curve, found.top_k, color="0.5", marker="s", markerfacecolor="1", linestyle="--")
        _draw(axis, ours, found.top_k, color="0", marker="o", markersize=2.5, linestyle="-")
        given = (found.var.experts_per_token, 100 * found.var.degradation.value)
        axis.plot(*given, "o", color="0", markerfacecolor="none", markersize=9)
        axis.set_yscale("symlog", linthresh=_LINEAR)
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_title(curve.name, fontsize=7.5)
    axes[0].set_ylim(top=min(axes[0].get_ylim()[1], _HIGHEST))  # of all panels
    drawn.supxlabel("experts run per token and layer")
    drawn.supylabel("change of perplexity [%]")
    drawn.suptitle(
        f"VAR (black) and its alternatives (white squares) — {found.tokens:,} tokens, {found.documents:,} documents"
    )
    drawn.tight_layout()
    return drawn


def _draw(axis: Any, curve: Curve, top_k: int, **style: Any) -> None:
    points = [(one.experts_per_token, one.degradation) for one in curve.points]
    if curve.from_plain:
        points.insert(0, (float(top_k), Estimate(0.0, 0.0, 0.0)))
    experts = [x for x, _ in points]
    value, low, high = 100 * np.array([(one.value, one.low, one.high) for _, one in points]).T
    axis.errorbar(
        experts, value, np.maximum([value - low, high - value], 0), linewidth=0.9, **({"markersize": 4} | style)
    )


def _outcome(found: Alternatives, lost: list[Curve]) -> str:
    ours = f"{found.var.experts_per_token:.2f} experts at {_interval(found.var.degradation, '+.2%')}"
    if lost:
        named = "; ".join(f"{curve.name} {_interval(_at(curve), '.2f')}" for curve in lost)
        return f"VAR ({ours}) loses at equal loss to {len(lost)} of {len(found.curves) - 1} alternatives: {named}"
    there = [curve for curve in found.curves[1:] if curve.at_equal_loss is not None]
    if not there:
        return f"no alternative gets down to VAR's loss: {ours}"
    nearest = min(there, key=lambda curve: _at(curve).value)
    needed = _interval(_at(nearest), ".2f")
    equal = ", ".join(curve.name for curve in ties(found))
    return (
        f"no alternative does with fewer than VAR: {ours}; the nearest, {nearest.name}, needs {needed}"
        f"{f'; not distinguishable from {equal}' if equal else ''}"
    )


def _tie_words(found: Alternatives) -> list[str]:
    named = "; ".join(f"{curve.name} {_interval(_at(curve), '.2f')}" for curve in ties(found))
    ours = f"{found.var.experts_per_token:.2f} experts"
    return [f"VAR ({ours}) is not distinguishable from {named}: these intervals reach below it."] if named else []


def _summary(found: Alternatives) -> Table:
    rows = []
    for curve in found.curves:
        at, least = curve.at_equal_loss, min(one.experts_per_token for one in curve.points)
        remark = ""
        if at is None:
            remark = "loses more at every point"
        elif not curve.spends:
            remark = "loses less at its fewest"
        numbers = (at.value, at.low, at.high) if at else (None, None, None)
        over = at and at.value / found.var.experts_per_token
        rows.append((curve.name, curve.dial, *map(_finite, numbers), over, least, remark, curve.source))
    columns = (
        *(Column("rule"), Column("dial"), Column("experts at VAR's loss", ".2f"), Column("low", ".2f")),
        *(Column("high", ".2f"), Column("over VAR's", ".2f"), Column("fewest experts", ".2f")),
        *(Column("remark"), Column("from")),
    )
    return Table(
        f"Experts per token and layer at VAR's loss ({found.var.degradation.value:+.2%})", columns, tuple(rows)
    )


def _points(found: Alternatives) -> Table:
    def row(curve: Curve, one: Measured) -> tuple[str | float, ...]:
        change = one.degradation
        return (curve.name, one.dial, one.experts_per_token, one.open_share, change.value, change.low, change.high)

    columns = (
        *(Column("rule"), Column("dial", ".3g"), Column("experts", ".3f"), Column("left open", ".1%")),
        *(Column(name, "+.2%") for name in ("perplexity", "low", "high")),
    )
    return Table("Every point", columns, tuple(row(curve, one) for curve in found.curves for one in curve.points))


def _at(curve: Curve) -> Estimate:
    assert curve.at_equal_loss is not None
    return curve.at_equal_loss


def _interval(one: Estimate, form: str) -> str:
    low, high = (format(end, form) if math.isfinite(end) else "never" for end in (one.low, one.high))
    return f"{format(one.value, form)} [{low}, {high}]"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None

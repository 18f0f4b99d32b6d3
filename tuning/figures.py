"""Figures of a search, readable in grayscale, and how to read them. `analysis.report.figures.save` writes them.

In all of them a trial within the limit is a black dot, one beyond it is hollow, one that was given up a small cross.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from analysis.report.figures import panels, subplots
from analysis.report.report import ReportFigure
from tuning.importance import Importance, Sensitivity
from tuning.points import Point, pareto, predicted
from tuning.space import Parameter, Space

_MARKS = "Black dots: within the limit. Hollow: beyond it. Crosses: given up before all documents were scored."

HISTORY = ReportFigure(
    "tuning_history",
    "Speed-up by trial",
    f"{_MARKS} Line: the fastest within the limit so far.",
    "The line can only rise, also by luck: the more trials, the more the fastest of them owes to noise. A line that is "
    "flat at the end says that this search found nothing more, not that there is nothing more.",
)
FRONT = ReportFigure(
    "tuning_front",
    "Speed-up against loss of quality",
    f"{_MARKS} To the right of a trial its upper confidence limit; where that passes the dashed line, the limit on "
    "quality, the trial is beyond it. Gray steps: the trials to which no other is better in both. Up is better, and so "
    "is left. To the dashed line on both sides of 0 the scale is linear, further out logarithmic.",
    "The front is drawn by estimates, and noise favors whoever is on it. Crosses stand where the documents put them "
    "that were scored, which are fewer, so they do not compare. Limits are one-sided and each for itself.",
)
IMPORTANCE = ReportFigure(
    "tuning_importance",
    "Importance of parameters",
    "How far the best quarter of the trials differs from all of them in a parameter, as shares of 1. Black: the best "
    "quarter in speed-up; white: in perplexity. Dashed and dotted: what the largest of these shares stays under in 95 "
    "of 100 cases if the results are shuffled among the trials.",
    "Shares add up to 1 even where no parameter matters; what does not pass its line says little. A search does not "
    "sample evenly: what it settled early varies little afterwards and looks unimportant. Nothing is said about which "
    "way a parameter pulls, nor of pairs of parameters.",
)
SENSITIVITY = ReportFigure(
    "tuning_sensitivity",
    "Which way parameters pull",
    "Spearman's rank correlation of a parameter with speed-up and with the change of perplexity, with 95 % bootstrap "
    "intervals over trials. Right of 0: higher values come with more of it.",
    "A correlation of ranks is not a cause: a search moves parameters together, and one may ride along with another. "
    "Trials of a search depend on each other, so intervals are rather too narrow. What rises and falls again "
    "shows as 0.",
)
SLICES = ReportFigure(
    "tuning_slices",
    "Trials by parameter",
    f"{_MARKS} A panel for each parameter, all trials in each.",
    "All other parameters move too. Where dots are dense the search looked often because it liked what it saw; where "
    "there are none, nobody knows. Settings of the cached tier mean nothing in trials without one.",
)


def history(points: Sequence[Point], limit: float) -> Figure:
    """The speed-up of each trial by its number, and the best feasible one so far.

    Args:
        limit: on the relative change of perplexity.
    """
    figure, axis = subplots(figsize=(6.4, 3.8), layout="constrained")
    _marks(axis, points, limit, lambda point: point.number)
    fastest, numbers, so_far = -math.inf, [], []
    for point in sorted(points, key=lambda point: point.number):
        if point.outcome.within(limit):
            fastest = max(fastest, point.outcome.speedup)
        if math.isfinite(fastest):
            numbers.append(point.number)
            so_far.append(fastest)
    if numbers:
        axis.plot(numbers, so_far, color="0.4", drawstyle="steps-post", label="best within the limit", zorder=1)
    axis.set(xlabel="trial", ylabel=_speedup(points), title=_size(points, limit))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _finished(figure, axis, points)


def front(points: Sequence[Point], limit: float) -> Figure:
    """Speed-up against the change of perplexity and its upper confidence limit, with the Pareto front.

    Args:
        limit: on the relative change of perplexity.
    """
    figure, axis = subplots(figsize=(6.4, 4.6), layout="constrained")
    for point in points:
        found = point.outcome
        if not found.hopeless and math.isfinite(found.upper):
            axis.hlines(found.speedup, 100 * found.degradation, 100 * found.upper, color="0.75", linewidth=0.8)
    _marks(axis, points, limit, lambda point: 100 * point.outcome.degradation)
    if best := pareto(points):
        x, y = np.array([(100 * one.outcome.degradation, one.outcome.speedup) for one in best]).T
        axis.plot(x, y, color="0.4", drawstyle="steps-post", label="Pareto front", zorder=1)
    axis.axvline(100 * limit, color="0.4", linewidth=0.9, linestyle="--")
    axis.axvline(0, color="0.85", linewidth=0.8, zorder=0)
    axis.set_xscale("symlog", linthresh=100 * limit or 1.0)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set(xlabel="change of perplexity [%]", ylabel=_speedup(points), title=_size(points, limit))
    return _finished(figure, axis, points)


def importance(importances: Sequence[Importance]) -> Figure:
    """Shares of the parameters, the most important for the first target on top."""
    names = list(dict.fromkeys(name for one in importances for name in one.shares))
    size = (6.4, 0.45 * max(len(names), 3) + 1.6)
    figure, axis = subplots(figsize=size, layout="constrained")
    height = 0.8 / max(len(importances), 1)
    for index, one in enumerate(importances):
        face, line = ("0", "--") if index == 0 else ("1", ":")
        places = np.arange(len(names)) + (index - (len(importances) - 1) / 2) * height
        label = f"{one.target}, {one.points} trials"
        widths = [one.shares.get(name, math.nan) for name in names]
        axis.barh(places, widths, height, color=face, edgecolor="0", linewidth=0.8, label=label)
        if math.isfinite(one.by_chance):
            axis.axvline(one.by_chance, color="0.4", linewidth=1, linestyle=line, label=f"chance, {one.target}")
    axis.set(xlabel="importance, as a share", xlim=(0, 1), ylim=(max(len(names), 1) - 0.5, -0.5))
    axis.set_yticks(range(len(names)), names)
    return _finished(figure, axis, names, "too few trials to say")


def sensitivity(sensitivities: Sequence[Sensitivity]) -> Figure:
    """Rank correlations with intervals, a panel for each target."""
    names = list(dict.fromkeys(name for one in sensitivities for name in one.correlations))
    size = (7.2, 0.32 * max(len(names), 3) + 1.4)
    figure, axes = subplots(1, max(len(sensitivities), 1), figsize=size, sharey=True, squeeze=False)
    for axis, one in zip(axes.flat, sensitivities, strict=False):
        there = [(place, one.correlations[name]) for place, name in enumerate(names) if name in one.correlations]
        for place, found in there:
            axis.hlines(place, found.low, found.high, color="0.5")
        axis.plot([found.value for _, found in there], [place for place, _ in there], "o", color="0", markersize=4)
        axis.axvline(0, color="0.8", linewidth=0.8, zorder=0)
        axis.set(xlim=(-1.05, 1.05), title=f"{one.target}, {one.points} trials")
        _nothing(axis, one.correlations, "too few trials to say")
    axes[0, 0].set_yticks(range(len(names)), names)
    axes[0, 0].set_ylim(max(len(names), 1) - 0.5, -0.5)
    figure.supxlabel("rank correlation")
    figure.tight_layout()
    return figure


def slices(points: Sequence[Point], space: Space, limit: float) -> Figure:
    """The values of each parameter against speed-up.

    Args:
        limit: on the relative change of perplexity.
    """
    figure, axes = panels(len(space), sharey=True)
    for axis, one in zip(axes, space, strict=True):
        _marks(axis, points, limit, lambda point, one=one: float(point.values[one.name]), size=14)
        _nothing(axis, points, "no trial")
        _scale(axis, one)
    figure.supylabel(_speedup(points))
    figure.suptitle(_size(points, limit))
    figure.tight_layout()
    return figure


def _marks(axis: Any, points: Sequence[Point], limit: float, x: Callable[..., float], size: float = 22) -> None:
    given_up = [point for point in points if point.outcome.hopeless]
    beyond = [point for point in points if not point.outcome.hopeless and not point.outcome.within(limit)]
    within = [point for point in points if point.outcome.within(limit)]
    styles: list[tuple[str, list[Point], dict[str, Any]]] = [
        ("given up", given_up, {"marker": "x", "color": "0.6", "linewidths": 0.8, "s": 0.7 * size}),
        ("beyond the limit", beyond, {"marker": "o", "facecolors": "1", "edgecolors": "0.3", "s": size}),
        ("within the limit", within, {"marker": "o", "color": "0", "s": size}),
    ]
    for name, group, style in styles:
        if group:
            axis.scatter(
                [x(point) for point in group], [point.outcome.speedup for point in group], label=name, zorder=2, **style
            )


def _scale(axis: Any, parameter: Parameter) -> None:
    """The range and the scale of a parameter along x."""
    axis.set_xlabel(parameter.name + (f"\n[{parameter.unit}]" if parameter.unit else ""), fontsize=8)
    if parameter.kind == "bool":
        axis.set_xticks([0, 1], ["no", "yes"])
        axis.set_xlim(-0.5, 1.5)
    elif parameter.log:
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=6))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
    else:
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=parameter.kind == "int"))


def _finished(figure: Figure, axis: Any, drawn: Sequence[Any], otherwise: str = "no trial has finished") -> Figure:
    if drawn:
        figure.legend(loc="outside lower center", ncols=4, fontsize="small")
    _nothing(axis, drawn, otherwise)
    return figure


def _nothing(axis: Any, drawn: Any, said: str) -> None:
    if not drawn:
        axis.text(0.5, 0.5, said, transform=axis.transAxes, ha="center", va="center", color="0.4")


def _speedup(points: Sequence[Point]) -> str:
    return "predicted speed-up" if predicted(points) else "speed-up"


def _size(points: Sequence[Point], limit: float) -> str:
    return f"{len(points):,} trials, limit {limit:+.2%}"

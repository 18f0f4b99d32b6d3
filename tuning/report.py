"""What a search found, for people: the best points, how it went, what speed costs, and what the parameters do.

Letters: N points, S bootstrap draws.

Importance asks how much the values of the best quarter of the points differ from those of all points, parameter by
parameter (PED-ANOVA, Watanabe et al. 2023, arXiv 2304.10255, as Optuna has it). It compares with what was tried, not
with the whole space, and finds effects that go up and down again. Sensitivity is the rank correlation of a parameter
with a result: it has a sign and an interval, but misses such effects. Points that were given up have a speed-up but no
degradation, since theirs covers fewer documents.

In every figure a trial within the limit is a black dot, one beyond it is hollow, and one that was given up is a small
cross. Optuna's own figures cannot replace them: they show neither given-up trials nor upper limits, and need color.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import optuna
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from scipy import stats as ranking

from analysis.report.figures import panels, subplots
from analysis.report.report import Column, Report, ReportFigure, Section, Table
from analysis.resampling import Estimate
from tuning.points import Point, best, least_bad
from tuning.space import CACHED, CACHED_TIER, Parameter, Space

SHOWN = 5  # of the best points
FEWEST = 20  # points; with fewer the best quarter would have under 5, and nothing is said
_BEST = 0.25  # share of the points whose values importance compares with those of all

TARGETS = {"speed-up": "speedup", "degradation": "degradation"}  # fields of an outcome


@dataclasses.dataclass(frozen=True)
class Effects:
    """What the parameters do to one target."""

    target: str  # one of TARGETS
    points: int  # number of points with this result
    shares: Mapping[str, float]  # importance by parameter, adding up to 1; empty if the points say nothing
    by_chance: float  # 95% quantile of the largest share if the results are shuffled among the points
    correlations: Mapping[str, Estimate]  # Spearman's, by parameter; empty if the points say nothing


def report(
    points: Sequence[Point], space: Space, limit: float, facts: Sequence[tuple[str, str]] = (), *, seed: int = 0
) -> Report:
    """Report a search.

    Args:
        points: finished trials; there may be few, or none.
        space: the parameters that were searched.
        limit: on the relative increase in perplexity.
        facts: names and values about model, data and search.
        seed: of bootstrap and shuffles.

    Returns:
        The report, with the figures.
    """
    speeds = "predicted from active assignments, not measured" if _predicted(points) else "measured"
    return Report(
        "Search for the best configuration",
        (*facts, ("speed-ups", speeds)) if points else tuple(facts),
        _NOTES,
        (
            _best(points, space, limit),
            _history(points, limit),
            _front(points, limit),
            _parameters(points, space, limit, [_effects(points, space, target, seed=seed) for target in TARGETS]),
        ),
    )


def _effects(
    points: Sequence[Point], space: Space, target: str, *, shuffles: int = 40, samples: int = 1000, seed: int = 0
) -> Effects:
    """Importance and rank correlation of every parameter of which more than one value was tried.

    There are no shares where points are too few or more than three quarters of the results are the same, and no
    correlations where points are too few or all results are the same. `samples` are bootstrap draws over points.
    """
    points = [point for point in points if target == "speed-up" or not point.outcome.hopeless]
    results = np.array([getattr(point.outcome, TARGETS[target]) for point in points], np.float64)
    space, shares, by_chance, correlations = _varied(points, space), {}, math.nan, {}
    if len(points) >= FEWEST and space:
        losses = -results if target == "speed-up" else results
        # Ties may reach from the best quarter to the worst; then it is all points.
        if np.quantile(losses, _BEST, method="inverted_cdf") < losses.max():
            shares = _shares(points, space, losses)
            rng = np.random.default_rng(seed)
            largest = [max(_shares(points, space, rng.permutation(losses)).values()) for _ in range(shuffles)]
            by_chance = float(np.quantile(largest, 0.95)) if largest else math.nan
        if np.ptp(results) > 0:
            correlations = {one.name: _correlation(points, one, results, samples, seed) for one in space}
    return Effects(target, len(points), shares, by_chance, correlations)


def _varied(points: Sequence[Point], space: Space) -> Space:
    """The parameters of which more than one value was tried."""
    return tuple(one for one in space if len({point.values[one.name] for point in points}) > 1)


def _shares(points: Sequence[Point], space: Space, losses: np.ndarray) -> dict[str, float]:
    distributions = {one.name: one.distribution for one in space}
    study = optuna.create_study(direction="minimize")
    study.add_trials(
        [
            optuna.trial.create_trial(
                params={one.name: point.values[one.name] for one in space},
                distributions=distributions,
                value=float(loss),
            )
            for point, loss in zip(points, losses, strict=True)
        ]
    )
    return get_param_importances(study, evaluator=PedAnovaImportanceEvaluator(target_quantile=_BEST))


def _correlation(
    points: Sequence[Point], parameter: Parameter, results: np.ndarray, samples: int, seed: int
) -> Estimate:
    values = np.array([point.values[parameter.name] for point in points], np.float64)
    draws = np.random.default_rng(seed).integers(0, len(points), (samples, len(points)))  # shared by all parameters
    (value,) = _spearman(values[None], results[None])
    drawn = _spearman(values[draws], results[draws])
    low, high = np.quantile(drawn[np.isfinite(drawn)], [0.025, 0.975])
    return Estimate(float(value), float(low), float(high))


def _spearman(values: np.ndarray, results: np.ndarray) -> np.ndarray:
    """float64 [S]: rank correlation of each row of [S, N], [S, N]; NaN where one side is constant."""
    centered = [ranking.rankdata(side, axis=1) - (side.shape[1] + 1) / 2 for side in (values, results)]
    spreads = np.prod([np.square(side).sum(axis=1) for side in centered], axis=0)
    together = np.prod(centered, axis=0).sum(axis=1)
    return np.divide(together, np.sqrt(spreads), out=np.full(len(spreads), np.nan), where=spreads > 0)


# --- sections --------------------------------------------------------------------------------------------------------

_MARKS = (
    "Black dots: trials within the limit on quality. Hollow dots: beyond it. Crosses: given up before all documents "
    "were scored."
)
_NOTES = (
    "Perplexity is its relative increase per token on the tune documents over the plain model; the upper limit is "
    "one-sided, over documents, for each trial alone.",
    "Experts per token is the mean number that ran, over tokens and layers. Speed-up is the geometric mean over the "
    "phases of plain time over VAR time.",
    "FAIL is a finding about this space, this model and this text, not a fault of the run.",
)


def _best(points: Sequence[Point], space: Space, limit: float) -> Section:
    title, number = "What did the search find?", len(points)
    if not points:
        return Section("best", title, "not measured", "no trial has finished")
    feasible = best(points, limit, SHOWN)
    shown = feasible or least_bad(points, SHOWN)
    first, at_most = shown[0], f"the limit of {limit:+.2%}"
    one = first.outcome
    said = (
        f"trial {first.number}: {'predicted ' * one.predicted}speed-up {one.speedup:.2f}x, {one.experts_per_token:.2f} "
        f"experts per token, perplexity {one.degradation:+.2%}, upper limit {one.upper:+.2%}"
        f"{', given up' * one.hopeless}"
    )
    if feasible:
        within = sum(point.outcome.within(limit) for point in points)
        outcome = (
            f"{within:,} of {number:,} trials are within {at_most}; the fastest, by the measurements that chose it, is "
            f"{said}"
        )
        words = [
            f"Chosen from {number:,} trials on the very documents that scored them: the best of many looks better than "
            "it is. Only documents that the search never saw can show how good it really is (--validate)."
        ]
    else:
        outcome = f"none of {number:,} trials is within {at_most}; the least bad is {said}"
        words = [
            "Nothing here may be used under this limit; the trials below have the lowest upper limits. More documents "
            "lower an upper limit, a smaller loss budget lowers the loss."
        ]
    unused = () if first.values.get(CACHED_TIER, True) else CACHED
    at_end = [
        f"{one.name} ({'lowest' if first.values[one.name] == one.low else 'highest'})"
        for one in space
        if one.kind != "bool" and one.name not in unused and first.values[one.name] in (one.low, one.high)
    ]
    if at_end:
        words.append(
            f"Trial {first.number} is at an end of a range, beyond which there may be better: {', '.join(at_end)}."
        )
    if without := [str(point.number) for point in shown if not point.values.get(CACHED_TIER, True)]:
        words.append(f"Without a cached tier, so that its settings mean nothing: trial {', '.join(without)}.")
    columns = (Column("parameter"), Column("unit"), *(Column(f"trial {point.number}", ".5g") for point in shown))
    rows = tuple((one.name, one.unit, *(point.values[one.name] for point in shown)) for one in space)
    results = _results("The fastest within the limit" if feasible else "The least bad", shown)
    tables = (results, Table("Their parameters", columns, rows))
    verdict, headline = "reported" if feasible else "FAIL", f"{one.speedup:.2f}x"
    return Section("best", title, verdict, outcome, tuple(words), tables, headline=headline)


def _results(title: str, points: Sequence[Point]) -> Table:
    phases = [] if _predicted(points) else list(dict.fromkeys(name for one in points for name in one.outcome.speedups))
    columns = (
        *(Column("trial"), Column("speed-up", ".2f")),
        *(Column(f"{phase}{end}", ".2f") for phase in phases for end in ("", " low", " high")),
        *(Column("experts", ".2f"), Column("left open", ".1%"), Column("perplexity", "+.2%")),
        *(Column("upper limit", "+.2%"), Column("documents", ",d"), Column("given up")),
    )
    rows = []
    for point in points:
        one = point.outcome
        ratios = [one.speedups.get(phase) for phase in phases]
        times = [value for ratio in ratios for value in (dataclasses.astuple(ratio) if ratio else (None,) * 3)]
        quality = (one.degradation, one.upper, one.documents, one.hopeless)
        rows.append((point.number, one.speedup, *times, one.experts_per_token, one.learned_share, *quality))
    return Table(title, columns, tuple(rows))


def _history(points: Sequence[Point], limit: float) -> Section:
    number, given_up = len(points), sum(point.outcome.hopeless for point in points)
    within = sum(point.outcome.within(limit) for point in points)
    first = best(points, limit, 1)
    outcome = (
        f"{number:,} trials: {number - given_up:,} scored in full, {within:,} of them within the limit, "
        f"{given_up:,} given up" + (f"; the best was found at trial {first[0].number}" if first else "")
    )
    words = "Given up: scoring stopped early to save time because the loss had certainly passed the limit."
    figure = ReportFigure(
        "tuning_history",
        "Speed-up by trial",
        f"{_MARKS} Line: the fastest trial within the limit so far.",
        "The line can only rise, even if only by luck: the more trials there are, the more the fastest of them owes to "
        "noise. A flat end means that this search found nothing better, not that there is nothing better.",
        partial(_draw_history, points, limit),
    )
    verdict = "reported" if number else "not measured"
    return Section("history", "How did the search go?", verdict, outcome, (words,), figures=(figure,))


def _front(points: Sequence[Point], limit: float) -> Section:
    whole = _pareto(points)
    within = sum(point.outcome.within(limit) for point in whole)
    outcome = "no trial was scored in full"
    if whole:
        outcome = (
            f"{len(whole):,} trials that no other beats in both speed-up and perplexity, {within:,} of them within the "
            "limit"
        )
    words = (
        "The front is drawn by estimates, but the limit applies to upper limits: the fastest trial within the limit "
        "need not be on the front."
    )
    figure = ReportFigure(
        "tuning_front",
        "Speed-up against loss of quality",
        f"{_MARKS} A thin line runs from each trial to its upper confidence limit; if it crosses the dashed line (the "
        "limit on quality), the trial is beyond the limit. Gray steps: the Pareto front. Better is up and to the "
        "left. The horizontal scale is linear up to the dashed line and logarithmic beyond it.",
        "Noise favors the trials on the front. Crosses were scored on fewer documents, so they cannot be compared with "
        "the others. The confidence limits are one-sided, each for its own trial alone.",
        partial(_draw_front, points, limit),
    )
    tables = (_results("The Pareto front, by rising speed-up", whole),) if whole else ()
    verdict = "reported" if whole else "not measured"
    return Section("front", "What does speed cost?", verdict, outcome, (words,), tables, (figure,))


def _parameters(points: Sequence[Point], space: Space, limit: float, found: Sequence[Effects]) -> Section:
    measured = any(one.shares or one.correlations for one in found)
    said, missing = [], []
    for one in found:
        if one.shares:
            name, share = max(one.shares.items(), key=lambda pair: pair[1])
            verdict = "by chance up to" if share > one.by_chance else "no more than by chance, up to"
            said.append(f"for {one.target} {name} ({share:.0%}, {verdict} {one.by_chance:.0%})")
        if one.points < FEWEST:
            missing.append(f"For {one.target} there are {one.points} trials; under {FEWEST} nothing is said.")
        elif not one.correlations:
            missing.append(f"For {one.target} all results or all parameters are the same; nothing can be said.")
        elif not one.shares:
            missing.append(f"For {one.target} so many results are the same that there is no best quarter.")
    fixed = [one.name for one in space if one not in _varied(points, space)] if points else []
    words = (
        *missing,
        *([f"Left out, since only one value was tried: {', '.join(fixed)}."] if fixed else []),
        "Importance is how far the best quarter of the trials differs from all trials in a parameter (PED-ANOVA), as "
        "shares of 1; shares below what chance gives say little. A positive rank correlation with perplexity means "
        "that more of the parameter costs more.",
        "A search moves parameters together and tries most trials where results were good, so neither figure shows a "
        "cause. Trials without a cached tier make its settings look less important.",
    )
    figures = (
        ReportFigure(
            "tuning_parameters",
            "Importance of parameters, and the direction of their effect",
            "Left (importance): how much the best quarter of the trials differs from all trials in this parameter, for "
            "speed-up (black) and for perplexity (white). In 95 of 100 random shuffles, even the largest share stays "
            "below the lines. Right: Spearman's rank correlation with 95% bootstrap intervals over trials; right of 0, "
            "higher values of the parameter go with a higher speed-up or perplexity.",
            "The shares add up to 1 even if no parameter matters, and a parameter that the search settled early looks "
            "unimportant. The trials of a search depend on each other, so the intervals are too narrow. A correlation "
            "misses an effect that rises and falls again.",
            partial(_draw_effects, found),
        ),
        ReportFigure(
            "tuning_slices",
            "Trials by parameter",
            f"{_MARKS} One panel per parameter; each shows the speed-up of all trials.",
            "All other parameters vary as well. Dots are dense where the search found good trials. The settings of the "
            "cached tier have no effect in trials without one.",
            partial(_draw_slices, points, space, limit),
        ),
    )
    outcome = f"most important {'; '.join(said)}" if said else "the importance of parameters cannot be told"
    verdict, tables = ("reported", (_table(space, found),)) if measured else ("not testable", ())
    return Section("parameters", "What do the parameters do?", verdict, outcome, words, tables, figures)


def _table(space: Space, found: Sequence[Effects]) -> Table:
    unknown = Estimate(math.nan, math.nan, math.nan)
    ends = (" correlation", " low", " high")
    columns = (
        Column("parameter"),
        *(Column(f"importance, {one.target}", ".2f") for one in found),
        *(Column(f"{one.target}{end}", "+.2f") for one in found for end in ends),
    )
    rows = []
    for name in (one.name for one in space):
        shares = [one.shares.get(name) for one in found]
        correlations = [dataclasses.astuple(one.correlations.get(name, unknown)) for one in found]
        rows.append((name, *shares, *(value for three in correlations for value in three)))
    return Table("Importance and rank correlation, with 95% intervals over trials", columns, tuple(rows))


def _predicted(points: Sequence[Point]) -> bool:
    return any(point.outcome.predicted for point in points)


def _pareto(points: Sequence[Point]) -> list[Point]:
    """The points that no other point beats in both speed-up and degradation, by rising speed-up.

    Points that were given up are ignored because their degradation covers fewer documents.
    """
    whole = [point for point in points if not point.outcome.hopeless]
    found: list[Point] = []
    for point in sorted(whole, key=lambda point: (-point.outcome.speedup, point.outcome.degradation)):
        if not found or point.outcome.degradation < found[-1].outcome.degradation:
            found.append(point)
    return found[::-1]


# --- figures ---------------------------------------------------------------------------------------------------------


def _draw_history(points: Sequence[Point], limit: float) -> Figure:
    """Draw the speed-up of each trial by its number, and the best feasible one so far."""
    figure, axis = subplots(figsize=(6.4, 3.8), layout="constrained")
    _marks(axis, points, limit, lambda point: point.number)
    ordered = sorted(points, key=lambda point: point.number)
    feasible = [point.outcome.speedup if point.outcome.within(limit) else -math.inf for point in ordered]
    so_far = np.maximum.accumulate(feasible) if feasible else np.zeros(0)
    known = np.isfinite(so_far)
    if known.any():
        numbers = np.array([point.number for point in ordered])
        style = {"color": "0.4", "drawstyle": "steps-post", "label": "best within the limit", "zorder": 1}
        axis.plot(numbers[known], so_far[known], **style)
    axis.set(xlabel="trial", ylabel=_speedup(points), title=_size(points, limit))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _finished(figure, axis, points)


def _draw_front(points: Sequence[Point], limit: float) -> Figure:
    """Draw speed-up against the increase in perplexity and its upper confidence limit, with the Pareto front."""
    figure, axis = subplots(figsize=(6.4, 4.6), layout="constrained")
    for point in points:
        found = point.outcome
        if not found.hopeless and math.isfinite(found.upper):
            axis.hlines(found.speedup, 100 * found.degradation, 100 * found.upper, color="0.75", linewidth=0.8)
    _marks(axis, points, limit, lambda point: 100 * point.outcome.degradation)
    if front := _pareto(points):
        x, y = np.array([(100 * one.outcome.degradation, one.outcome.speedup) for one in front]).T
        axis.plot(x, y, color="0.4", drawstyle="steps-post", label="Pareto front", zorder=1)
    axis.axvline(100 * limit, color="0.4", linewidth=0.9, linestyle="--")
    axis.axvline(0, color="0.85", linewidth=0.8, zorder=0)
    axis.set_xscale("symlog", linthresh=100 * limit or 1.0)
    axis.xaxis.set_major_formatter(_PLAIN)
    axis.set(xlabel="increase in perplexity [%]", ylabel=_speedup(points), title=_size(points, limit))
    return _finished(figure, axis, points)


def _draw_effects(found: Sequence[Effects]) -> Figure:
    """Importance, and the rank correlations with their intervals, the most important parameter on top."""
    names = list(dict.fromkeys(name for one in found for known in (one.shares, one.correlations) for name in known))
    figure, axes = subplots(1, 1 + len(found), figsize=(9.6, 0.45 * max(len(names), 3) + 1.8), sharey=True)
    height = 0.8 / len(found)
    for index, (one, face, line) in enumerate(zip(found, "01", ("--", ":"), strict=True)):
        places = np.arange(len(names)) + (index - (len(found) - 1) / 2) * height
        widths = [one.shares.get(name, math.nan) for name in names]
        axes[0].barh(places, widths, height, color=face, edgecolor="0", linewidth=0.8, label=one.target)
        if math.isfinite(one.by_chance):
            axes[0].axvline(one.by_chance, color="0.4", linewidth=1, linestyle=line, label=f"chance, {one.target}")
    axes[0].set(xlim=(0, 1), xlabel="importance, as a share")
    _nothing(axes[0], any(one.shares for one in found), "too few trials to say")
    for axis, one in zip(axes[1:], found, strict=True):
        for place, name in enumerate(names):
            if name in one.correlations:
                estimate = one.correlations[name]
                axis.hlines(place, estimate.low, estimate.high, color="0.5")
                axis.plot(estimate.value, place, "o", color="0", markersize=4)
        axis.axvline(0, color="0.8", linewidth=0.8, zorder=0)
        axis.set(xlim=(-1.05, 1.05), xlabel="rank correlation", title=f"{one.target}, {one.points} trials")
        _nothing(axis, one.correlations, "too few trials to say")
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(max(len(names), 1) - 0.5, -0.5)
    if names:
        axes[0].legend(fontsize="x-small", loc="lower right")
    figure.tight_layout()
    return figure


def _draw_slices(points: Sequence[Point], space: Space, limit: float) -> Figure:
    """Draw the values of each parameter against speed-up."""
    figure, axes = panels(len(space), sharey=True)
    for axis, one in zip(axes, space, strict=True):
        _marks(axis, points, limit, lambda point, one=one: float(point.values[one.name]), size=14)
        _nothing(axis, points, "no trial")
        axis.set_xlabel(one.name + (f"\n[{one.unit}]" if one.unit else ""), fontsize=8)
        if one.kind == "bool":
            axis.set_xticks([0, 1], ["no", "yes"])
            axis.set_xlim(-0.5, 1.5)
        elif one.log:
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=6))
            axis.xaxis.set_major_formatter(_PLAIN)
            axis.xaxis.set_minor_formatter(NullFormatter())
        else:
            axis.xaxis.set_major_locator(MaxNLocator(4, integer=one.kind == "int"))
    figure.supylabel(_speedup(points))
    figure.suptitle(_size(points, limit))
    figure.tight_layout()
    return figure


_PLAIN = FuncFormatter(lambda value, _: f"{value:g}")


def _marks(axis: Any, points: Sequence[Point], limit: float, x: Callable[..., float], size: float = 22) -> None:
    kinds: dict[str, dict[str, Any]] = {
        "given up": {"marker": "x", "color": "0.6", "linewidths": 0.8, "s": 0.7 * size},
        "beyond the limit": {"marker": "o", "facecolors": "1", "edgecolors": "0.3", "s": size},
        "within the limit": {"marker": "o", "color": "0", "s": size},
    }
    for name, style in kinds.items():
        group = [point for point in points if _kind(point, limit) == name]
        if group:
            speedups = [point.outcome.speedup for point in group]
            axis.scatter([x(point) for point in group], speedups, label=name, zorder=2, **style)


def _kind(point: Point, limit: float) -> str:
    if point.outcome.hopeless:
        return "given up"
    return "within the limit" if point.outcome.within(limit) else "beyond the limit"


def _finished(figure: Figure, axis: Any, drawn: Sequence[Any], otherwise: str = "no trial has finished") -> Figure:
    if drawn:
        figure.legend(loc="outside lower center", ncols=4, fontsize="small")
    _nothing(axis, drawn, otherwise)
    return figure


def _nothing(axis: Any, drawn: Any, said: str) -> None:
    if not drawn:
        axis.text(0.5, 0.5, said, transform=axis.transAxes, ha="center", va="center", color="0.4")


def _speedup(points: Sequence[Point]) -> str:
    return "predicted speed-up" if _predicted(points) else "speed-up"


def _size(points: Sequence[Point], limit: float) -> str:
    return f"{len(points):,} trials, limit {limit:+.2%}"

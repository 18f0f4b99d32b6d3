"""What a search found, for people: the best points, how it went, what speed costs, and what the parameters do.

found = examine(points, space, limit)
write_report(report(found, facts), folder, "tuning", figures=draw(found))
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from matplotlib.figure import Figure

from analysis.report.report import Column, Report, Section, Table
from analysis.resampling import Estimate
from tuning import figures
from tuning.importance import FEWEST, Importance, Sensitivity, importances, sensitivities, varied
from tuning.points import Point, best, least_bad, pareto, predicted
from tuning.space import CACHED, Space

SHOWN = 5  # of the best points


@dataclasses.dataclass(frozen=True)
class Findings:
    """A search, and what its points say of the parameters."""

    points: tuple[Point, ...]
    space: Space
    limit: float  # on the relative change of perplexity
    importances: tuple[Importance, ...]  # by target
    sensitivities: tuple[Sensitivity, ...]  # by target


def examine(points: Sequence[Point], space: Space, limit: float, *, seed: int = 0) -> Findings:
    """What there is to report of a search; `points` may be few, or none.

    Args:
        limit: on the relative change of perplexity.
        seed: of bootstrap and shuffles.
    """
    return Findings(
        tuple(points),
        space,
        limit,
        tuple(importances(points, space, seed=seed)),
        tuple(sensitivities(points, space, seed=seed)),
    )


def report(found: Findings, facts: Sequence[tuple[str, str]] = (), further: Sequence[Section] = ()) -> Report:
    """The report of a search.

    Args:
        facts: about model, data and search, for people.
        further: sections of others, such as a validation; they follow the first one, which they put to the test.
    """
    speeds = "predicted by active assignments, not measured" if predicted(found.points) else "measured"
    return Report(
        "Search for the best configuration",
        (*facts, ("speed-ups", speeds)) if found.points else tuple(facts),
        _NOTES,
        (_best(found), *further, _history(found), _front(found), _parameters(found)),
    )


def draw(found: Findings) -> dict[str, Figure]:
    """The figures that belong to the report, by name."""
    points, space, limit = found.points, found.space, found.limit
    return {
        figures.HISTORY.name: figures.history(points, limit),
        figures.FRONT.name: figures.front(points, limit),
        figures.IMPORTANCE.name: figures.importance(found.importances),
        figures.SENSITIVITY.name: figures.sensitivity(found.sensitivities),
        figures.SLICES.name: figures.slices(points, space, limit),
    }


def _best(found: Findings) -> Section:
    title = "What did the search find?"
    if not found.points:
        return Section("best", title, "not measured", "no trial has finished")
    number = len(found.points)
    feasible = best(found.points, found.limit, SHOWN)
    shown = feasible or least_bad(found.points, SHOWN)
    first, limit = shown[0], f"the limit of {found.limit:+.2%}"
    if feasible:
        within = sum(point.outcome.within(found.limit) for point in found.points)
        outcome = (
            f"{within:,} of {number:,} trials are within {limit}; the fastest, by the measurements that chose it, is "
            f"{_said(first)}"
        )
        chosen = (
            f"Chosen from {number:,} trials on the very documents that scored them: the best of many looks better than "
            "it is. The upper limit guards against the noise of one trial, not against having chosen. What these "
            "configurations are worth, only documents can say that the search never saw."
        )
    else:
        outcome = f"none of {number:,} trials is within {limit}; the least bad is {_said(first)}"
        chosen = (
            "Nothing here may be used under this limit. The trials below have the lowest upper limits, those last that "
            "were given up; even the least bad of many looks better than it is. More documents lower an upper limit, "
            "a smaller loss budget the loss."
        )
    words = (
        chosen,
        *(("Speed-ups are predicted by active assignments; no time was measured.",) if predicted(shown) else ()),
        *_at_an_end(first, found.space),
        *_without_cache(shown),
    )
    tables = (_results("The fastest within the limit" if feasible else "The least bad", shown), _values(shown, found))
    return Section("best", title, "reported" if feasible else "FAIL", outcome, words, tables)


def _said(point: Point) -> str:
    one = point.outcome
    kind = "predicted speed-up" if predicted([point]) else "speed-up"
    return (
        f"trial {point.number}: {kind} {one.speedup:.2f}x, {one.experts_per_token:.2f} experts per token, perplexity "
        f"{one.degradation:+.2%}, upper limit {one.upper:+.2%}{', given up' if one.hopeless else ''}"
    )


def _at_an_end(point: Point, space: Space) -> list[str]:
    """Where a search may have been too narrow."""
    unused = CACHED if not point.values.get("cached_tier", True) else ()
    at_end = [
        f"{one.name} ({'lowest' if point.values[one.name] == one.low else 'highest'})"
        for one in space
        if one.kind != "bool" and one.name not in unused and point.values[one.name] in (one.low, one.high)
    ]
    if not at_end:
        return []
    return [f"Trial {point.number} stands at an end of a range, beyond which there may be better: {', '.join(at_end)}."]


def _without_cache(points: Sequence[Point]) -> list[str]:
    without = [str(point.number) for point in points if not point.values.get("cached_tier", True)]
    if not without:
        return []
    return [f"Without a cached tier, so that its settings mean nothing: trial {', '.join(without)}."]


def _results(title: str, points: Sequence[Point]) -> Table:
    phases = [] if predicted(points) else list(dict.fromkeys(name for one in points for name in one.outcome.speedups))
    columns = (
        *(Column("trial"), Column("speed-up", ".2f")),
        *(Column(f"{phase}{end}", ".2f") for phase in phases for end in ("", " low", " high")),
        *(Column("experts", ".2f"), Column("left open", ".1%"), Column("perplexity", "+.2%")),
        *(Column("upper limit", "+.2%"), Column("documents", ",d"), Column("given up")),
    )

    def row(point: Point) -> tuple[float | int | None, ...]:
        one = point.outcome
        ratios = [one.speedups.get(phase) for phase in phases]
        times = [value for ratio in ratios for value in (dataclasses.astuple(ratio) if ratio else (None,) * 3)]
        quality = (one.degradation, one.upper, one.documents, one.hopeless)
        return (point.number, one.speedup, *times, one.experts_per_token, one.learned_share, *quality)

    return Table(title, columns, tuple(map(row, points)))


def _values(points: Sequence[Point], found: Findings) -> Table:
    columns = (Column("parameter"), Column("unit"), *(Column(f"trial {point.number}", ".5g") for point in points))
    rows = tuple((one.name, one.unit, *(point.values[one.name] for point in points)) for one in found.space)
    return Table("Their parameters", columns, rows)


def _history(found: Findings) -> Section:
    number = len(found.points)
    given_up = sum(point.outcome.hopeless for point in found.points)
    within = sum(point.outcome.within(found.limit) for point in found.points)
    first = best(found.points, found.limit, 1)
    ended = f"; the best was found at trial {first[0].number}" if first else ""
    return Section(
        "history",
        "How did the search go?",
        "reported" if number else "not measured",
        f"{number:,} trials: {number - given_up:,} scored in full, {within:,} of them within the limit, "
        f"{given_up:,} given up{ended}",
        (
            "Given up: scoring stopped early because the loss had passed the limit beyond doubt. It saves time, and "
            "leaves those trials with a loss of fewer documents.",
        ),
        figures=(figures.HISTORY,),
    )


def _front(found: Findings) -> Section:
    whole = pareto(found.points)
    within = sum(point.outcome.within(found.limit) for point in whole)
    outcome = (
        f"{len(whole):,} trials to which no other is better in both speed-up and perplexity, {within:,} of them within "
        "the limit"
        if whole
        else "no trial was scored in full"
    )
    return Section(
        "front",
        "What does speed cost?",
        "reported" if whole else "not measured",
        outcome,
        (
            "The front is that of the estimates; what is within the limit, the upper limits say. So the fastest trial "
            "within the limit need not be on the front: another may be better in both and less sure.",
        ),
        (_results("The Pareto front, by rising speed-up", whole),) if whole else (),
        (figures.FRONT,),
    )


def _parameters(found: Findings) -> Section:
    there = [one for one in found.importances if one.shares]
    measured = bool(there) or any(one.correlations for one in found.sensitivities)
    said = (f"for {one.target} {_first(one)}" for one in there)
    outcome = f"most important {'; '.join(said)}" if there else "the importance of parameters cannot be told"
    fixed = [one.name for one in found.space if one not in varied(found.points, found.space)]
    return Section(
        "parameters",
        "What do the parameters do?",
        "reported" if measured else "not testable",
        outcome,
        (
            *_missing(found),
            *([f"Left out, since only one value was tried: {', '.join(fixed)}."] if fixed and found.points else []),
            "Importance: how far the best quarter of the trials differs from all trials in a parameter (PED-ANOVA), "
            "as shares of 1. A search does not sample evenly, so it speaks of where the search looked, and shares "
            "under what chance gives say little.",
            "A rank correlation is not a cause: a search moves parameters together. Its sign says which way more goes: "
            "positive with perplexity means that more of the parameter costs more.",
            "The settings of the cached tier mean nothing in trials without one, so they look less important than they "
            "are where there is one.",
        ),
        (_effects(found),) if measured else (),
        (figures.IMPORTANCE, figures.SENSITIVITY, figures.SLICES),
    )


def _first(one: Importance) -> str:
    name, share = max(one.shares.items(), key=lambda pair: pair[1])
    verdict = "by chance up to" if share > one.by_chance else "no more than by chance, up to"
    return f"{name} ({share:.0%}, {verdict} {one.by_chance:.0%})"


def _missing(found: Findings) -> list[str]:
    """Why numbers are missing."""
    words = []
    for one, other in zip(found.importances, found.sensitivities, strict=True):
        if one.points < FEWEST:
            words.append(f"For {one.target} there are {one.points} trials; under {FEWEST} nothing is said.")
        elif not other.correlations:
            words.append(f"For {one.target} all results or all parameters are the same; nothing can be said.")
        elif not one.shares:
            words.append(f"For {one.target} so many results are the same that there is no best quarter: no importance.")
    return words


def _effects(found: Findings) -> Table:
    unknown = Estimate(float("nan"), float("nan"), float("nan"))
    columns = (
        Column("parameter"),
        *(Column(f"importance, {one.target}", ".2f") for one in found.importances),
        *(
            Column(f"{one.target}{end}", "+.2f")
            for one in found.sensitivities
            for end in (" correlation", " low", " high")
        ),
    )
    rows = []
    for name in (one.name for one in found.space):
        shares = [one.shares.get(name) for one in found.importances]
        correlations = [dataclasses.astuple(one.correlations.get(name, unknown)) for one in found.sensitivities]
        rows.append((name, *shares, *(value for three in correlations for value in three)))
    return Table("Importance and rank correlation, with 95 % intervals over trials", columns, tuple(rows))


_NOTES = (
    "Perplexity is its relative change per token on the tuning documents, against the plain model; the upper limit is "
    "one-sided, over documents, each trial for itself.",
    "Experts per token are counted where they ran, as a mean over tokens and layers. Speed-up: the geometric mean over "
    "the phases, plain time over VAR time.",
    "FAIL is a finding about this space, this model and this text, not a fault of the run.",
)

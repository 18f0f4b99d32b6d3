"""What a search knows of the configurations that it tried, and which of them are the best.

A point is feasible where the upper confidence limit of what it costs is within the limit on quality. The limit is on
the tuning documents and guards against noise, not against having chosen: of many points the best one looks better than
it is. What the chosen ones are worth, other documents say (`tuning.validation`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from analysis.resampling import Estimate
from tuning.space import Values

PREDICTED = "predicted"  # in place of a phase: by active assignments, not measured


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One configuration on the tuning documents."""

    degradation: float  # relative change of perplexity per token, over the documents that were scored
    upper: float  # its upper confidence limit
    documents: int  # that were scored
    hopeless: bool  # given up before all documents were scored: its loss had passed the limit beyond doubt
    experts_per_token: float  # mean over tokens and layers
    learned_share: float  # share of tokens and layers that the learned router decided
    speedups: Mapping[str, Estimate]  # by phase, "prefill" and "decode", or under PREDICTED
    speedup: float  # what is to be as high as possible: their geometric mean

    def within(self, limit: float) -> bool:
        """Whether all documents were scored and the upper confidence limit does not exceed `limit`."""
        return not self.hopeless and self.upper <= limit


@dataclasses.dataclass(frozen=True)
class Point:
    """One finished trial."""

    number: int  # of the trial
    values: Values  # where it lies in the space
    config: str  # VARConfig as JSON
    outcome: Outcome


def best(points: Sequence[Point], limit: float, count: int) -> list[Point]:
    """The fastest feasible points, fastest first, at most `count`; of equal configurations the first."""
    feasible = [point for point in points if point.outcome.within(limit)]
    return _different(sorted(feasible, key=lambda point: (-point.outcome.speedup, point.number)), count)


def least_bad(points: Sequence[Point], count: int) -> list[Point]:
    """The points of the lowest upper confidence limit, lowest first, at most `count`."""
    return _different(sorted(points, key=lambda point: (point.outcome.hopeless, point.outcome.upper)), count)


def pareto(points: Sequence[Point]) -> list[Point]:
    """The points to which no other is better in speed-up and degradation alike, by rising speed-up.

    Points that were given up are left out: their degradation is of fewer documents.
    """
    whole = [point for point in points if not point.outcome.hopeless]
    found: list[Point] = []
    lowest = float("inf")
    for point in sorted(whole, key=lambda point: (-point.outcome.speedup, point.outcome.degradation)):
        if point.outcome.degradation < lowest:
            found.append(point)
            lowest = point.outcome.degradation
    return found[::-1]


def predicted(points: Sequence[Point]) -> bool:
    """Whether speed-ups among them are predicted by active assignments and not measured."""
    return any(PREDICTED in point.outcome.speedups for point in points)


def _different(points: Sequence[Point], count: int) -> list[Point]:
    by_config: dict[str, Point] = {}
    for point in points:
        by_config.setdefault(point.config, point)
    return list(by_config.values())[:count]

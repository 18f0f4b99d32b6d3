"""Which parameters a search turned out to hang on: their importance, and which way they pull.

Letters: N points, S bootstrap draws.

Importance asks how much the values of the best quarter of the points differ from those of all points, parameter by
parameter (PED-ANOVA, Watanabe et al. 2023, arXiv 2304.10255, as Optuna has it). It compares with what was tried, not
with the whole space, and finds effects that go up and down again. Sensitivity is the rank correlation of a parameter
with a result: it has a sign and an interval, and misses what goes up and down again.

Points that were given up have a speed-up; their degradation is of fewer documents and is left out.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import optuna
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from scipy import stats as ranking

from analysis.resampling import Estimate
from tuning.points import Outcome, Point
from tuning.space import Parameter, Space

FEWEST = 20  # points, below which nothing is said: the best quarter would be under 5
_BEST = 0.25  # of the points, whose values importance compares with those of all

TARGETS: dict[str, Callable[[Outcome], float]] = {  # both the better, the lower
    "speed-up": lambda outcome: -outcome.speedup,
    "degradation": lambda outcome: outcome.degradation,
}


@dataclasses.dataclass(frozen=True)
class Importance:
    """How much each parameter decides whether a point is among the best quarter in one target."""

    target: str  # of TARGETS
    points: int  # that it rests on
    shares: Mapping[str, float]  # by parameter, adding up to 1; empty if that many points say nothing
    by_chance: float  # 95 % quantile of the largest share where the results are shuffled among the points


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """How each parameter's order and the order of the results go together."""

    target: str  # of TARGETS
    points: int  # that it rests on
    correlations: Mapping[str, Estimate]  # Spearman's, by parameter; empty if that many points say nothing


def importances(points: Sequence[Point], space: Space, *, shuffles: int = 40, seed: int = 0) -> list[Importance]:
    """One for each target.

    Parameters of which only one value was tried are left out. There are no shares where the points are too few, or
    more than three quarters of the results are the same.

    Args:
        shuffles: draws of what chance gives.
        seed: of these draws.
    """
    return [_importance(points, space, target, shuffles, seed) for target in TARGETS]


def sensitivities(points: Sequence[Point], space: Space, *, samples: int = 1000, seed: int = 0) -> list[Sensitivity]:
    """One for each target, with 95 % percentile intervals over points.

    A correlation is positive where a higher value gives a higher speed-up or degradation. Parameters of which only one
    value was tried are left out; there are no correlations where the points are too few or their results all the same.

    Args:
        samples: bootstrap draws.
        seed: of the draws, which all parameters share.
    """
    return [_sensitivity(points, space, target, samples, seed) for target in TARGETS]


def varied(points: Sequence[Point], space: Space) -> Space:
    """The parameters of which more than one value was tried."""
    return tuple(one for one in space if len({point.values[one.name] for point in points}) > 1)


def _importance(points: Sequence[Point], space: Space, target: str, shuffles: int, seed: int) -> Importance:
    points, results = _with_result(points, target)
    space = varied(points, space)
    if len(points) < FEWEST or not space or not _has_a_best_quarter(results):
        return Importance(target, len(points), {}, float("nan"))
    shares = _shares(points, space, results)
    rng = np.random.default_rng(seed)
    largest = [max(_shares(points, space, rng.permutation(results)).values()) for _ in range(shuffles)]
    by_chance = float(np.quantile(largest, 0.95)) if largest else float("nan")
    return Importance(target, len(points), shares, by_chance)


def _shares(points: Sequence[Point], space: Space, results: np.ndarray) -> dict[str, float]:
    distributions = {one.name: one.distribution for one in space}
    with _quiet():
        study = optuna.create_study(direction="minimize")
    study.add_trials(
        [
            optuna.trial.create_trial(
                params={one.name: point.values[one.name] for one in space},
                distributions=distributions,
                value=float(result),
            )
            for point, result in zip(points, results, strict=True)
        ]
    )
    return get_param_importances(study, evaluator=PedAnovaImportanceEvaluator(target_quantile=_BEST))


def _has_a_best_quarter(results: np.ndarray) -> bool:
    """Ties may reach from the best quarter to the worst; it is all points then."""
    return bool(np.quantile(results, _BEST, method="inverted_cdf") < results.max())


def _sensitivity(points: Sequence[Point], space: Space, target: str, samples: int, seed: int) -> Sensitivity:
    points, results = _with_result(points, target)
    if len(points) < FEWEST or np.ptp(results) == 0:
        return Sensitivity(target, len(points), {})
    if target == "speed-up":
        results = -results
    draws = np.random.default_rng(seed).integers(0, len(points), (samples, len(points)))
    everything = np.arange(len(points))[None]
    found = {}
    for one in varied(points, space):
        values = _values(points, one)
        (value,) = _spearman(values[everything], results[everything])
        drawn = _spearman(values[draws], results[draws])
        low, high = np.quantile(drawn[np.isfinite(drawn)], [0.025, 0.975])
        found[one.name] = Estimate(float(value), float(low), float(high))
    return Sensitivity(target, len(points), found)


def _spearman(values: np.ndarray, results: np.ndarray) -> np.ndarray:
    """float64 [S]: rank correlation of each row of [S, N], [S, N]; NaN where one side is all the same."""
    centered = [ranking.rankdata(side, axis=1) - (side.shape[1] + 1) / 2 for side in (values, results)]
    spreads = np.prod([np.square(side).sum(axis=1) for side in centered], axis=0)
    together = np.prod(centered, axis=0).sum(axis=1)
    return np.divide(together, np.sqrt(spreads), out=np.full(len(spreads), np.nan), where=spreads > 0)


def _with_result(points: Sequence[Point], target: str) -> tuple[list[Point], np.ndarray]:
    """The points that have the result, and float64 [N]: the lower, the better."""
    there = [point for point in points if target == "speed-up" or not point.outcome.hopeless]
    return there, np.array([TARGETS[target](point.outcome) for point in there], np.float64)


def _values(points: Sequence[Point], parameter: Parameter) -> np.ndarray:
    return np.array([point.values[parameter.name] for point in points], np.float64)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Optuna's line about every study that is made."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)

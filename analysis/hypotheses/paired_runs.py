"""Two routing statistics side by side: did the router treat the same token ids differently?

Letters: L layers, n token ids that both runs saw in a layer.

The pairs are token ids, each one pair however often it occurred; differences are second run minus first. Both tests
treat ids as independent. Holm's correction is over all layers and measures of one test. Consistency is not compared: it
is in sample and falls as an id's occurrences grow in number, so two runs of different size differ with the same router.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.special import ndtr, stdtr, stdtrit
from scipy.stats import rankdata

from analysis.hypotheses.criteria import MIN_KEYS, LayerValues, figure_of, holm
from varjax.errors import InputError
from varjax.stats import RoutingStats

MEASURES = {"entropy": "nats", "confidence": ""}  # name -> unit


@dataclass(frozen=True)
class PairedMeasure:
    """One figure of the common token ids in both runs."""

    name: str
    unit: str
    first: np.ndarray  # float64 [L], mean over the common ids
    second: np.ndarray  # float64 [L]
    difference: LayerValues  # mean of second - first; interval of Student's t; `left_out` are rows of the first run
    effect: np.ndarray  # float64 [L], mean difference over its standard deviation (Cohen's d of pairs)
    rank_effect: np.ndarray  # float64 [L], matched-pairs rank-biserial correlation, -1 to 1
    t_p: np.ndarray  # float64 [L], paired t-test, Holm
    wilcoxon_p: np.ndarray  # float64 [L], Wilcoxon's signed-rank test, normal approximation, Holm


def compare(stats: RoutingStats, other: RoutingStats) -> tuple[PairedMeasure, ...]:
    """Paired tests of mean entropy and confidence, per layer.

    Raises:
        InputError: the runs have different numbers of layers.
    """
    layers = len(stats.count)
    if len(other.count) != layers:
        raise InputError(
            f"the runs have {layers} and {len(other.count)} layers; compare statistics of the same layers of one model"
        )
    ours, theirs = (np.flatnonzero(one.row_orders == 1) for one in (stats, other))
    _, i, j = np.intersect1d(stats.keys[ours, -1], other.keys[theirs, -1], return_indices=True)
    ours, theirs = ours[i], theirs[j]
    made = [_measure(stats, other, ours, theirs, name) for name in MEASURES]
    t_p = holm(np.stack([one.t_p for one in made]))
    wilcoxon_p = holm(np.stack([one.wilcoxon_p for one in made]))
    return tuple(replace(one, t_p=t, wilcoxon_p=w) for one, t, w in zip(made, t_p, wilcoxon_p, strict=True))


def _measure(
    stats: RoutingStats, other: RoutingStats, ours: np.ndarray, theirs: np.ndarray, name: str
) -> PairedMeasure:
    """One figure of the common ids, at rows int64 [n] of each run; p values not yet corrected."""
    layers = len(stats.count)
    first, second, value, low, high, effect, rank_effect, t_p, wilcoxon_p = np.full((9, layers), np.nan)
    keys, left_out, reasons = np.zeros(layers, np.int64), [], []
    for layer in range(layers):
        both = (stats.count[layer, ours] > 0) & (other.count[layer, theirs] > 0)
        a, b = figure_of(stats, name)[layer, ours], figure_of(other, name)[layer, theirs]
        known = both & ~np.isnan(a) & ~np.isnan(b)
        left_out.append(ours[both & ~known])
        a, b = a[known], b[known]
        difference = b - a
        n = keys[layer] = len(difference)
        reason = ""
        if n < MIN_KEYS:
            reason = f"{n} common token ids with a known {name}, at least {MIN_KEYS} needed"
        elif np.ptp(difference) <= 1e-12 * max(1.0, np.abs(difference).max()):
            reason = f"every difference is {difference[0]:g}: nothing varies"
        reasons.append(reason)
        if reason:
            continue
        first[layer], second[layer], value[layer] = a.mean(), b.mean(), difference.mean()
        spread = difference.std(ddof=1)
        error = spread / np.sqrt(n)
        half = stdtrit(n - 1, 0.975) * error
        low[layer], high[layer] = value[layer] - half, value[layer] + half
        effect[layer] = value[layer] / spread
        t_p[layer] = 2 * stdtr(n - 1, -np.abs(value[layer]) / error)
        rank_effect[layer], wilcoxon_p[layer] = _signed_ranks(difference)
    values = LayerValues(value, low, high, keys, tuple(left_out), tuple(reasons))
    return PairedMeasure(name, MEASURES[name], first, second, values, effect, rank_effect, t_p, wilcoxon_p)


def _signed_ranks(difference: np.ndarray) -> tuple[float, float]:
    """Rank-biserial correlation and p of Wilcoxon's signed-rank test; differences of 0 are dropped (Wilcoxon 1945)."""
    moved = difference[difference != 0]
    ranks = rankdata(np.abs(moved))
    balance = np.sign(moved) @ ranks
    z = balance / np.sqrt(np.square(ranks).sum())  # exact variance, ties included
    return float(balance / ranks.sum()), float(2 * ndtr(-np.abs(z)))

"""Did two runs route the same token ids alike? Paired tests of mean entropy and confidence, per layer.

The pairs are token ids, each one pair however often it occurred; differences are second run minus first. Both tests
treat ids as independent. Consistency is not compared: it is in sample and falls as an id's occurrences grow in number,
so two runs of different size differ with the same router.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata, ttest_1samp, wilcoxon

from analysis.questions.by_layer import ALPHA, MIN_KEYS, UsedIds, figure_of, table
from analysis.questions.data import RoutingData, needs_routing
from analysis.questions.question import NotMeasuredError, Question
from analysis.report.report import Section
from analysis.resampling import holm
from varjax.errors import InputError
from varjax.stats import RoutingStats

MEASURES = {"entropy": "entropy [nats]", "confidence": "confidence"}  # name -> title of its table
COLUMNS = {  # name -> number format
    "first": ".4f",  # mean over the common ids in the first run
    "second": ".4f",
    "difference": "+.4f",  # mean of second - first
    "low": "+.4f",  # its interval, of Student's t
    "high": "+.4f",
    "d": "+.2f",  # mean difference over its standard deviation (Cohen's d of pairs)
    "rank r": "+.2f",  # matched-pairs rank-biserial correlation, -1 to 1
    "p, t-test": ".1e",  # Holm over all layers and measures
    "p, Wilcoxon": ".1e",  # signed-rank test, normal approximation, Holm
}


@dataclass(frozen=True)
class PairedMeasure:
    """One figure of the common token ids in both runs."""

    name: str  # one of MEASURES
    figures: dict[str, np.ndarray]  # by COLUMNS, float64 [L]; NaN where a layer cannot be tested
    used: UsedIds  # rows of the first run


def _compare(stats: RoutingStats, other: RoutingStats) -> tuple[PairedMeasure, ...]:
    """Paired tests of MEASURES; raises InputError if the runs have different numbers of layers."""
    layers = len(stats.count)
    if len(other.count) != layers:
        raise InputError(
            f"the runs have {layers} and {len(other.count)} layers; compare statistics of the same layers of one model"
        )
    ours, theirs = (np.flatnonzero(one.row_orders == 1) for one in (stats, other))
    _, i, j = np.intersect1d(stats.keys[ours, -1], other.keys[theirs, -1], return_indices=True)
    made = [_measure(stats, other, ours[i], theirs[j], name) for name in MEASURES]
    for test in ("p, t-test", "p, Wilcoxon"):
        for one, corrected in zip(made, holm(np.stack([one.figures[test] for one in made])), strict=True):
            one.figures[test] = corrected
    return tuple(made)


def _measure(
    stats: RoutingStats, other: RoutingStats, ours: np.ndarray, theirs: np.ndarray, name: str
) -> PairedMeasure:
    """One figure of the common ids, at rows int64 [n] of each run; p values not yet corrected."""
    figures = np.full((len(COLUMNS), len(stats.count)), np.nan)
    used, left_out, reasons = [], [], []
    for layer in range(len(stats.count)):
        both = (stats.count[layer, ours] > 0) & (other.count[layer, theirs] > 0)
        a, b = figure_of(stats, name)[layer, ours], figure_of(other, name)[layer, theirs]
        known = both & ~np.isnan(a) & ~np.isnan(b)
        used.append(ours[known])
        left_out.append(ours[both & ~known])
        a, b = a[known], b[known]
        difference = b - a
        reason = ""
        if len(difference) < MIN_KEYS:
            reason = f"{len(difference)} common token ids with a known {name}, at least {MIN_KEYS} needed"
        elif np.ptp(difference) <= 1e-12 * max(1.0, np.abs(difference).max()):
            reason = f"every difference is {difference[0]:g}: nothing varies"
        reasons.append(reason)
        if reason:
            continue
        t_test = ttest_1samp(difference, 0)
        interval = t_test.confidence_interval()
        # Differences of 0 are dropped (Wilcoxon 1945). SciPy's statistic has no sign, so the correlation is ours.
        moved = difference[difference != 0]
        ranks = rankdata(np.abs(moved))
        figures[:, layer] = (
            *(a.mean(), b.mean(), difference.mean(), interval.low, interval.high),
            *(difference.mean() / difference.std(ddof=1), np.sign(moved) @ ranks / ranks.sum()),
            *(t_test.pvalue, wilcoxon(moved, method="asymptotic").pvalue),
        )
    return PairedMeasure(name, dict(zip(COLUMNS, figures, strict=True)), UsedIds(used, left_out, reasons))


def _examine(data: RoutingData) -> Section:
    if data.other is None:
        raise NotMeasuredError("needs a second run: --compare OTHER.parquet")
    found = _compare(data.stats, data.other)
    shares = [f"{one.name} {np.sum(one.figures['p, t-test'] < ALPHA)} of {len(one.used.rows)}" for one in found]
    words = [
        f"Second run: {data.other_name}. Pairs are the token ids that both saw in a layer; differences are second "
        "minus first, with Student's 95% interval (token ids as if independent). d: mean difference over its standard "
        "deviation; rank r: rank-biserial correlation. Paired t-test and Wilcoxon's signed-rank test, each corrected "
        "by Holm over all layers and both figures.",
        *(f"{one.name}: {line}" for one in found for line in one.used.words(data, one.name)),
    ]
    tables = [
        table(MEASURES[one.name], {name: (one.figures[name], form) for name, form in COLUMNS.items()}, one.used)
        for one in found
    ]
    return QUESTION.section(
        "reported" if any(one.used.testable.any() for one in found) else "not testable",
        f"layers that differ (t-test, Holm, p < {ALPHA:g}): {', '.join(shares)}; no published bound",
        words,
        tables,
    )


QUESTION = Question("paired", "Two runs route the same token ids alike", _examine, needs_routing)

"""Are many tokens routed with low entropy? The distribution of mean gate entropy over token ids and occurrences."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from analysis.criteria import LOW_ENTROPY, MIN_LOW_SHARE
from analysis.questions import by_layer
from analysis.questions.data import RoutingData, needs_routing
from analysis.questions.drawn import LayerDraws
from analysis.questions.question import Question
from analysis.report.figures import MARKERS, heat_map, shade, subplots
from analysis.report.report import ReportFigure, Section
from analysis.resampling import ratio
from varjax.stats import RoutingStats

PERCENTILES = (5, 25, 50, 75, 95)
ENTROPIES = (0.5, 1.0, 1.5)  # nats, thresholds of the distribution
_LINES = 8  # layers that lines can still tell apart; more become a heat map
_BINS = 40  # of entropy, in the heat map


@dataclass(frozen=True)
class EntropyDistribution:
    """Mean gate entropy over token ids (kind 0) and over their occurrences (kind 1)."""

    below: tuple[
        by_layer.Values, by_layer.Values
    ]  # by kind: [L, thresholds], shares below each of ENTROPIES; Wilson intervals
    percentiles: np.ndarray  # float64 [kinds, L, PERCENTILES], nats
    mean: np.ndarray  # float64 [L], over occurrences
    used: by_layer.UsedIds


def _entropy_distribution(stats: RoutingStats) -> EntropyDistribution:
    """Percentiles, and shares below thresholds, of every layer."""
    used = by_layer.used_ids(stats, "entropy")
    layers = len(stats.count)
    percentiles = np.full((2, layers, len(PERCENTILES)), np.nan)
    shares = np.full((2, layers, len(ENTROPIES)), np.nan)
    effective = np.full((2, layers, 1), np.nan)
    mean = np.full(layers, np.nan)
    for layer in np.flatnonzero(used.testable).tolist():
        entropy, count = (one[layer, used.rows[layer]] for one in (stats.entropy.mean, stats.count))
        mean[layer] = np.average(entropy, weights=count)
        for kind, weight in enumerate((np.ones(len(entropy)), count.astype(np.float64))):
            percentiles[kind, layer] = _percentiles(entropy, weight)
            shares[kind, layer] = [weight[entropy < most].sum() / weight.sum() for most in ENTROPIES]
            effective[kind, layer] = weight.sum() ** 2 / np.square(weight).sum()
    ids, occurrences = map(by_layer.wilson, shares, effective)
    return EntropyDistribution((ids, occurrences), percentiles, mean, used)


def _percentiles(values: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The smallest value at or below which the percentile's part of the weight is, up to rounding of the sums."""
    order = np.argsort(values)
    reached = np.cumsum(weight[order]) / weight.sum()
    place = np.searchsorted(reached, np.array(PERCENTILES) / 100 - 1e-12)
    return values[order][np.minimum(place, len(values) - 1)]


def _drawn_ids(drawn: LayerDraws) -> np.ndarray:
    """Shares of ids below thresholds in each draw, float64 [B, thresholds]."""
    below = [np.sum(drawn.mean_entropy < most, axis=1) for most in ENTROPIES]
    return ratio(np.stack(below, axis=-1), drawn.block.ids[:, None])


def _drawn_occurrences(drawn: LayerDraws) -> np.ndarray:
    """Shares of occurrences below thresholds in each draw, float64 [B, thresholds]."""
    below = [np.sum(drawn.block.count, axis=1, where=drawn.mean_entropy < most) for most in ENTROPIES]
    return ratio(np.stack(below, axis=-1), drawn.block.total[:, None])


def _examine(data: RoutingData) -> Section:
    found = _entropy_distribution(data.stats)
    used, most = found.used, data.entropy.most
    ids = by_layer.over_documents(data, found.below[0], _drawn_ids)
    occurrences = by_layer.over_documents(data, found.below[1], _drawn_occurrences)
    low = ENTROPIES.index(LOW_ENTROPY)
    criterion = f"more than {MIN_LOW_SHARE:.0%} of token ids below {LOW_ENTROPY} nats"
    passed = ids.value[:, low] > MIN_LOW_SHARE
    verdict, outcome, verdicts = by_layer.verdict(data, used, passed, criterion, fails_are_valid=True)
    names = ("ids < 0.5", "low", "high", "occurrences < 0.5", "occ. low", "occ. high")
    of_both = (one[:, low] for one in (*ids, *occurrences))
    columns = {name: (values, by_layer.SHARE) for name, values in zip(names, of_both, strict=True)}
    columns |= {"mean": (found.mean, ".3f"), "of the most": (found.mean / most, by_layer.SHARE)}
    tables = [by_layer.table("Per layer", columns, used, verdicts)]
    kinds = zip(("token ids", "occurrences"), (ids, occurrences), found.percentiles, strict=True)
    for unit, shares, percentiles in kinds:
        columns = {f"{at} %": (values, ".3f") for at, values in zip(PERCENTILES, percentiles.T, strict=True)}
        columns |= {f"{name} of most": (values / most, form) for name, (values, form) in columns.items()}
        for at, nats in enumerate(ENTROPIES):
            for part, values in zip(("", " low", " high"), shares, strict=True):
                columns[f"< {nats}{part}"] = (values[:, at], by_layer.SHARE)
        tables.append(by_layer.table(f"Percentiles [nats, and of the most] and shares, over {unit}", columns))
    few = "For shares of ids, intervals are somewhat too narrow where documents are few."
    words = [
        "Mean gate entropy of each token id. The criterion is on token ids, as published; shares of occurrences are "
        f"shown for comparison. The largest possible entropy is {data.entropy.words}.",
        by_layer.WILSON if data.draws is None else f"{by_layer.NARROW_ENDS} {few}",
        *data.entropy.caution,
        *used.words(data, "mean entropy"),
    ]
    shown = [entropy_figure(data.stats, data.entropy.experts)] if used.testable.any() else []
    return QUESTION.section(verdict, outcome, words, tables, shown)


def entropy_figure(stats: RoutingStats, experts: int | None = None) -> ReportFigure:
    """Describe the figure of the distribution of gate entropy.

    Args:
        stats: routing statistics.
        experts: how many probabilities the entropy is of; None: of all experts.

    Returns:
        The figure, which is drawn later.
    """
    return ReportFigure(
        "entropy_distribution",
        "Distribution of gate entropy",
        "Lines: share of the occurrences whose id has at most this mean gate entropy; the earlier a line rises, the "
        "more certain the router of this layer is. Heat map (if there are many layers): darker where there are more "
        "occurrences. Dashed: 0.5, 1.0 and 1.5 nats.",
        "The figure shows means per id, not single tokens: an id that is routed with certainty only half of the time "
        "has a medium entropy.",
        lambda: _draw(stats, np.log(experts or stats.num_experts)),
    )


def _draw(stats: RoutingStats, most: float) -> Figure:
    layers = len(stats.count)
    used = by_layer.used_ids(stats, "entropy", 1)
    entropies = [stats.entropy.mean[layer, rows] for layer, rows in enumerate(used.rows)]
    bins = np.linspace(0, max(most, *(one.max(initial=1e-3) for one in entropies)), _BINS + 1)
    shares = np.full((layers, _BINS), np.nan)
    figure, axis = subplots(figsize=(5.2, 3.6 if layers <= _LINES else max(3.6, 0.16 * layers + 1.2)))
    for layer in np.flatnonzero(used.testable).tolist():
        entropy, weight = entropies[layer], stats.count[layer, used.rows[layer]]
        shares[layer] = np.histogram(np.clip(entropy, 0, bins[-1]), bins, weights=weight / weight.sum())[0]
        if layers <= _LINES:
            order = np.argsort(entropy)
            reached = np.cumsum(weight[order]) / weight.sum()
            style = {"marker": MARKERS[layer % len(MARKERS)], "markevery": 0.1, "markersize": 4}
            axis.plot(entropy[order], reached, label=f"layer {layer}", color=shade(layer, layers), **style)
    named = f"mean gate entropy of the token id [nats], at most {most:.2f}"
    if layers <= _LINES:
        axis.set(xlabel=named, ylabel="share of occurrences at or below", xlim=(0, None), ylim=(0, 1))
        if axis.lines:
            axis.legend(fontsize="small")
    else:
        image = heat_map(axis, shares, extent=(0, bins[-1], layers - 0.5, -0.5), vmin=0)
        figure.colorbar(image, label=f"share of occurrences per {bins[1]:.3f} nats")
        axis.set(xlabel=named, ylabel="layer")
    for threshold in ENTROPIES:
        if threshold <= bins[-1]:
            axis.axvline(threshold, color="0.4", linewidth=0.8, linestyle="--")
    axis.set_title(f"Gate entropy — {by_layer.size(stats)}", fontsize="medium")
    return figure


QUESTION = Question("entropy", "Many tokens are routed with low entropy", _examine, needs_routing)

"""What routing statistics are said to show, tested on token ids (keys of order 1), one layer at a time.

Letters: L layers, R rows (keys), n keys of a test, P percentiles, H entropy thresholds, F frequency thresholds.
Units: nats. Intervals and p values are two-sided, at 95 %; NaN stands where a layer cannot be tested.

A statistics file knows keys, not documents. So intervals treat token ids as independent draws; where shares are of
occurrences, their effective number (Kish: the square of the summed weights over the sum of squares) is used. Real
occurrences come in documents and depend on each other: these intervals are too narrow rather than too wide. Where the
documents are known, `analysis.hypotheses.document_intervals` replaces them.

A key with NaN among the figures that a test needs is left out of that test alone, and named. What cannot be tested
says why: a layer without rows, too few keys, a figure that is the same everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtr
from scipy.stats import rankdata

from analysis.criteria import LOW_ENTROPY, MAX_RHO, MIN_COVERED, MIN_LOW_SHARE
from varjax.config import PRESETS
from varjax.stats import RoutingStats

ALPHA = 0.05  # of p values, after Holm's correction over layers

MIN_KEYS = 10  # that a test needs
ZIPF_FREQUENCY = 10  # least frequency of the ranks that are fitted: rarer ids tie in long steps
TOP_IDS = (10, 100, 1000)  # published: the share of the occurrences that the most frequent token ids have
PERCENTILES = (5, 25, 50, 75, 95)
ENTROPIES = (0.5, 1.0, 1.5)  # nats, thresholds of the distribution
GRID_FREQUENCIES = (5, 10, 25, 50, 100, 200)
GRID_ENTROPIES = (0.1, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0)  # nats

Z95 = 1.959963984540054  # of the normal distribution, 97.5 %


@dataclass(frozen=True)
class LayerValues:
    """One figure per layer, and what it rests on."""

    value: np.ndarray  # float64 [L]
    low: np.ndarray  # float64 [L]
    high: np.ndarray  # float64 [L]
    keys: np.ndarray  # int64 [L], used
    left_out: tuple[np.ndarray, ...]  # per layer int64 [m], rows with NaN among the figures needed
    untestable: tuple[str, ...]  # per layer why nothing can be said, or ""

    @property
    def testable(self) -> np.ndarray:
        """bool [L]"""
        return np.array([not reason for reason in self.untestable], bool)


@dataclass(frozen=True)
class Zipf:
    """Frequency over rank. Frequencies are of the layer with the most finite outputs: routing has no part in them."""

    slope: float  # least squares of ln frequency on ln rank
    r_squared: float
    exponent: float  # the same on ln(rank - 1/2), sign turned: bias removed (Gabaix and Ibragimov 2011)
    low: float  # its interval, standard error exponent * sqrt(2 / ranks)
    high: float
    ranks: int  # 1 to this one
    least_frequency: int  # at the last rank
    untestable: str  # why nothing can be said of the fit above, or ""
    all_slope: float  # least squares over every id that occurs, as published; NaN where all occur equally often
    all_r_squared: float
    all_ranks: int  # ids that occur
    top_shares: dict[int, float]  # by number of TOP_IDS: share of all occurrences that fall on the most frequent ids


@dataclass(frozen=True)
class Correlation:
    """Spearman's rho of frequency and mean gate entropy."""

    rho: LayerValues  # interval: Bonett and Wright 2000
    p: np.ndarray  # float64 [L], of rho = 0, Student's t
    p_holm: np.ndarray  # float64 [L], over layers
    passed: np.ndarray  # bool [L], rho < MAX_RHO, whatever p


@dataclass(frozen=True)
class EntropyDistribution:
    """Mean gate entropy over token ids and over their occurrences."""

    under_ids: dict[float, LayerValues]  # threshold of ENTROPIES -> share of token ids below it; Wilson
    under_occurrences: dict[float, LayerValues]  # share of occurrences; Wilson with the effective number
    ids: np.ndarray  # float64 [L, P], percentiles in nats
    occurrences: np.ndarray  # float64 [L, P]
    mean: np.ndarray  # float64 [L], over occurrences
    passed: np.ndarray  # bool [L], share of ids > MIN_LOW_SHARE


@dataclass(frozen=True)
class Coverage:
    """Share of occurrences at token ids that are frequent enough and sure enough, of all occurrences in the layer."""

    presets: dict[str, LayerValues]  # by the names of varjax.config.PRESETS
    grid: np.ndarray  # float64 [L, F, H]: frequency >= GRID_FREQUENCIES[f] and entropy <= GRID_ENTROPIES[h]
    unknown: np.ndarray  # float64 [L], share of occurrences at ids whose entropy is NaN
    passed: np.ndarray  # bool [L], balanced preset > MIN_COVERED


def zipf(stats: RoutingStats) -> Zipf:
    """Fit ln frequency on ln rank, from rank 1 to the last token id with at least ZIPF_FREQUENCY occurrences.

    Next to it the figures of the published report: the same fit over all ids, and the share of the occurrences at the
    most frequent ids. Where fewer ids than that are keys, the share is known only if no occurrence is elsewhere.

    A caution that belongs beside every such fit: ranks are sorted by what they explain, so R^2 is close to 1 for many
    laws that are not Zipf's, and the usual standard error of the slope is far too small.
    """
    every = np.sort(stats.count[:, stats.row_orders == 1].max(axis=0, initial=0))[::-1]
    every = every[every > 0]
    published = (*_published_fit(every), len(every), _top_shares(stats, every))
    frequency = every[every >= ZIPF_FREQUENCY]
    ranks = len(frequency)
    least = int(frequency[-1]) if ranks else 0
    reason = ""
    if ranks < MIN_KEYS:
        reason = f"{ranks} token ids with {ZIPF_FREQUENCY} or more occurrences, at least {MIN_KEYS} needed"
    elif frequency[0] == frequency[-1]:
        reason = f"every token id occurs {least} times"
    if reason:
        return Zipf(np.nan, np.nan, np.nan, np.nan, np.nan, ranks, least, reason, *published)
    slope, r_squared, exponent = zipf_fit(frequency)
    half = Z95 * exponent * np.sqrt(2 / ranks)
    return Zipf(slope, r_squared, exponent, exponent - half, exponent + half, ranks, least, "", *published)


def zipf_fit(frequency: np.ndarray) -> tuple[float, float, float]:
    """Slope, R^2 and exponent, as in `Zipf`, of falling frequencies [ranks] of which not all are the same."""
    rank, y = np.arange(1, len(frequency) + 1), np.log(frequency)
    slope, r_squared = _line(np.log(rank), y)
    return slope, r_squared, -_line(np.log(rank - 0.5), y)[0]


def _published_fit(frequency: np.ndarray) -> tuple[float, float]:
    """Slope and R^2 over falling frequencies [ids]; NaN where there is no line to fit."""
    if len(frequency) < MIN_KEYS or frequency[0] == frequency[-1]:
        return np.nan, np.nan
    return zipf_fit(frequency)[:2]


def _top_shares(stats: RoutingStats, frequency: np.ndarray) -> dict[int, float]:
    """By number of TOP_IDS, the share of all occurrences at the first of falling frequencies [ids]; NaN: not known."""
    whole = max(stats.tokens - int(stats.nonfinite.min(initial=0)), int(frequency.sum()))
    known = {most: most <= len(frequency) or whole == frequency.sum() for most in TOP_IDS}
    return {most: float(frequency[:most].sum() / whole) if known[most] and whole else np.nan for most in TOP_IDS}


def frequency_entropy(stats: RoutingStats) -> Correlation:
    """Spearman's rho per layer. Published: frequent tokens are routed more surely, rho < -0.4."""
    rows = [usable(stats, layer, ("entropy",)) for layer in range(len(stats.count))]
    rho, p = (np.full(len(rows), np.nan) for _ in range(2))
    reasons = []
    for layer, (used, _) in enumerate(rows):
        frequency, entropy = stats.count[layer, used], stats.entropy.mean[layer, used]
        reason = too_few(stats, layer, used, "entropy")
        for name, values in (("frequency", frequency), ("mean entropy", entropy)):
            if not reason and np.all(values == values[0]):
                reason = f"every {name} is {values[0]:g}: no ranks to compare"
        reasons.append(reason)
        if not reason:
            rho[layer] = np.clip(np.corrcoef(rankdata(frequency), rankdata(entropy))[0, 1], -1, 1)
            freedom = len(used) - 2
            t = np.abs(rho[layer]) * np.sqrt(freedom / max(1 - rho[layer] ** 2, 1e-15))
            p[layer] = 2 * stdtr(freedom, -t)
    keys = np.array([len(used) for used, _ in rows])
    inside = np.clip(rho, -1 + 1e-12, 1 - 1e-12)
    half = Z95 * np.sqrt((1 + inside**2 / 2) / np.maximum(keys - 3, 1))
    low, high = np.tanh(np.arctanh(inside) - half), np.tanh(np.arctanh(inside) + half)
    values = LayerValues(rho, low, high, keys, tuple(out for _, out in rows), tuple(reasons))
    return Correlation(values, p, holm(p), rho < MAX_RHO)


def entropy_distribution(stats: RoutingStats) -> EntropyDistribution:
    """Percentiles and shares per layer. Published: more than 30 % of the tokens have entropy below 0.5 nats."""
    layers = len(stats.count)
    rows = [usable(stats, layer, ("entropy",)) for layer in range(layers)]
    reasons = tuple(too_few(stats, layer, used, "entropy") for layer, (used, _) in enumerate(rows))
    percentiles = np.full((2, layers, len(PERCENTILES)), np.nan)  # of ids, of occurrences
    shares = np.full((2, layers, len(ENTROPIES)), np.nan)
    effective = np.full((2, layers), np.nan)
    mean = np.full(layers, np.nan)
    for layer, (used, _) in enumerate(rows):
        if reasons[layer]:
            continue
        entropy, count = stats.entropy.mean[layer, used], stats.count[layer, used].astype(np.float64)
        mean[layer] = np.average(entropy, weights=count)
        for kind, weight in enumerate((np.ones(len(used)), count)):
            percentiles[kind, layer] = _percentiles(entropy, weight)
            shares[kind, layer] = [weight[entropy < most].sum() / weight.sum() for most in ENTROPIES]
            effective[kind, layer] = weight.sum() ** 2 / np.square(weight).sum()
    keys, left_out = np.array([len(used) for used, _ in rows]), tuple(out for _, out in rows)
    under_ids, under_occurrences = (
        {
            threshold: LayerValues(share[:, at], *wilson(share[:, at], number), keys, left_out, reasons)
            for at, threshold in enumerate(ENTROPIES)
        }
        for share, number in zip(shares, effective, strict=True)
    )
    return EntropyDistribution(
        under_ids=under_ids,
        under_occurrences=under_occurrences,
        ids=percentiles[0],
        occurrences=percentiles[1],
        mean=mean,
        passed=under_ids[LOW_ENTROPY].value > MIN_LOW_SHARE,
    )


def coverage(stats: RoutingStats) -> Coverage:
    """Fast-path coverage per layer. Published: more than 40 % of the occurrences, thresholds of the balanced preset.

    The whole is every token that the layer routed, ids that are no key included. An id whose entropy is NaN passes no
    threshold, as in a table; its occurrences stay in the whole, and `unknown` says how many they are.
    """
    layers = len(stats.count)
    rows = [usable(stats, layer, ("entropy",)) for layer in range(layers)]
    reasons = tuple(too_few(stats, layer, used, "entropy", 1) for layer, (used, _) in enumerate(rows))
    known = np.where(stats.row_orders == 1, stats.count, 0)
    whole = np.maximum(stats.tokens - stats.nonfinite, known.sum(axis=1)).astype(np.float64)
    testable = np.array([not reason for reason in reasons], bool)

    def covered(least: float, most: float) -> np.ndarray:
        """float64 [L]"""
        inside = (known >= least) & (stats.entropy.mean <= most)  # NaN is not
        return np.where(testable, np.sum(known * inside, axis=1) / np.maximum(whole, 1), np.nan)

    # Tokens at ids that are no key are counted as ids of their own, seen once.
    squares = np.square(known.astype(np.float64)).sum(axis=1) + whole - known.sum(axis=1)
    effective = np.maximum(np.square(whole) / np.maximum(squares, 1), 1)
    keys, left_out = np.array([len(used) for used, _ in rows]), tuple(out for _, out in rows)
    presets = {}
    for name, preset in PRESETS.items():
        share = covered(preset["frequency_threshold"], preset["entropy_threshold"])
        presets[name] = LayerValues(share, *wilson(share, effective), keys, left_out, reasons)
    grid = np.array([[covered(least, most) for most in GRID_ENTROPIES] for least in GRID_FREQUENCIES])
    unknown = np.sum(known * np.isnan(stats.entropy.mean), axis=1) / np.maximum(whole, 1)
    return Coverage(presets, np.moveaxis(grid, -1, 0), unknown, presets["balanced"].value > MIN_COVERED)


def covered_by_ids(stats: RoutingStats) -> float:
    """Share of all occurrences at token ids that are keys, the rest being too rare for one; NaN without tokens."""
    absent = sum(int(stats.absent[at]) for at, order in enumerate(stats.ngram_orders) if order == 1)
    return 1 - absent / stats.tokens if stats.tokens and 1 in stats.ngram_orders else float("nan")


def figure_of(stats: RoutingStats, name: str) -> np.ndarray:
    """float64 [L, R]: mean `entropy`, mean `confidence` or `consistency` of each key; NaN where it is not known."""
    if name == "consistency":  # without any first choice a key's consistency was missing in the file
        return np.where(stats.top1_counts.any(axis=-1), stats.routing_consistency, np.nan)
    return getattr(stats, name).mean


def usable(stats: RoutingStats, layer: int, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The token ids that occurred in a layer: int64 [n] rows with all figures, int64 [m] rows with NaN among them."""
    seen = np.flatnonzero((stats.row_orders == 1) & (stats.count[layer] > 0))
    missing = np.any([np.isnan(figure_of(stats, name)[layer, seen]) for name in names], axis=0)
    return seen[~missing], seen[missing]


def too_few(stats: RoutingStats, layer: int, used: np.ndarray, name: str, least: int = MIN_KEYS) -> str:
    """Why rows int64 [n] of a layer are not enough for a test of a figure, or ""."""
    if len(used) >= least:
        return ""
    seen = int(np.sum((stats.row_orders == 1) & (stats.count[layer] > 0)))
    if seen == 0:
        missing = stats.count.any() and not stats.count[layer].any()
        return "not captured: it has no rows, though other layers have" if missing else "no rows of single token ids"
    with_figure = f" with a known {name}" if len(used) < seen else ""
    return f"{len(used)} of {seen} token ids{with_figure}, at least {least} needed"


def holm(p: np.ndarray) -> np.ndarray:
    """p values [...] corrected for their number (Holm 1979): any false alarm at all is as rare as the level says.

    NaN, a test that was not made, stays NaN and is not counted.
    """
    tested = p[~np.isnan(p)]
    order = np.argsort(tested)
    stepped = np.maximum.accumulate(tested[order] * np.arange(len(tested), 0, -1))
    corrected = np.empty_like(tested)
    corrected[order] = np.minimum(stepped, 1)
    out = np.full(p.shape, np.nan)
    out[~np.isnan(p)] = corrected
    return out


def wilson(share: np.ndarray, number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of shares [...] of an (effective) number of draws [...] (Wilson 1927)."""
    z2 = Z95**2 / number
    middle = (share + z2 / 2) / (1 + z2)
    half = Z95 / (1 + z2) * np.sqrt(share * (1 - share) / number + z2 / (4 * number))
    return np.clip(middle - half, 0, share), np.clip(middle + half, share, 1)  # rounding at 0 and 1


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Slope and R^2 of the least-squares line."""
    dx, dy = x - x.mean(), y - y.mean()
    slope = (dx @ dy) / (dx @ dx)
    return float(slope), float((dx @ dy) ** 2 / ((dx @ dx) * (dy @ dy)))


def _percentiles(values: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """float64 [P]: the least value at or below which the percentile's part of the weight lies."""
    order = np.argsort(values)
    reached = np.cumsum(weight[order]) / weight.sum()
    place = np.searchsorted(reached, np.array(PERCENTILES) / 100 - 1e-12)
    return values[order][np.minimum(place, len(values) - 1)]

"""Does the frequency of token ids follow Zipf's law? A line through ln frequency over ln rank."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import linregress

from analysis.questions.by_layer import MIN_KEYS, SHARE, Z95
from analysis.questions.data import RoutingData
from analysis.questions.drawn import Block, interval
from analysis.questions.question import Question
from analysis.report.report import Column, Section, Table
from varjax.stats import RoutingStats

ZIPF_FREQUENCY = 10  # smallest frequency of the ranks that are fitted: rarer ids have ties over long steps
TOP_IDS = (10, 100, 1000)  # published: the share of the occurrences that the most frequent token ids have


@dataclass(frozen=True)
class Zipf:
    """Frequency over rank. Frequencies are of the layer with the most finite outputs: routing has no influence on them.

    R² is near 1 for many laws that are not Zipf's, because ranks are sorted by what they explain. For the same reason
    the usual standard error of the slope is far too small.
    """

    ranks: int  # 1 to this one
    least_frequency: int  # at the last rank
    untestable: str  # why nothing can be said of the next five, or ""
    slope: float = np.nan  # least squares of ln frequency on ln rank
    r_squared: float = np.nan
    exponent: float = np.nan  # minus the slope on ln(rank - 1/2), which removes bias (Gabaix and Ibragimov 2011)
    low: float = np.nan  # its interval, standard error exponent * sqrt(2 / ranks)
    high: float = np.nan
    all_slope: float = np.nan  # least squares over every id that occurs, as published
    all_r_squared: float = np.nan
    all_ranks: int = 0  # ids that occur
    top_shares: tuple[float, ...] = ()  # share of all occurrences at the most frequent TOP_IDS; NaN: not known


def _zipf(stats: RoutingStats) -> Zipf:
    """Fit ln frequency on ln rank, from rank 1 to the last id with ZIPF_FREQUENCY occurrences; and as published."""
    every = np.sort(stats.count[:, stats.row_orders == 1].max(axis=0, initial=0))[::-1]
    every = every[every > 0]
    frequency = every[every >= ZIPF_FREQUENCY]
    ranks = len(frequency)
    least = int(frequency[-1]) if ranks else 0
    whole = max(stats.tokens - int(stats.nonfinite.min(initial=0)), int(every.sum()))
    known = [whole > 0 and (most <= len(every) or whole == every.sum()) for most in TOP_IDS]
    shares = [every[:most].sum() / whole if fine else np.nan for most, fine in zip(TOP_IDS, known, strict=True)]
    all_slope, all_r_squared, _ = _zipf_fit(every)
    reason = ""
    if ranks < MIN_KEYS:
        reason = f"{ranks} token ids with {ZIPF_FREQUENCY} or more occurrences, at least {MIN_KEYS} needed"
    elif frequency[0] == frequency[-1]:
        reason = f"every token id occurs {least} times"
    slope, r_squared, exponent = _zipf_fit(frequency)
    half = Z95 * exponent * np.sqrt(2 / max(ranks, 1))
    fit = (slope, r_squared, exponent, exponent - half, exponent + half)
    return Zipf(ranks, least, reason, *fit, all_slope, all_r_squared, len(every), tuple(map(float, shares)))


def _zipf_fit(frequency: np.ndarray) -> tuple[float, float, float]:
    """Slope, R² and exponent as in `Zipf` of falling frequencies; NaN for fewer than MIN_KEYS or equal ones."""
    if len(frequency) < MIN_KEYS or frequency[0] == frequency[-1]:
        return np.nan, np.nan, np.nan
    rank, y = np.arange(1, len(frequency) + 1), np.log(frequency)
    line = linregress(np.log(rank), y)
    return float(line.slope), float(line.rvalue**2), -float(linregress(np.log(rank - 0.5), y).slope)


def _drawn_exponents(block: Block) -> np.ndarray:
    """Exponent in each draw, float64 [B]."""
    return np.array([_zipf_fit(np.sort(count[count >= ZIPF_FREQUENCY])[::-1])[2] for count in block.count])


def _examine(data: RoutingData) -> Section:
    found = _zipf(data.stats)
    if data.draws is not None:
        drawn = np.concatenate([_drawn_exponents(block) for block in data.draws.blocks])
        low, high = interval(np.array(found.exponent), drawn)
        found = replace(found, low=float(low), high=float(high))
    published = Table(
        "As in the published report: the fit over all ids, and the share of occurrences at the most frequent ids",
        (
            *(Column("ids", ","), Column("slope", ".4f"), Column("R²", ".4f")),
            *(Column(f"share at the {most:,} most frequent", SHARE) for most in TOP_IDS),
        ),
        ((found.all_ranks, found.all_slope, found.all_r_squared, *found.top_shares),),
    )
    as_published = (
        "The published report fits all ids. Ids seen a few times have ties over long steps, which dominate that fit. A "
        "share is unknown where fewer ids than it asks for are keys."
    )
    if found.untestable:
        return QUESTION.section("not testable", found.untestable, [as_published], [published])
    fit = Table(
        "",
        (
            *(Column(name, ".4f") for name in ("slope", "R²", "exponent", "low", "high")),
            *(Column(name, ",") for name in ("ranks", "least frequency")),
        ),
        ((found.slope, found.r_squared, found.exponent, found.low, found.high, found.ranks, found.least_frequency),),
    )
    outcome = (
        f"slope {found.slope:.3f}, R² {found.r_squared:.3f} (over all ids {found.all_slope:.3f}, "
        f"{found.all_r_squared:.3f}); exponent {found.exponent:.3f} [{found.low:.3f}, {found.high:.3f}]; "
        "no published bound"
    )
    words = [
        f"Least squares of ln frequency on ln rank over the {found.ranks:,} ids seen {ZIPF_FREQUENCY} times or more. "
        "The exponent is the fit on ln(rank - 1/2) (Gabaix and Ibragimov 2011).",
        "Caution: ranks are sorted by the very frequency that they explain, so R² is near 1 for many laws that are not "
        "Zipf's.",
        *(["Interval: exponent · (1 ± 1.96 √(2/ranks))."] if data.draws is None else []),
        as_published,
    ]
    return QUESTION.section("reported", outcome, words, [fit, published])


QUESTION = Question("zipf", "Frequency follows Zipf's law", _examine)

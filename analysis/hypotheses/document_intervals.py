"""Intervals of the tests on statistics where the documents are known: a bootstrap that draws whole documents.

Letters: L layers, S bootstrap draws.

**The interval is the percentile interval of the draws, moved so that their mean is the point.** Unmoved it fails: a
draw has the tokens of 63 % of the documents, some of them twice. Rare ids vanish, and the occurrences of those that
stay are copies of each other, so that ids are more consistent in *every* draw than in the text. What is covered is the
figure that texts of as many documents have on average, not the one of an endless text: consistency in sample falls as
text grows, and the null beside it says how much of it is chance.

Simulated (documents with topics, favorite experts and an entropy of their own; 200 texts of 60 documents and 100 of
300, some 120 tokens each; nominal 95 %), the interval held that figure in so many cases:

| figure | 60 documents: moved, percentile, basic | 300 documents |
|---|---|---|
| Zipf exponent | 0.99, 0.07, 0.14 | 0.89, 0.93, 0.65 |
| Spearman's rho | 1.00, 1.00, 0.99 | 0.95, 0.89, 0.76 |
| share of ids under a threshold | 0.82-0.92, 0.76-0.88, 0.68-0.82 | 0.88-0.96, 0.54-0.86, 0.49-0.84 |
| share of occurrences under a threshold | 0.93-0.94, 0.92-0.96, 0.55-0.88 | 0.93-0.95, 0.90-0.94, 0.37-0.85 |
| coverage of a preset | 0.92-0.97, 0.96-0.97, 0.44-0.92 | 0.93-0.94, 0.93-0.96, 0.35-0.66 |
| consistency, all ids | 0.93, 0.00, 0.00 | 0.98, 0.00, 0.00 |
| consistency, all occurrences | 0.99, 0.00, 0.00 | 0.97, 0.00, 0.00 |
| consistency, most frequent ids | 0.96, 0.90, 0.70 | 0.99, 0.99, 0.96 |
| consistency, a decile | 0.86-1.00, 0.00-1.00, 0.00-1.00 | 0.90-1.00, 0.00-1.00, 0.00-0.94 |

So a moved interval is somewhat too narrow for shares of ids (those seen once share the mood of their document, which a
draw can only repeat) and for a decile in which nearly all ids are seen once, and rather too wide for rho and for the
consistency of frequent ids. A share of 0 or 1 hardly moves in any draw: its interval is too narrow, often a point.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from analysis.hypotheses.consistency import Consistency
from analysis.hypotheses.criteria import (
    ENTROPIES,
    MIN_KEYS,
    Correlation,
    Coverage,
    EntropyDistribution,
    LayerValues,
    Zipf,
)
from analysis.hypotheses.document_draws import Draws
from analysis.resampling import LEVEL
from varjax.config import PRESETS

Name = TypeVar("Name", str, float)


def interval(
    point: np.ndarray, draws: np.ndarray, least: float = -np.inf, most: float = np.inf
) -> tuple[np.ndarray, np.ndarray]:
    """Low and high [...]: 95 % percentile interval of draws [S, ...], moved so that their mean is the point [...].

    It holds its point, and stays between the least and the most that the figure can be. NaN where there is no point,
    or fewer than two draws have a figure.
    """
    known = np.isfinite(draws)
    missing = (known.sum(axis=0) < 2) | ~np.isfinite(point)
    draws = np.where(missing, 0, draws)  # nanquantile warns where there is nothing
    low, high = np.nanquantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    bias = np.nanmean(draws, axis=0) - point
    low, high = np.minimum(np.maximum(low - bias, least), point), np.maximum(np.minimum(high - bias, most), point)
    return np.where(missing, np.nan, low), np.where(missing, np.nan, high)


def zipf_over_documents(found: Zipf, draws: Draws) -> Zipf:
    """The result with the interval of the draws in place of its own; points and verdicts stay."""
    low, high = interval(np.array(found.exponent), draws.zipf)
    return replace(found, low=float(low), high=float(high))


def correlation_over_documents(found: Correlation, draws: Draws) -> Correlation:
    """As `zipf_over_documents`."""
    return replace(found, rho=_layer_values(found.rho, draws.rho, -1))


def entropy_over_documents(found: EntropyDistribution, draws: Draws) -> EntropyDistribution:
    """As `zipf_over_documents`."""
    return replace(
        found,
        under_ids=_by_name(found.under_ids, draws.under_ids, ENTROPIES),
        under_occurrences=_by_name(found.under_occurrences, draws.under_occurrences, ENTROPIES),
    )


def coverage_over_documents(found: Coverage, draws: Draws) -> Coverage:
    """As `zipf_over_documents`."""
    return replace(found, presets=_by_name(found.presets, draws.presets, tuple(PRESETS)))


def consistency_over_documents(found: Consistency, draws: Draws) -> Consistency:
    """As `zipf_over_documents`; the null stays as well, and groups of few ids stay without an interval."""
    low, high = interval(np.where(found.keys < MIN_KEYS, np.nan, found.value), draws.consistency, 0, 1)
    return replace(found, low=low, high=high)


def _by_name(values: Mapping[Name, LayerValues], draws: np.ndarray, names: Sequence[Name]) -> dict[Name, LayerValues]:
    """Shares by name with the interval of the draws [S, L, names]."""
    return {name: _layer_values(one, draws[..., names.index(name)], 0) for name, one in values.items()}


def _layer_values(values: LayerValues, draws: np.ndarray, least: float) -> LayerValues:
    low, high = interval(values.value, draws, least, 1)
    return replace(values, low=low, high=high)

"""Intervals of figures on routing statistics whose documents are known: a bootstrap that draws whole documents.

Letters: D documents, R token ids, E experts, L layers, S bootstrap draws, B draws of a block.

A draw is a weight per document (how often it was drawn). The tests look at sums over documents, so a draw's counts,
entropy sums and first choices per token id are a sparse matrix [ids, documents] times its weights. Every figure is
recomputed from them: ids that a draw does not contain are absent, ranks and deciles are those of the draw.

**The interval is the percentile interval of the draws, shifted so that their mean is the estimate.** Unshifted it
fails: a draw has the tokens of 63% of the documents, some of them twice, so rare ids vanish, the others repeat, and
ids are more consistent in *every* draw than in the text. The interval covers the figure that texts of as many documents
have on average. docs/phase1.md has the coverage that simulations found.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, cached_property

import numpy as np
from scipy.sparse import csr_array
from scipy.stats import rankdata

from analysis.resampling import LEVEL, document_counts
from analysis.traces.statistics import gate_entropy
from analysis.traces.trace import Trace
from varjax.progress import progress_bar

SAMPLES = 200  # draws; five are beyond each end of an interval
_DRAWN = 1 << 24  # floats that the sums of one block of draws may take


class Block:
    """A few draws, and what all layers share of them."""

    def __init__(self, occurrences: csr_array, weights: np.ndarray):
        self.weights = np.ascontiguousarray(weights.T)  # float64 [D, B]
        self.count = np.ascontiguousarray((occurrences @ self.weights).T)  # float64 [B, R], 0: absent from the draw
        self.ids = np.sum(self.count > 0, axis=1)  # int64 [B], not absent
        self.total = self.count.sum(axis=1)  # float64 [B], occurrences

    @cached_property
    def order(self) -> np.ndarray:
        """Ids by rising count, absent ones first, int64 [B, R]."""
        return np.argsort(self.count, axis=1, kind="stable")

    @cached_property
    def rank(self) -> np.ndarray:
        """Rank of the count, ties by the mean of their places, float64 [B, R]; 0: absent."""
        return _ranks(np.where(self.count > 0, self.count, np.inf))


class LayerDraws:
    """A block of draws in one layer."""

    def __init__(self, block: Block, entropy: csr_array, chosen: Callable[[], tuple[csr_array, np.ndarray]]):
        self.block, self._entropy, self._chosen = block, entropy, chosen

    @cached_property
    def mean_entropy(self) -> np.ndarray:
        """Mean entropy, float64 [B, R]: infinite (above every threshold) where an id is absent; NaN: not known."""
        count = self.block.count
        mean = np.full(count.shape, np.inf)
        return np.divide((self._entropy @ self.block.weights).T, count, out=mean, where=count > 0)

    @cached_property
    def entropy_rank(self) -> np.ndarray:
        """Rank of the mean entropy, as that of the count, float64 [B, R]."""
        return np.where(self.block.count > 0, _ranks(self.mean_entropy), 0)

    @cached_property
    def largest(self) -> np.ndarray:
        """Occurrences of each id's most common first choice, float64 [B, R]."""
        chosen, first = self._chosen()
        if not len(first):
            return self.block.count
        return np.ascontiguousarray(np.maximum.reduceat(chosen @ self.block.weights, first, axis=0).T)


class DocumentDraws:
    """Bootstrap draws of the documents of a trace, from which figures on its statistics are recomputed.

    Args:
        trace: what the statistics were computed from, with D documents that have tokens.
        weights: float64 [S, D], how often each document was drawn; None: as `samples` and `seed` say. From a single
            document, which says nothing about others, the draws are empty and all figures NaN.
        samples: S, the number of draws.
        seed: of the draws.
        progress: show bars on standard error.
    """

    def __init__(
        self,
        trace: Trace,
        weights: np.ndarray | None = None,
        samples: int = SAMPLES,
        seed: int = 0,
        progress: bool = False,
    ):
        self._trace, self._progress = trace, progress
        different, self._document = np.unique(trace.document, return_inverse=True)
        self.documents = len(different)
        if weights is None:
            drawn = self.documents > 1
            weights = document_counts(len(different), samples, seed) if drawn else np.zeros((samples, len(different)))
        self.samples = len(weights)
        token_ids, self._row = np.unique(trace.token_id, return_inverse=True)  # ties of frequency go by id, as in keys
        self._ids = len(token_ids)
        occurrences = self._sums(self._row, np.ones(len(self._row)), self._ids)
        size = max(1, _DRAWN // max(1, min(len(self._row), self._ids * trace.num_experts)))
        self.blocks = [Block(occurrences, weights[start : start + size]) for start in range(0, self.samples, size)]

    def by_layer(self, statistic: Callable[[LayerDraws], np.ndarray]) -> np.ndarray:
        """Compute a figure in every layer.

        Args:
            statistic: of one layer in a block of draws, float64 [B, ...].

        Returns:
            float64 [S, L, ...].
        """
        layers = progress_bar(range(self._trace.num_layers), unit="layer", desc="intervals", show=self._progress)
        return np.stack([self._layer(layer, statistic) for layer in layers], axis=1)

    def _sums(self, row: np.ndarray, values: np.ndarray, rows: int) -> csr_array:
        """Sums of values [N] of the tokens of one row (token id, or id and expert) in one document, [rows, D]."""
        return csr_array((values, (row, self._document)), shape=(rows, self.documents))  # adds values of equal places

    def _layer(self, layer: int, statistic: Callable[[LayerDraws], np.ndarray]) -> np.ndarray:
        entropy = self._sums(self._row, gate_entropy(self._trace, layer), self._ids)
        experts = self._trace.num_experts

        @cache  # once for all blocks, and only where a statistic needs it
        def first_choices() -> tuple[csr_array, np.ndarray]:
            """First choices [id and expert, D], and the first row of each id, int64 [R]."""
            first = np.maximum(self._trace.experts[:, layer, 0], 0)  # a layer that was not captured has no figure
            choice, which = np.unique(self._row * experts + first, return_inverse=True)
            return self._sums(which, np.ones(len(which)), len(choice)), np.searchsorted(
                choice, np.arange(self._ids) * experts
            )

        return np.concatenate([statistic(LayerDraws(block, entropy, first_choices)) for block in self.blocks])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1 within each row, ties by the mean of their places, float64 [B, R]; 0 where not finite."""
    finite = np.isfinite(values)
    return np.where(finite, rankdata(np.where(finite, values, np.inf), axis=1), 0)


def interval(
    point: np.ndarray, draws: np.ndarray, least: float = -np.inf, most: float = np.inf
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the 95% percentile interval of draws, shifted so that their mean is the estimate.

    Args:
        point: the estimate, [...].
        draws: float64 [S, ...]; NaN where a draw has no figure.
        least: the smallest possible value.
        most: the largest possible value.

    Returns:
        Low and high [...], which contain the estimate; NaN where there is no estimate or fewer than two draws.
    """
    known = np.isfinite(draws)
    missing = (known.sum(axis=0) < 2) | ~np.isfinite(point)
    draws = np.where(missing, 0, draws)  # nanquantile warns where there is nothing
    low, high = np.nanquantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    bias = np.nanmean(draws, axis=0) - point
    low, high = np.minimum(np.maximum(low - bias, least), point), np.maximum(np.minimum(high - bias, most), point)
    return np.where(missing, np.nan, low), np.where(missing, np.nan, high)

"""The figures of the tests on statistics, in bootstrap draws of whole documents of a trace.

Letters: N tokens, D documents, R token ids, E experts, L layers, S bootstrap draws, B draws of a block, H entropy
thresholds, P presets, G groups of token ids.

A draw is a weight per document (how often it was drawn). What the tests look at are sums over documents, so a draw's
counts, entropy sums and first choices per token id are a sparse matrix [ids, documents] times its weights, and every
figure is computed anew from them: ids that the draw did not meet are absent, ranks and deciles are those of the draw.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.sparse import csr_array

from analysis.hypotheses.consistency import DECILES, TOP
from analysis.hypotheses.criteria import ENTROPIES, MIN_KEYS, ZIPF_FREQUENCY, zipf_fit
from analysis.resampling import ratio
from analysis.traces.statistics import gate_entropy
from analysis.traces.trace import Trace
from varjax.config import PRESETS
from varjax.progress import progress_bar

SAMPLES = 200  # draws; five lie beyond each end of an interval
_DRAWN = 1 << 24  # floats that the sums of one block of draws may take


@dataclass(frozen=True)
class Draws:
    """The figures of the tests in every bootstrap draw; NaN where a draw has none.

    Where entropy is not known, shares under a threshold are 0: the text itself has no such figure either.
    """

    documents: int  # D
    zipf: np.ndarray  # float64 [S], exponent
    rho: np.ndarray  # float64 [S, L]
    under_ids: np.ndarray  # float64 [S, L, H], shares below each of ENTROPIES
    under_occurrences: np.ndarray  # float64 [S, L, H]
    presets: np.ndarray  # float64 [S, L, P], coverage by each of PRESETS
    consistency: np.ndarray  # float64 [S, L, G], groups as in `Consistency`

    @property
    def samples(self) -> int:
        """S"""
        return len(self.zipf)


def draw_documents(trace: Trace, samples: int = SAMPLES, seed: int = 0, progress: bool = False) -> Draws:
    """The figures of the tests on `trace_statistics(trace)`, in draws of the trace's documents with replacement.

    One document says nothing about others: the draws are empty then, and all figures NaN.

    Args:
        progress: show a bar on standard error.
    """
    documents, document = np.unique(trace.document, return_inverse=True)
    number = len(documents)
    weights = np.zeros((samples, number))
    if number > 1:
        weights += np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), samples)
    return figures(trace, document, weights, progress)


def figures(trace: Trace, document: np.ndarray, weights: np.ndarray, progress: bool = False) -> Draws:
    """The figures of the tests in given draws: with all weights 1 those of the text itself.

    Args:
        document: int64 [N], 0 to D - 1.
        weights: float64 [S, D], how often each document was drawn.
    """
    samples, number = weights.shape
    token_ids, row = np.unique(trace.token_id, return_inverse=True)  # rising: so ties of frequency go by id, as in keys
    ids, layers = len(token_ids), trace.num_layers
    seen = _Sums(row, document, (ids, number))
    occurrences = seen.matrix(np.ones(len(row)))
    size = max(1, _DRAWN // max(1, min(len(row), ids * trace.num_experts)))
    blocks = [_Block.of(occurrences, weights[start : start + size]) for start in range(0, samples, size)]
    made: list[list[Mapping[str, np.ndarray]]] = []  # [L][blocks]
    for layer in progress_bar(range(layers), unit="layer", desc="intervals over documents", show=progress):
        entropy = seen.matrix(gate_entropy(trace, layer))
        experts = np.maximum(trace.experts[:, layer, 0], 0)  # of a layer that was not captured no figure is known
        choice, which = np.unique(row * trace.num_experts + experts, return_inverse=True)
        chosen = _Sums(which, document, (len(choice), number)).matrix(np.ones(len(row)))
        first = np.searchsorted(choice, np.arange(ids) * trace.num_experts)  # of each id, in `choice`
        made.append([_layer(block, entropy, chosen, first) for block in blocks])

    def whole(name: str) -> np.ndarray:
        return np.stack([np.concatenate([part[name] for part in layer]) for layer in made], axis=1)

    exponents = [_exponent(counts) for block in blocks for counts in block.count]
    names = ("rho", "under_ids", "under_occurrences", "presets", "consistency")
    return Draws(number, np.array(exponents), **{name: whole(name) for name in names})


class _Sums:
    """Sums over the tokens of one row (token id, or id and expert) in one document, as matrices [rows, documents]."""

    def __init__(self, row: np.ndarray, document: np.ndarray, shape: tuple[int, int]):
        """Tokens [N] in rows and documents of a matrix of this shape."""
        self._shape = shape
        cell = row * shape[1] + document
        self._order = np.argsort(cell, kind="stable")
        cell = cell[self._order]
        self._start = np.flatnonzero(np.r_[True, cell[1:] != cell[:-1]][: len(cell)])
        rows, self._document = np.divmod(cell[self._start], max(shape[1], 1))
        self._rows = np.searchsorted(rows, np.arange(shape[0] + 1))

    def matrix(self, values: np.ndarray) -> csr_array:
        """float64 [rows, D]: sums of values [N]."""
        sums = np.add.reduceat(values[self._order], self._start) if len(values) else values
        return csr_array((sums, self._document, self._rows), shape=self._shape)


@dataclass(frozen=True)
class _Block:
    """Some draws, and what the layers share of them. An id that a draw did not meet is absent."""

    weights: np.ndarray  # float64 [D, B]
    count: np.ndarray  # float64 [B, R], 0: absent
    ids: np.ndarray  # int64 [B], that are not absent
    order: np.ndarray  # int64 [B, R], ids by rising count, the absent first
    rank: np.ndarray  # float64 [B, R], of the count; 0: absent

    @classmethod
    def of(cls, occurrences: csr_array, weights: np.ndarray) -> _Block:
        """occurrences [R, D], weights [B, D]"""
        weights = np.ascontiguousarray(weights.T)
        count = np.ascontiguousarray((occurrences @ weights).T)
        order = np.argsort(count, axis=1, kind="stable")
        return cls(weights, count, np.sum(count > 0, axis=1), order, _ranks(np.where(count > 0, count, np.inf)))


def _layer(block: _Block, entropy: csr_array, chosen: csr_array, first: np.ndarray) -> Mapping[str, np.ndarray]:
    """The figures of one layer, [B, ...] each.

    Args:
        entropy: [R, D], sums of the tokens' entropy; NaN: not known.
        chosen: [id and expert, D], how often the expert came first; rows by id.
        first: int64 [R], the first row of each id in `chosen`.
    """
    mean = np.full(block.count.shape, np.inf)  # of the entropy; absent ids are under no threshold, and rank last
    np.divide((entropy @ block.weights).T, block.count, out=mean, where=block.count > 0)
    largest = np.maximum.reduceat(chosen @ block.weights, first, axis=0).T if len(first) else block.count
    total = block.count.sum(axis=1)
    under = [mean < most for most in ENTROPIES]
    covered = [
        (mean <= preset["entropy_threshold"]) & (block.count >= preset["frequency_threshold"])
        for preset in PRESETS.values()
    ]

    def share(inside: list[np.ndarray]) -> np.ndarray:
        """float64 [B, ...] of the occurrences"""
        return np.stack([ratio(np.sum(block.count, axis=1, where=one), total) for one in inside], axis=-1)

    return {
        "rho": _rho(block, _ranks(mean)),
        "under_ids": np.stack([ratio(one.sum(axis=1), block.ids) for one in under], axis=-1),
        "under_occurrences": share(under),
        "presets": share(covered),
        "consistency": _consistency(block, np.ascontiguousarray(largest), total),
    }


def _exponent(count: np.ndarray) -> float:
    frequency = np.sort(count[count >= ZIPF_FREQUENCY])[::-1]
    if len(frequency) < MIN_KEYS or frequency[0] == frequency[-1]:
        return np.nan
    return zipf_fit(frequency)[2]


def _rho(block: _Block, rank: np.ndarray) -> np.ndarray:
    """float64 [B]: correlation of ranks [B, R] with those of the counts, over ids that are not absent."""
    rank = np.where(block.count > 0, rank, 0)
    middle = block.ids * np.square((block.ids + 1) / 2)  # ranks of n ids, ties or not, have the mean (n + 1) / 2
    product, own, other = (
        np.einsum("br,br->b", a, b) - middle for a, b in ((block.rank, rank), (block.rank, block.rank), (rank, rank))
    )
    return ratio(product, np.sqrt(np.maximum(own * other, 0)))


def _consistency(block: _Block, largest: np.ndarray, total: np.ndarray) -> np.ndarray:
    """float64 [B, G]: mean consistency by group, from the occurrences [B, R] of each id's commonest first choice."""
    of_id = np.divide(largest, block.count, out=np.zeros_like(largest), where=block.count > 0)
    reached = np.zeros((len(largest), largest.shape[1] + 1))
    np.cumsum(np.take_along_axis(of_id, block.order, axis=1), axis=1, out=reached[:, 1:])
    absent = largest.shape[1] - block.ids
    size, more = np.divmod(block.ids, DECILES)  # as np.array_split: the first ones have one id more
    edges = [absent + part * size + np.minimum(part, more) for part in range(DECILES + 1)]
    groups = [(edges[0], edges[-1]), (np.maximum(edges[-1] - TOP, edges[0]), edges[-1])]
    groups += list(pairwise(edges))

    def until(edge: np.ndarray) -> np.ndarray:
        return np.take_along_axis(reached, edge[:, None], axis=1)[:, 0]

    ids, top, *deciles = (ratio(until(end) - until(start), end - start) for start, end in groups)
    return np.stack([ids, ratio(largest.sum(axis=1), total), top, *deciles], axis=-1)


def _ranks(values: np.ndarray) -> np.ndarray:
    """float64 [B, R]: ranks from 1 within each row, the mean of their places for ties; 0 where not finite."""
    order = np.argsort(values, axis=1)
    ordered = np.take_along_axis(values, order, axis=1)
    place = np.arange(values.shape[1])
    starts = np.ones(values.shape, bool)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    ends = np.ones(values.shape, bool)
    ends[:, :-1] = starts[:, 1:]
    begin = np.maximum.accumulate(np.where(starts, place, 0), axis=1)
    end = np.minimum.accumulate(np.where(ends, place, len(place))[:, ::-1], axis=1)[:, ::-1]
    ranks = np.empty(values.shape)
    np.put_along_axis(ranks, order, (begin + end) / 2 + 1, axis=1)
    return np.where(np.isfinite(values), ranks, 0)

"""Routing statistics from a trace, without the model.

Letters: N tokens, R keys, C key width, L layers, K experts per token, E experts. Entropy in nats.

Gate entropy is the trace's own where it has it. Otherwise it is what the K chosen experts' probabilities say
(`gate_entropy`): where they are over the chosen, that of the chosen alone, at most ln K; where they are over all
experts, a lower bound. Confidence is exact where they are over all, and at least 1/K where over the chosen.

A layer that was not captured has no occurrence of any key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy.special import entr

from analysis.traces.trace import TOLERANCE, Trace, TraceError
from varjax.keys import ANY, count_contexts, distinct
from varjax.stats import Moments, RoutingStats


def trace_statistics(
    trace: Trace, orders: Sequence[int] = (1,), min_count: int = 1, max_keys: int | None = None
) -> RoutingStats:
    """The statistics of every layer and context key of a trace; the keys are those that `count_contexts` admits.

    Confidence is the first of the trace's probabilities; without them it and the mean probabilities are NaN, and so is
    entropy if the trace does not have it.

    Args:
        orders: context orders, each >= 1.
        min_count: occurrences that a key needs.
        max_keys: keys at most, over all orders together; None for no bound.

    Raises:
        TraceError: the experts do not stand best first, so no first choice is known.
        InputError: as `varjax.keys.count_contexts`.
    """
    if not trace.ranked:
        raise TraceError("the trace's experts are not ranked, so first choices are not known; record them best first")
    pieces = np.split(trace.token_id, np.flatnonzero(trace.begins())[1:])
    admitted = count_contexts(pieces, orders, min_count, max_keys)
    orders = tuple(one.order for one in admitted.orders)
    found = RoutingStats.empty(admitted.keys, orders, trace.num_layers, trace.num_experts)
    absent = [one.occurrences - one.occurrences_admitted + _too_short(trace, one.order) for one in admitted.orders]
    top1, sums = found.top1_counts.copy(), found.sum_probs.copy()
    figures = {name: [_Rows(len(found.keys)) for _ in range(trace.num_layers)] for name in ("entropy", "confidence")}
    for order in orders:
        row = key_rows(trace, admitted.keys, order)
        here = np.flatnonzero(row >= 0)
        here = here[np.argsort(row[here], kind="stable")]  # the occurrences of a key together
        for layer in np.flatnonzero(trace.captured).tolist():
            top1[layer] += _per_expert(row[here], trace.experts[here, layer, :1], None, top1.shape[1:])
            figures["entropy"][layer].add(row[here], gate_entropy(trace, layer)[here])
            if trace.probs is None:
                continue
            probs = trace.probs[here, layer].astype(np.float64)
            sums[layer] += _per_expert(row[here], trace.experts[here, layer], probs, sums.shape[1:])
            figures["confidence"][layer].add(row[here], probs[:, 0])
    if trace.probs is None:
        sums[:] = np.nan
    return replace(
        found,
        count=top1.sum(axis=-1),
        top1_counts=top1,
        sum_probs=sums,
        absent=np.array(absent, np.int64),
        tokens=len(trace.token_id),
        documents=len(np.unique(trace.document)),
        entropy=_moments(figures["entropy"]),
        confidence=_moments(figures["confidence"]),
    )


def gate_entropy(trace: Trace, layer: int) -> np.ndarray:
    """float64 [N]: entropy of one layer's gate in nats; NaN where the trace says nothing of it.

    From the probabilities p of the K chosen among all E, it is the least that it can be: each of the others is at most
    p_K, so the missing mass r adds at least -r ln p_K. In a layer where r is at some token more than that allows, a
    bias or a group limit had a part in the choice: a single expert may then have all of r, which adds at least -r ln r.
    """
    if trace.entropy is not None:
        return trace.entropy[:, layer].astype(np.float64)
    if trace.probs is None or not trace.captured[layer]:
        return np.full(len(trace.token_id), np.nan)
    probs = trace.probs[:, layer].astype(np.float64)
    known = entr(probs).sum(axis=-1)
    if trace.probs_over == "all":
        missing, last = np.maximum(1 - probs.sum(axis=-1), 0), probs[:, -1]
        if np.any(missing > (trace.num_experts - trace.top_k) * last + TOLERANCE):
            known += entr(missing)
        else:
            known += missing * -np.log(np.maximum(last, np.finfo(np.float32).tiny))
    return np.maximum(known, 0)


def key_rows(trace: Trace, keys: np.ndarray, order: int) -> np.ndarray:
    """int64 [N]: which of the keys int32 [R, C] the last `order` ids of each token are; -1 where none."""
    code = trace.contexts(order)
    first = np.unique(code, return_index=True)[1]  # of each context, where it occurs first
    first = first[code[first] >= 0]
    seen = np.full((len(first), keys.shape[1]), ANY, np.int32)
    for back in range(order):
        seen[:, -1 - back] = trace.token_id[first - back]
    place = distinct(np.concatenate([keys, seen]))[1][len(keys) :]
    row_of_code = np.full(len(trace.token_id) + 1, -1)  # a code is below N; code -1 reads the last place
    row_of_code[code[first]] = np.where(place < len(keys), place, -1)
    return row_of_code[code]


class _Rows:
    """Mean, squared deviations, least and most of one quantity in one layer; each key is added once."""

    def __init__(self, rows: int):
        self.mean, self.min, self.max = (np.full(rows, np.nan) for _ in range(3))
        self.m2 = np.zeros(rows)

    def add(self, row: np.ndarray, values: np.ndarray) -> None:
        """Values float64 [n] at rising rows int64 [n]."""
        if len(row) == 0:
            return
        at, start, count = np.unique(row, return_index=True, return_counts=True)
        self.mean[at] = np.add.reduceat(values, start) / count
        self.m2[at] = np.add.reduceat(np.square(values - self.mean[row]), start)
        self.min[at] = np.minimum.reduceat(values, start)
        self.max[at] = np.maximum.reduceat(values, start)


def _moments(layers: Sequence[_Rows]) -> Moments:
    mean, m2, least, most = (np.stack([getattr(one, part) for one in layers]) for part in ("mean", "m2", "min", "max"))
    return Moments(mean, m2, least, most)


def _per_expert(row: np.ndarray, experts: np.ndarray, weights: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
    """[R, E]: occurrences of experts [n, K] at rows [n], counted or added up by weight [n, K]."""
    place = row[:, None] * shape[1] + experts
    flat = None if weights is None else weights.ravel()
    return np.bincount(place.ravel(), weights=flat, minlength=shape[0] * shape[1]).reshape(shape)


def _too_short(trace: Trace, order: int) -> int:
    """Tokens with fewer than `order` ids in their context."""
    return int(np.sum(trace.contexts(order) < 0))

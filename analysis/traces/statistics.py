"""Routing statistics from a trace, without the model.

Letters: N tokens, R keys, C key width, L layers, K experts per token, E experts. Entropy in nats.

Gate entropy is the trace's own where it has it. Otherwise it is what the K chosen experts' probabilities imply
(`gate_entropy`): where they are over the chosen experts, the entropy of these alone, at most ln K; where they are over
all experts, a lower bound. Confidence is exact where they are over all experts, and at least 1/K where over the chosen.

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
    """Collect the statistics of every layer and context key of a trace.

    Args:
        trace: the trace.
        orders: context orders, each >= 1.
        min_count: occurrences that a key needs.
        max_keys: keys at most, over all orders together; None: no bound.

    Returns:
        The statistics of the keys that `varjax.keys.count_contexts` admits. Confidence is the first of the trace's
        probabilities; without them it and the mean probabilities are NaN, and so is an unknown entropy.

    Raises:
        TraceError: the experts are not sorted best first, so no first choice is known.
        InputError: as `varjax.keys.count_contexts`.
    """
    if not trace.ranked:
        raise TraceError("the trace's experts are not ranked, so first choices are not known; record them best first")
    pieces = np.split(trace.token_id, np.flatnonzero(trace.begins())[1:])
    admitted = count_contexts(pieces, orders, min_count, max_keys)
    orders = tuple(one.order for one in admitted.orders)
    found = RoutingStats.empty(admitted.keys, orders, trace.num_layers, trace.num_experts)
    # Tokens with too few ids before them have no context at all.
    absent = [
        one.occurrences - one.occurrences_admitted + np.sum(trace.contexts(one.order) < 0) for one in admitted.orders
    ]
    top1, sums = found.top1_counts.copy(), found.sum_probs.copy()
    # Mean, squared deviations, least and most: [4, L, R].
    entropy, confidence = np.full((2, 4, trace.num_layers, len(found.keys)), np.nan)
    entropy[1] = confidence[1] = 0
    for order in orders:
        row = _key_rows(trace, admitted.keys, order)
        here = np.flatnonzero(row >= 0)
        here = here[np.argsort(row[here], kind="stable")]  # the occurrences of a key together
        for layer in np.flatnonzero(trace.captured).tolist():
            top1[layer] += _per_expert(row[here], trace.experts[here, layer, :1], None, top1.shape[1:])
            _add_moments(entropy[:, layer], row[here], gate_entropy(trace, layer)[here])
            if trace.probs is None:
                continue
            probs = trace.probs[here, layer].astype(np.float64)
            sums[layer] += _per_expert(row[here], trace.experts[here, layer], probs, sums.shape[1:])
            _add_moments(confidence[:, layer], row[here], probs[:, 0])
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
        entropy=Moments(*entropy),
        confidence=Moments(*confidence),
    )


def gate_entropy(trace: Trace, layer: int) -> np.ndarray:
    """Compute the entropy of one layer's gate.

    Unless the trace has it, it is the least entropy that the probabilities p of the K chosen among all E allow: each of
    the others is at most p_K, so the missing mass r adds at least -r ln p_K. In a layer where r is larger than that
    allows at some token, a bias or a group limit influenced the choice: a single expert may then have all of r, which
    adds at least -r ln r.

    Args:
        trace: the trace.
        layer: its index.

    Returns:
        float64 [N], nats; NaN where the trace does not tell.
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


def _key_rows(trace: Trace, keys: np.ndarray, order: int) -> np.ndarray:
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


def _add_moments(moments: np.ndarray, row: np.ndarray, values: np.ndarray) -> None:
    """Set moments [4, R] at rows int64 [n], which rise, from values float64 [n]. Each row is set once."""
    if len(row) == 0:
        return
    at, start, count = np.unique(row, return_index=True, return_counts=True)
    moments[0, at] = np.add.reduceat(values, start) / count
    moments[1, at] = np.add.reduceat(np.square(values - moments[0, row]), start)
    moments[2, at] = np.minimum.reduceat(values, start)
    moments[3, at] = np.maximum.reduceat(values, start)


def _per_expert(row: np.ndarray, experts: np.ndarray, weights: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
    """[R, E]: occurrences of experts [n, K] at rows [n], counted or added up by weight [n, K]."""
    place = row[:, None] * shape[1] + experts
    flat = None if weights is None else weights.ravel()
    return np.bincount(place.ravel(), weights=flat, minlength=shape[0] * shape[1]).reshape(shape)

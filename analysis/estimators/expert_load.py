"""How the tokens of a trace spread over the experts.

Letters: N tokens, D documents, L layers, E experts, K experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from analysis.resampling import Measure, bootstrap, measure, ratio, ratio_with_interval
from analysis.traces.trace import Trace
from varjax.errors import NotTestableError


@dataclass(frozen=True)
class Load:
    """Shares of the assignments (each token makes K in every layer) and how evenly they are spread."""

    share: Measure  # one row per expert: its share of the layer's assignments; 1 / E if even
    imbalance: Measure  # one row: the busiest expert's share over the mean share, 1 to E
    evenness: Measure  # one row: entropy of the shares over ln E, 0 to 1
    unused: np.ndarray  # int64 [L], experts that no token chose
    tokens: int
    documents: int


def load(trace: Trace, *, samples: int = 1000, seed: int = 0) -> Load:
    """Load of each expert in each layer, with bootstrap intervals over documents.

    The interval of the imbalance takes the busiest expert of each draw, so it reaches further up than down.

    Raises:
        NotTestableError: the trace has no token.
    """
    if len(trace.token_id) == 0:
        raise NotTestableError("the trace has no token; give one that has")
    counts = assignments(trace).transpose(0, 2, 1)  # [D, E, L]
    every = np.broadcast_to(counts.sum(axis=1, keepdims=True), counts.shape)
    total = counts.sum(axis=0)

    def with_interval(name: str, unit: str, statistic: Callable[[np.ndarray], np.ndarray]) -> Measure:
        return measure(name, unit, statistic(total), bootstrap(statistic, counts, samples=samples, seed=seed))

    return Load(
        share=measure("load", "share", *ratio_with_interval(counts, every, samples, seed)),
        imbalance=with_interval("imbalance", "ratio", _imbalance),
        evenness=with_interval("evenness", "share", _evenness),
        unused=np.sum(total == 0, axis=0),
        tokens=len(trace.token_id),
        documents=len(counts),
    )


def assignments(trace: Trace) -> np.ndarray:
    """float64 [D, L, E]: how often the tokens of each document (of those that have any) chose each expert."""
    different, document = np.unique(trace.document, return_inverse=True)
    size = len(different) * trace.num_experts
    cells = document[:, None] * trace.num_experts + trace.experts.transpose(1, 0, 2)  # [L, N, K]
    counts = [np.bincount(one.ravel(), minlength=size).reshape(len(different), -1) for one in cells]
    return np.stack(counts, axis=1).astype(np.float64)


def _imbalance(counts: np.ndarray) -> np.ndarray:
    """[..., E, L] to [..., 1, L]."""
    return ratio(counts.max(axis=-2, keepdims=True), counts.mean(axis=-2, keepdims=True))


def _evenness(counts: np.ndarray) -> np.ndarray:
    """[..., E, L] to [..., 1, L]; a single expert is even."""
    share = ratio(counts, counts.sum(axis=-2, keepdims=True))
    entropy = -np.sum(share * np.log(np.where(share > 0, share, 1)), axis=-2, keepdims=True)
    return entropy / math.log(counts.shape[-2]) if counts.shape[-2] > 1 else np.ones_like(entropy)

"""How often the next token goes to the same expert again, as in table 5 of Mixtral's paper (arXiv 2401.04088).

Letters: N tokens, D documents, L layers, E experts, K experts per token.

Over pairs of tokens that stand directly after each other in a document:

| measure | share of the pairs in which |
|---|---|
| `first_choice` | both tokens have the same first choice |
| `first_or_second` | an expert is first or second choice of both; only where K >= 2 |

Uniform routing repeats by chance: 12.5 % and 46 % for Mixtral's 8 experts. Real loads are not uniform and documents
have their favorites, so chance alone makes more. The permutation null says how much: it keeps the loads and each
document's favorites, and breaks the order of its tokens. What is above its band is due to that order, be it that
routing persists or that token ids come in bursts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from analysis.estimators.choice_entropy import check_ranked
from analysis.resampling import (
    Measure,
    check_permutations,
    document_sums,
    measure,
    permutation,
    ratio_with_interval,
)
from analysis.traces.trace import Trace
from varjax.errors import NotTestableError
from varjax.progress import progress_bar


@dataclass(frozen=True)
class Repetition:
    """Repetition per layer, and what uniform routing would give."""

    measures: dict[str, Measure]  # name -> one row
    uniform: dict[str, float]  # name -> share of the pairs under uniform routing
    pairs: int
    permutations: int


def repetition(
    trace: Trace, *, permutations: int = 39, samples: int = 1000, seed: int = 0, progress: bool = True
) -> Repetition:
    """Share of consecutive tokens that repeat an expert, against uniform routing and the permutation null.

    Args:
        permutations: 0 for no null, or at least 19; p is at least 1 / (permutations + 1).
        samples: draws of the bootstrap over documents.

    Raises:
        NotTestableError: no ranking tells the first choice, or no two tokens stand together.
        InputError: too few permutations.
    """
    check_permutations(permutations)
    check_ranked(trace)
    pair = ~trace.begins()
    if not pair.any():
        raise NotTestableError(
            "no two tokens of the trace stand directly after each other; give a trace of running text"
        )
    best = np.ascontiguousarray(trace.experts[:, :, :2].transpose(2, 1, 0))  # [2 or 1, L, N]

    rng = np.random.default_rng(seed)
    observed = _sums(best, pair, trace.document)
    null: dict[str, list[np.ndarray]] = {name: [] for name in observed}
    for _ in progress_bar(range(permutations), unit="permutation", desc="repetition", show=progress):
        shuffled = np.take(best, permutation(trace.document, rng), axis=-1)
        for name, one in _sums(shuffled, pair, trace.document).items():
            null[name].append(one.sum(axis=0) / pair.sum())
    pairs = np.repeat(document_sums(pair, trace.document)[:, None, None], trace.num_layers, axis=-1)
    return Repetition(
        measures={
            name: measure(name, "share", *ratio_with_interval(one, pairs, samples, seed), np.array(null[name]))
            for name, one in observed.items()
        },
        uniform=uniform_repetition(trace.num_experts, trace.top_k),
        pairs=int(pair.sum()),
        permutations=permutations,
    )


def uniform_repetition(num_experts: int, top_k: int) -> dict[str, float]:
    """The same shares where every choice of experts is equally likely and tokens do not look at each other."""
    shares = {"first_choice": 1 / num_experts}
    if top_k >= 2:
        e = num_experts
        shares["first_or_second"] = 1 - (e - 2) * (e - 3) / (e * (e - 1))
    return shares


def _sums(best: np.ndarray, pair: np.ndarray, document: np.ndarray) -> dict[str, np.ndarray]:
    """name -> float64 [D, 1, L]: pairs that repeat, counted at their second token."""

    def repeats(slots: Sequence[tuple[int, int]]) -> np.ndarray:
        same = np.zeros(best.shape[1:], bool)
        for before, after in slots:
            same[:, 1:] |= best[before, :, :-1] == best[after, :, 1:]
        return document_sums((same & pair).T, document)[:, None]

    sums = {"first_choice": repeats([(0, 0)])}
    if len(best) == 2:
        sums["first_or_second"] = repeats([(0, 0), (0, 1), (1, 0), (1, 1)])
    return sums

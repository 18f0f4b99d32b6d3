"""Which experts are chosen together, and how much more often than their load makes them.

Letters: N tokens, D documents, L layers, E experts, K experts per token, P listed pairs.

Busy experts meet often without having anything to do with each other, and K different ones are always chosen. What
load alone makes expected is therefore the least assuming distribution over sets of K experts that has the measured
loads: the one of largest entropy, P(set) proportional to the product of its members' weights w ("conditional Poisson
sampling", Chen, Dempster & Liu 1994). For K = 2 that is quasi-independence, a symmetric matrix w_a w_b without its
diagonal, fitted to the loads by iterative proportional fitting; for K > 2 such a matrix only comes near it, and under
very uneven loads expects a pair more often than one of its experts occurs.

Of many pairs the strongest look strong by chance alone. So the pairs to list are chosen on the trace's build documents
(`Trace.build_documents`), and their ratios and intervals are those of the other documents, whose own loads make the
expected shares.

Ratios above 1 need no experts that belong together: where documents differ in load, two experts that are busy in the
same documents meet more often than the mean loads make expected, though within each document load explains all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from analysis.resampling import Measure, bootstrap, document_sums, measure, ratio
from analysis.traces.trace import Trace
from varjax.errors import InputError, NotTestableError

_TOLERANCE = 1e-8  # of a fitted load
_ITERATIONS = 5000


@dataclass(frozen=True)
class CoActivation:
    """All pairs of experts in each layer."""

    share: np.ndarray  # float64 [L, E, E], share of all tokens that chose both; on the diagonal, that chose the one
    expected: np.ndarray  # float64 [L, E, E], the same if only the loads and K were given
    strongest: np.ndarray  # int64 [L, P, 2], pairs of largest ratio in the build documents; -1: not so many
    pair_share: np.ndarray  # float64 [L, P], their share of the held-out tokens; NaN where there is no pair
    pair_expected: np.ndarray  # float64 [L, P], the same if only the held-out loads and K were given
    strength: Measure  # ratio of the two, one row per rank
    build_documents: int
    held_out_documents: int  # none: no pair is listed

    @property
    def ratio(self) -> np.ndarray:
        """float64 [L, E, E]: share over expected; 1 if load explains the pair, NaN on the diagonal and for no load."""
        off_diagonal = ~np.eye(self.share.shape[-1], dtype=bool)
        return np.where(off_diagonal, ratio(self.share, self.expected), np.nan)


def co_activation(
    trace: Trace, *, pairs: int = 10, min_expected: float = 25.0, samples: int = 1000, seed: int = 0
) -> CoActivation:
    """Shares of the tokens that chose each pair of experts, and the strongest pairs of each layer.

    The intervals draw held-out documents; a draw's own loads enter its expected shares to first order. Where all
    documents are on one side of the split, no pair is listed. No ranking of the experts is needed.

    Args:
        pairs: pairs to list per layer.
        min_expected: build tokens in which a pair must be expected to be listed; below, ratios are noise.
        samples: draws of the bootstrap over documents.

    Raises:
        NotTestableError: one expert per token makes no pairs, or the trace has no token.
    """
    if trace.top_k < 2:
        raise NotTestableError(
            "co-activation needs two experts per token or more; this trace has K = 1, which makes no pairs"
        )
    if len(trace.token_id) == 0:
        raise NotTestableError("the trace has no token; give one that has")
    share, expected = _shares(trace)
    build, held_out = (trace.of(part) for part in (trace.build_documents(), ~trace.build_documents()))
    strongest = np.full((trace.num_layers, pairs, 2), -1)
    held_out_share = held_out_expected = np.full_like(share, np.nan)
    if len(build.token_id) and len(held_out.token_id):
        strongest = np.stack(list(_strongest(*_shares(build), pairs, min_expected / len(build.token_id))))
        held_out_share, held_out_expected = _shares(held_out)
    return CoActivation(
        share=share,
        expected=expected,
        strongest=strongest,
        pair_share=_of_pairs(held_out_share, strongest),
        pair_expected=_of_pairs(held_out_expected, strongest),
        strength=_strength(held_out, held_out_share, held_out_expected, strongest, samples, seed),
        build_documents=len(np.unique(build.document)),
        held_out_documents=len(np.unique(held_out.document)),
    )


def expected_shares(load: np.ndarray, top_k: int) -> np.ndarray:
    """float64 [E, E]: share of tokens that choose both, if K experts are chosen with these loads and nothing else.

    Args:
        load: float64 [E], share of the tokens that choose each expert; adds up to K.

    Raises:
        InputError: the loads do not add up to K.
        NotTestableError: no distribution over sets of K experts was found that has these loads.
    """
    if not np.isclose(load.sum(), top_k):
        raise InputError(
            f"the loads {np.round(load, 4).tolist()} add up to {load.sum():.4g}; give loads of sum {top_k}"
        )
    expected = np.outer(load, load)  # right where one of the two is always or never chosen
    free = (load > 0) & (load < 1)
    left = top_k - int(np.sum(load >= 1))  # experts of a token that are not certain
    if free.any():
        weights = _fit(load[free], left)
        expected[np.ix_(free, free)] = _pairs(weights, left)
    np.fill_diagonal(expected, load)
    return expected


def _shares(trace: Trace) -> tuple[np.ndarray, np.ndarray]:
    """Measured and expected shares of a trace's tokens, float64 [L, E, E] each."""
    share = np.stack([_pair_shares(layer, trace.num_experts) for layer in trace.experts.transpose(1, 0, 2)])
    return share, np.stack([expected_shares(np.diagonal(layer), trace.top_k) for layer in share])


def _of_pairs(matrix: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """float64 [L, P]: the cells of matrix [L, E, E] at pairs [L, P, 2]; NaN where there is no pair."""
    first, second = pairs[..., 0], pairs[..., 1]
    return np.where(first < 0, np.nan, matrix[np.arange(len(matrix))[:, None], first, second])


def _pair_shares(experts: np.ndarray, num_experts: int) -> np.ndarray:
    """[N, K] to float64 [E, E]."""
    counts = np.zeros(num_experts**2)
    for i, j in combinations(range(experts.shape[1]), 2):
        counts += np.bincount(experts[:, i] * np.int64(num_experts) + experts[:, j], minlength=num_experts**2)
    both = counts.reshape(num_experts, num_experts)
    alone = np.bincount(experts.ravel(), minlength=num_experts)
    return (both + both.T + np.diag(alone)) / len(experts)


def _fit(load: np.ndarray, size: int) -> np.ndarray:
    """float64 [E]: weights whose sets of `size` have these loads, each over 0 and under 1."""
    odds = load / (1 - load)
    weights = odds
    for _ in range(_ITERATIONS):
        weights = weights / np.exp(np.mean(np.log(weights)))
        term = weights * _without(weights, size)[:, -1]
        fitted = size * term / term.sum()
        if np.max(np.abs(fitted - load)) < _TOLERANCE:
            return weights
        weights = weights * odds * (1 - fitted) / fitted
    raise NotTestableError(
        f"no weights were found that give the loads {np.round(load, 4).tolist()} with {size} experts per token, so "
        "what chance alone would pair is not known; give a longer trace"
    )


def _without(weights: np.ndarray, size: int) -> np.ndarray:
    """float64 [E, size]: elementary symmetric polynomials of degree 0 to size - 1 of all weights but one."""
    polynomial = np.zeros((len(weights), size))
    polynomial[:, 0] = 1
    for left_out, weight in enumerate(weights):
        more = weight * polynomial[:, :-1]
        more[left_out] = 0
        polynomial[:, 1:] += more
    return polynomial


def _pairs(weights: np.ndarray, size: int) -> np.ndarray:
    """float64 [E, E]: probability that a set of `size` holds both; zero on the diagonal."""
    if size < 2:
        return np.zeros((len(weights), len(weights)))
    polynomial = np.zeros((len(weights), len(weights), size - 1))  # of all weights but two
    polynomial[..., 0] = 1
    for left_out, weight in enumerate(weights):
        more = weight * polynomial[..., :-1]
        more[left_out] = 0
        more[:, left_out] = 0
        polynomial[..., 1:] += more
    both = np.outer(weights, weights) * polynomial[..., -1]
    np.fill_diagonal(both, 0)
    return both * size * (size - 1) / both.sum()


def _strongest(share: np.ndarray, expected: np.ndarray, pairs: int, least: float) -> Iterator[np.ndarray]:
    """Per layer the `pairs` (a < b) of largest ratio, int64 [P, 2], among those expected often enough."""
    first, second = np.triu_indices(share.shape[-1], k=1)
    for layer_share, layer_expected in zip(share[:, first, second], expected[:, first, second], strict=True):
        listed = np.flatnonzero((layer_expected >= least) & (layer_expected > 0))
        order = np.argsort(-layer_share[listed] / layer_expected[listed], kind="stable")[:pairs]
        chosen = np.full((pairs, 2), -1)
        chosen[: len(order)] = np.stack([first[listed[order]], second[listed[order]]], axis=-1)
        yield chosen


def _strength(
    trace: Trace, share: np.ndarray, expected: np.ndarray, pairs: np.ndarray, samples: int, seed: int
) -> Measure:
    """Ratios of the listed pairs in a trace, [P, L], with their intervals; NaN where there is no pair or no token."""
    a, b = pairs[..., 0], pairs[..., 1]  # [L, P]
    if len(trace.token_id) == 0:
        none = np.full(a.T.shape, np.nan)
        return measure("pair_ratio", "ratio", none, (none, none))
    one, other = (_of_pairs(share, np.stack([each, each], axis=-1)) for each in (a, b))
    per_loads = ratio(_of_pairs(expected, pairs), one * other)

    def statistic(both: np.ndarray, one: np.ndarray, other: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        return ratio(ratio(both * tokens, one * other), per_loads).swapaxes(-1, -2)

    sums = [np.zeros((len(np.unique(trace.document)), *a.shape)) for _ in range(3)]
    for layer, rank in np.argwhere(a >= 0):
        experts = trace.experts[:, layer]
        first, second = np.any(experts == a[layer, rank], axis=-1), np.any(experts == b[layer, rank], axis=-1)
        for total, chosen in zip(sums, (first & second, first, second), strict=True):
            total[:, layer, rank] = document_sums(chosen, trace.document)
    tokens = document_sums(np.ones(len(trace.document)), trace.document)
    sums.append(np.broadcast_to(tokens[:, None, None], sums[0].shape))
    value = statistic(*[one.sum(axis=0) for one in sums])
    return measure("pair_ratio", "ratio", value, bootstrap(statistic, *sums, samples=samples, seed=seed))

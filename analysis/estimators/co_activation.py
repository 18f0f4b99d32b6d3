"""Which experts are chosen together, and how much more often than their load makes them.

Letters: N tokens, D documents, L layers, E experts, K experts per token, P listed pairs.

Busy experts meet often without having anything to do with each other, and K different ones are always chosen. What
load alone makes expected is therefore the least assuming distribution over sets of K experts that has the measured
loads: the one of largest entropy, P(set) proportional to the product of its members' weights w ("conditional Poisson
sampling", Chen, Dempster & Liu 1994). For K = 2 that is quasi-independence, a symmetric matrix w_a w_b without its
diagonal, fitted to the loads by iterative proportional fitting; for K > 2 such a matrix only comes near it, and under
very uneven loads expects a pair more often than one of its experts occurs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from analysis.estimators.resampling import Measure, bootstrap, document_sums, measure, ratio
from analysis.traces.trace import Trace

_TOLERANCE = 1e-8  # of a fitted load
_ITERATIONS = 5000


@dataclass(frozen=True)
class CoActivation:
    """All pairs of experts in each layer."""

    share: np.ndarray  # float64 [L, E, E], share of the tokens that chose both; on the diagonal, that chose the one
    expected: np.ndarray  # float64 [L, E, E], the same if only the loads and K were given
    strongest: np.ndarray  # int64 [L, P, 2], the pairs of largest ratio; -1 where there are not so many
    strength: Measure  # their ratios, one row per rank

    @property
    def ratio(self) -> np.ndarray:
        """float64 [L, E, E]: share over expected; 1 if load explains the pair, NaN on the diagonal and for no load."""
        off_diagonal = ~np.eye(self.share.shape[-1], dtype=bool)
        return np.where(off_diagonal, ratio(self.share, self.expected), np.nan)


def co_activation(
    trace: Trace, *, pairs: int = 10, min_expected: float = 25.0, samples: int = 1000, seed: int = 0
) -> CoActivation:
    """Shares of the tokens that chose each pair of experts, and the strongest pairs of each layer.

    The intervals draw documents; a draw's own loads enter its expected shares to first order. The listed pairs are
    listed for being strongest: their ratios lie a little too high.

    Args:
        pairs: pairs to list per layer.
        min_expected: tokens in which a pair must be expected to be listed; below, ratios are noise.
        samples: draws of the bootstrap over documents.

    Raises:
        ValueError: one expert per token makes no pairs, or the trace has no token.
    """
    if trace.top_k < 2:
        raise ValueError(
            "co-activation needs two experts per token or more; this trace has K = 1, which makes no pairs"
        )
    if len(trace.token_id) == 0:
        raise ValueError("the trace has no token; give one that has")
    share = np.stack([_pair_shares(layer, trace.num_experts) for layer in trace.experts.transpose(1, 0, 2)])
    expected = np.stack([expected_shares(np.diagonal(layer), trace.top_k) for layer in share])
    strongest = np.stack(list(_strongest(share, expected, pairs, min_expected / len(trace.token_id))))
    return CoActivation(share, expected, strongest, _strength(trace, share, expected, strongest, samples, seed))


def expected_shares(load: np.ndarray, top_k: int) -> np.ndarray:
    """float64 [E, E]: share of tokens that choose both, if K experts are chosen with these loads and nothing else.

    Args:
        load: float64 [E], share of the tokens that choose each expert; adds up to K.

    Raises:
        ValueError: no distribution over sets of K experts was found that has these loads.
    """
    expected = np.outer(load, load)  # right where one of the two is always or never chosen
    free = (load > 0) & (load < 1)
    left = top_k - int(np.sum(load >= 1))  # experts of a token that are not certain
    if free.any():
        weights = _fit(load[free], left)
        expected[np.ix_(free, free)] = _pairs(weights, left)
    np.fill_diagonal(expected, load)
    return expected


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
    raise ValueError(
        f"no weights give the loads {np.round(load, 4).tolist()} with {size} experts per token; "
        f"give loads that add up to {size}"
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
    trace: Trace, share: np.ndarray, expected: np.ndarray, strongest: np.ndarray, samples: int, seed: int
) -> Measure:
    """Ratios of the listed pairs, [P, L], with their intervals."""
    layers = np.arange(trace.num_layers)[:, None]
    a, b = strongest[..., 0], strongest[..., 1]  # [L, P]
    none = a < 0
    load = np.where(none, np.nan, share[layers, a, a] * share[layers, b, b])
    per_loads = np.where(none, np.nan, expected[layers, a, b]) / load

    def statistic(both: np.ndarray, one: np.ndarray, other: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        return (ratio(both * tokens, one * other) / per_loads).swapaxes(-1, -2)

    sums = [np.empty((len(np.unique(trace.document)), *a.shape)) for _ in range(3)]
    for layer, rank in np.ndindex(*a.shape):
        experts = trace.experts[:, layer]
        one, other = np.any(experts == a[layer, rank], axis=-1), np.any(experts == b[layer, rank], axis=-1)
        for total, chosen in zip(sums, (one & other, one, other), strict=True):
            total[:, layer, rank] = document_sums(chosen, trace.document)
    tokens = document_sums(np.ones(len(trace.document)), trace.document)
    sums.append(np.broadcast_to(tokens[:, None, None], sums[0].shape))
    value = statistic(*[one.sum(axis=0) for one in sums])
    return measure("pair_ratio", "ratio", value, bootstrap(statistic, *sums, samples=samples, seed=seed))

"""Consistency is as large as chance where routing ignores the ids, and larger where it does not."""

from dataclasses import replace

import numpy as np
import pytest

from analysis.questions.consistency import TOP, _consistency, _largest_shares
from varjax.stats import RoutingStats


def routed(choices: list[np.ndarray]) -> RoutingStats:
    """Statistics of ids from their first choices [E] in each layer, a list of [R, E]."""
    top1 = np.stack(choices)
    empty = RoutingStats.empty(np.arange(top1.shape[1])[:, None], (1,), len(top1), top1.shape[2])
    return replace(empty, count=top1.sum(axis=-1), top1_counts=top1, sum_probs=top1.astype(float))


@pytest.fixture(scope="module")
def two_layers():
    """Layer 0 ignores the id; in layer 1 four of five occurrences go to the id's own expert."""
    rng = np.random.default_rng(0)
    count = np.sort(rng.geometric(0.02, 1500))
    marginal = np.array([0.4, 0.3, 0.2, 0.1])
    own = rng.integers(0, 4, 1500)
    free = rng.multinomial(count, marginal)
    bound = rng.multinomial(count, 0.8 * np.eye(4)[own] + 0.2 * marginal)
    return routed([free, bound])


def test_routing_that_ignores_ids_is_as_consistent_as_its_null(two_layers):
    found = _consistency(two_layers)
    assert np.abs(found.values.value[0] - found.null.value[0]).max() < 0.03
    inside = (found.null.low[0] <= found.values.value[0]) & (found.values.value[0] <= found.null.high[0])
    assert inside.sum() >= 11  # of 13 groups that share their ids
    assert np.all(found.values.value[1, 4:] > found.null.high[1, 4:])
    assert np.all((found.values.low <= found.values.value) & (found.values.value <= found.values.high))


def test_groups_are_what_they_say(two_layers):
    found = _consistency(two_layers)
    share, count = two_layers.routing_consistency[1], two_layers.count[1]
    assert found.values.value[1, 0] == pytest.approx(share.mean())
    assert found.values.value[1, 1] == pytest.approx(two_layers.top1_counts[1].max(axis=-1).sum() / count.sum())
    assert found.values.value[1, 2] == pytest.approx(share[np.argsort(count, kind="stable")[-TOP:]].mean())
    assert found.keys[1].tolist() == [1500, 1500, 1000, *[150] * 10]
    assert found.frequencies[1, 0].tolist() == [count.min(), count.max()]
    assert np.all(found.frequencies[1, 4:, 0] >= found.frequencies[1, 3:-1, 1])  # deciles do not overlap


def test_largest_share_of_few_draws_is_known():
    draws = np.array([5, 4000])
    mean, variance = _largest_shares(np.array([1, 2]), np.array([0.5, 0.5]), draws, np.random.default_rng(0))
    assert mean[0] == 1 and variance[0] == 0
    assert mean[1] == pytest.approx(0.75, abs=0.01)  # both to one expert in half of the cases
    assert variance[1] == pytest.approx(1 / 16, abs=0.002)


def test_random_routing_lies_within_the_band_at_the_nominal_rate():
    rng = np.random.default_rng(3)
    marginal, runs = np.array([0.4, 0.3, 0.2, 0.1]), 150
    inside = np.zeros(13)
    for run in range(runs):
        stats = routed([rng.multinomial(rng.geometric(0.3, 2000) + 1, marginal)])  # few different frequencies
        found = _consistency(stats, samples=20, seed=run)
        inside += (found.null.low[0] <= found.values.value[0]) & (found.values.value[0] <= found.null.high[0])
    assert np.all(inside >= 0.88 * runs) and inside.mean() == pytest.approx(0.95 * runs, abs=0.03 * runs)


def test_routing_by_document_alone_lies_above_the_null():
    rng = np.random.default_rng(4)
    favorite = rng.integers(0, 4, 60)  # of each document
    home = rng.integers(0, 60, (400, 2))  # the documents that an id keeps to
    top1 = np.stack([np.bincount(favorite[rng.choice(two, 20)], minlength=4) for two in home])
    found = _consistency(routed([top1]))
    assert found.values.value[0, 0] > found.null.high[0, 0]


def test_groups_of_few_ids_have_no_interval():
    top1 = np.random.default_rng(5).multinomial(np.arange(10, 50), [0.5, 0.3, 0.2])  # 40 ids: deciles of 4
    found = _consistency(routed([top1]))
    for edge in (found.values.low, found.values.high, found.null.low, found.null.high):
        assert np.isfinite(edge[0, :3]).all() and np.isnan(edge[0, 3:]).all()
    assert np.isfinite(found.values.value).all() and np.isfinite(found.null.value).all()


def test_a_file_without_first_choices_uses_the_estimated_shares():
    top1 = np.zeros((1, 40, 4), int)
    top1[0, :, 0] = 6  # only the commonest is known, of 10 occurrences
    stats = routed([top1[0]])
    sums = np.full((1, 40, 4), 4 / 3)
    sums[..., 0] = 6
    stats = replace(stats, count=np.full((1, 40), 10), sum_probs=sums)
    estimated, taken = _consistency(stats, first_choices_known=False), _consistency(stats)
    assert estimated.null.value[0, 0] < taken.null.value[0, 0] == 1
    assert estimated.values.value[0, 0] == pytest.approx(0.6)


def test_unknown_and_too_few_are_said():
    rng = np.random.default_rng(1)
    top1 = rng.multinomial(np.full(30, 9), [0.5, 0.5])
    stats = routed([top1, np.zeros_like(top1), top1])
    holes = stats.top1_counts.copy()
    holes[0, [3, 8]] = 0
    holes[2, 5:] = 0
    found = _consistency(replace(stats, top1_counts=holes))
    assert found.used.left_out[0].tolist() == [3, 8] and found.keys[0, 0] == 28
    assert found.used.untestable[0] == "" and "no rows" in found.used.untestable[1]
    assert found.used.untestable[2] == "5 of 30 token ids with a known consistency, at least 10 needed"
    assert np.isnan(found.values.value[1:]).all()

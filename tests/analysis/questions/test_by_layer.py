"""The tests on statistics find what was planted, and say so where they can find nothing."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats as scipy_stats

from analysis.criteria import MAX_RHO, MIN_COVERED, MIN_LOW_SHARE
from analysis.questions.by_layer import wilson
from analysis.questions.coverage import GRID_ENTROPIES, GRID_FREQUENCIES, _coverage
from analysis.questions.entropy_distribution import ENTROPIES, PERCENTILES, _entropy_distribution
from analysis.questions.frequency_entropy import _frequency_entropy
from analysis.questions.zipf import TOP_IDS, _zipf
from varjax.config import PRESETS
from varjax.stats import Moments, RoutingStats


def statistics(count, entropy, experts=4, **fields) -> RoutingStats:
    """Statistics of single ids with counts and mean entropies [L, R]; expert 0 always comes first."""
    count, entropy = np.atleast_2d(count), np.atleast_2d(np.asarray(entropy, float))
    keys = np.arange(count.shape[1])[:, None]
    empty = RoutingStats.empty(keys, (1,), len(count), experts)
    known = np.where(count > 0, entropy, np.nan)
    top1 = empty.top1_counts.copy()
    top1[..., 0] = count
    given = {"tokens": int(count.sum(axis=1).max()), "documents": 3}
    made = replace(empty, count=count, top1_counts=top1, sum_probs=top1.astype(float))
    return replace(made, entropy=Moments(known, empty.entropy.m2, known, known), **given | fields)


def test_zipf_finds_a_planted_exponent():
    frequency = np.rint(1e7 * np.arange(1, 2001) ** -1.3).astype(int)
    found = _zipf(statistics(frequency, np.ones(2000)))
    assert found.slope == pytest.approx(-1.3, abs=1e-3) and found.r_squared > 0.99999
    assert found.low < 1.3 < found.high and found.ranks == 2000
    assert found.least_frequency == frequency[-1]


def test_zipf_interval_covers_the_exponent_of_random_frequencies():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        found = _zipf(statistics(np.rint(1000 * rng.pareto(1.0, 300) + 1000).astype(int), np.ones(300)))
        covered += found.low <= 1 <= found.high
    assert covered >= 180  # 190 expected


def test_zipf_leaves_rare_ids_out_and_needs_different_ones():
    rare = statistics([*range(10, 30), *[1] * 50], np.ones(70))
    assert _zipf(rare).ranks == 20
    assert "every token id occurs 12 times" in _zipf(statistics([12] * 20, np.ones(20))).untestable
    assert "9 token ids with 10 or more" in _zipf(statistics([*range(11, 20), 1], np.ones(10))).untestable


def test_zipf_as_published_is_fitted_over_all_ids_with_the_shares_of_the_most_frequent():
    frequency = np.r_[np.rint(1e5 / np.arange(1, 1501)), np.full(500, 3)].astype(int)  # the last ones are rare
    found = _zipf(statistics(frequency[::-1], np.ones(2000), tokens=2 * int(frequency.sum())))
    line = scipy_stats.linregress(np.log(np.arange(1, 2001)), np.log(frequency))
    assert found.all_slope == pytest.approx(line.slope) and found.all_r_squared == pytest.approx(line.rvalue**2)
    assert found.all_ranks == 2000 and found.ranks == 1500 and found.slope == pytest.approx(-1, abs=1e-3)
    whole = 2 * frequency.sum()  # half of the occurrences are at ids that are not keys
    assert found.top_shares == pytest.approx([frequency[:n].sum() / whole for n in TOP_IDS])


def test_a_share_of_more_ids_than_there_are_is_known_only_where_all_ids_are_keys():
    frequency = np.arange(50, 0, -1)
    every = _zipf(statistics(frequency, np.ones(50))).top_shares
    assert every == pytest.approx((frequency[:10].sum() / frequency.sum(), 1, 1))
    some = _zipf(statistics(frequency, np.ones(50), tokens=5000)).top_shares
    assert some[0] == pytest.approx(frequency[:10].sum() / 5000) and np.isnan(some[1:]).all()
    same = _zipf(statistics([12] * 20, np.ones(20)))
    assert np.isnan(same.all_slope) and same.top_shares[0] == 0.5


def test_rho_is_spearmans_and_a_planted_one_passes():
    rng = np.random.default_rng(1)
    count = rng.integers(1, 40, (2, 500))
    noise = rng.normal(0, 0.2, 500)
    stats = statistics(count, [2 - 0.05 * count[0] + noise, 1 + rng.random(500)])
    found = _frequency_entropy(stats)
    for layer in range(2):
        oracle = scipy_stats.spearmanr(count[layer], stats.entropy.mean[layer])
        assert found.rho.value[layer] == pytest.approx(oracle.statistic)
        assert found.p[layer] == pytest.approx(oracle.pvalue, rel=1e-6)
        assert found.rho.low[layer] < found.rho.value[layer] < found.rho.high[layer]
    assert (found.rho.value < MAX_RHO).tolist() == [True, False]
    assert found.used.number.tolist() == [500, 500]


def test_interval_of_rho_covers_the_truth():
    rng = np.random.default_rng(2)
    rho = 6 / np.pi * np.arcsin(-0.6 / 2)  # Spearman's of a normal pair with correlation -0.6
    covered = 0
    for _ in range(200):
        x, y = rng.multivariate_normal([0, 0], [[1, -0.6], [-0.6, 1]], 150).T
        found = _frequency_entropy(statistics(np.rint(1e6 * np.exp(x)).astype(int) + 1, y + 10)).rho
        covered += found.low[0] <= rho <= found.high[0]
    assert covered >= 180


def test_a_strong_rho_of_few_ids_is_no_pass_without_a_small_p():
    count = np.array([5, 4, 3, 2, 1, 6, 7, 8, 9, 10])
    entropy = np.array([1, 2, 9, 4, 5, 0, 3, 8, 7, 0.5])
    found = _frequency_entropy(statistics(count, entropy))
    assert MAX_RHO < found.rho.value[0] < 0 and found.p[0] > 0.05


def test_perfect_order_has_a_finite_p_and_interval():
    found = _frequency_entropy(statistics(np.arange(1, 21), np.arange(20, 0, -1)))
    assert found.rho.value[0] == pytest.approx(-1) and found.p[0] < 1e-10 and np.isfinite(found.rho.high[0])


def test_entropy_shares_by_ids_and_by_occurrences():
    count = np.array([1000, *[1] * 19])
    entropy = np.array([0.2, *[0.4] * 4, *[1.2] * 15])
    found = _entropy_distribution(statistics(count, entropy))
    ids, occurrences = found.below
    assert ENTROPIES == (0.5, 1.0, 1.5)
    assert ids.value[0] == pytest.approx([0.25, 0.25, 1])
    assert occurrences.value[0, 0] == pytest.approx(1004 / 1019)
    assert found.percentiles[:, 0, PERCENTILES.index(50)].tolist() == [1.2, 0.2]
    assert found.mean[0] == pytest.approx((200 + 1.6 + 18) / 1019)
    # one id makes nearly all occurrences: they are worth about one draw
    assert occurrences.high[0, 0] - occurrences.low[0, 0] > 0.7


def test_the_entropy_criterion_wants_more_than_thirty_percent():
    half = np.repeat([0.3, 1.0], 50)
    assert _entropy_distribution(statistics(np.full(100, 9), half)).below[0].value[0, 0] > MIN_LOW_SHARE
    exactly = np.repeat([0.3, 1.0], [30, 70])
    assert not _entropy_distribution(statistics(np.full(100, 9), exactly)).below[0].value[0, 0] > MIN_LOW_SHARE


def test_coverage_counts_occurrences_of_all_tokens():
    count = np.array([[100, 60, 30, 5]])
    found = _coverage(statistics(count, [[0.25, 0.45, 0.65, 0.1]], tokens=400))
    share = dict(zip(PRESETS, found.presets.value[0], strict=True))
    assert share["balanced"] == pytest.approx(160 / 400)  # 205 tokens at ids that are not keys count as well
    assert not share["balanced"] > MIN_COVERED  # more than 40 %, not 40 %
    assert share["conservative"] == pytest.approx(100 / 400) and share["aggressive"] == pytest.approx(190 / 400)
    f, h = GRID_FREQUENCIES.index(50), GRID_ENTROPIES.index(0.5)
    assert found.grid[0, f, h] == share["balanced"]
    assert np.all(np.diff(found.grid, axis=1) <= 0) and np.all(np.diff(found.grid, axis=2) >= 0)


def test_keys_with_nan_are_left_out_of_what_needs_them_and_named():
    rng = np.random.default_rng(3)
    count, entropy = rng.integers(20, 99, 60), rng.random(60)
    whole = statistics(count, entropy)
    holes = entropy.copy()
    holes[[4, 9]] = np.nan
    stats = statistics(count, holes)
    rest = np.delete(np.arange(60), [4, 9])
    without = statistics(count[rest], entropy[rest])

    found = _frequency_entropy(stats)
    assert found.used.left_out[0].tolist() == [4, 9] and found.used.number[0] == 58
    assert found.rho.value[0] == _frequency_entropy(without).rho.value[0]
    shares = _entropy_distribution(stats)
    assert shares.below[0].value.tolist() == _entropy_distribution(without).below[0].value.tolist()
    assert _zipf(stats) == _zipf(whole)  # frequencies are all there
    covered = _coverage(stats)
    assert covered.unknown[0] == pytest.approx(count[[4, 9]].sum() / count.sum())
    assert covered.used.left_out[0].tolist() == [4, 9]


@pytest.mark.parametrize(
    ("count", "entropy", "reason"),
    [
        (np.zeros(20, int), np.ones(20), "no rows"),
        (np.arange(1, 6), np.arange(5), "5 of 5 token ids, at least 10 needed"),
        (np.arange(1, 21), np.full(20, np.nan), "0 of 20 token ids with a known entropy"),
        (np.full(20, 3), np.arange(20), "every frequency is 3"),
        (np.arange(1, 21), np.full(20, 0.25), "every mean entropy is 0.25"),
    ],
)
def test_what_cannot_be_tested_says_why(count, entropy, reason):
    found = _frequency_entropy(statistics(count, entropy))
    assert reason in found.used.untestable[0]
    assert np.isnan(found.rho.value[0]) and np.isnan(found.p_holm[0])
    for function in (_zipf, _entropy_distribution, _coverage):
        function(statistics(count, entropy))  # no crash, no warning


def test_a_layer_without_rows_leaves_the_others_alone():
    rng = np.random.default_rng(4)
    count, entropy = rng.integers(1, 99, 50), rng.random(50)
    alone = _frequency_entropy(statistics(count, entropy))
    both = _frequency_entropy(statistics([np.zeros(50, int), count], [entropy, entropy]))
    assert both.rho.value[1] == alone.rho.value[0] and both.p_holm[1] == alone.p_holm[0]
    assert both.used.testable.tolist() == [False, True]


def test_no_keys_at_all():
    stats = statistics(np.zeros((2, 0), int), np.zeros((2, 0)))
    assert not _frequency_entropy(stats).used.testable.any() and not _coverage(stats).used.testable.any()
    assert "0 token ids" in _zipf(stats).untestable


def test_wilson_against_scipy_and_at_its_ends():
    for hits, number in ((3, 40), (0, 25), (25, 25)):
        oracle = scipy_stats.binomtest(hits, number).proportion_ci(method="wilson")
        _, low, high = wilson(np.array([hits / number]), np.array([number]))
        assert (low[0], high[0]) == pytest.approx(tuple(oracle), abs=1e-12)
        assert low[0] <= hits / number <= high[0]

import numpy as np
import pytest

from analysis import resampling
from analysis.resampling import (
    _against_null,
    bootstrap,
    document_sums,
    holm,
    measure,
    permutation,
    ratio,
    ratio_with_interval,
)


def test_document_sums_are_those_of_a_loop():
    rng = np.random.default_rng(0)
    document = np.repeat([4, 0, 7], [3, 5, 2])  # in any order, some documents without a token
    values = rng.normal(size=(10, 2, 3))
    slow = np.array([sum(values[i] for i in range(10) if document[i] == one) for one in (4, 0, 7)])
    np.testing.assert_allclose(document_sums(values, document), slow)
    assert document_sums(values[:, 0, 0] > 0, document).dtype == np.float64


def test_a_permutation_moves_every_token_but_none_out_of_its_document():
    document = np.repeat([4, 0, 7], [3, 400, 2])
    order = permutation(document, np.random.default_rng(1))
    np.testing.assert_array_equal(np.sort(order), np.arange(len(document)))
    np.testing.assert_array_equal(document[order], document)
    assert np.sum(order == np.arange(len(document))) < 12


def test_permutations_are_all_equally_likely():
    rng = np.random.default_rng(2)
    seen = [tuple(permutation(np.zeros(3, int), rng)) for _ in range(3000)]
    counts = [seen.count(one) for one in set(seen)]
    assert len(counts) == 6 and min(counts) > 400


def test_bootstrap_covers_the_truth():
    rng = np.random.default_rng(3)
    covered = 0
    for seed in range(300):
        tokens = rng.integers(50, 400, 60).astype(float)
        _, (low, high) = ratio_with_interval(tokens * rng.normal(0.4, 0.2, 60), tokens, 300, seed)
        covered += low <= 0.4 <= high
    assert 0.90 <= covered / 300 <= 0.98


def test_bootstrap_is_that_of_drawn_documents(monkeypatch):
    rng = np.random.default_rng(4)
    sums = rng.random((25, 2, 3)), rng.random((25, 2, 3)) + 1
    low, high = bootstrap(ratio, *sums, samples=4000, seed=0)
    draws = rng.integers(0, 25, (4000, 25))
    slow = np.quantile([sums[0][d].sum(axis=0) / sums[1][d].sum(axis=0) for d in draws], [0.025, 0.975], axis=0)
    np.testing.assert_allclose([low, high], slow, atol=0.01)
    monkeypatch.setattr(resampling, "_DRAWN", 25 * 7)  # blocks of seven draws
    np.testing.assert_allclose(bootstrap(ratio, *sums, samples=4000, seed=0), (low, high), rtol=1e-12)


def test_few_documents_have_no_interval_and_nothing_has_no_figure():
    value, (low, high) = ratio_with_interval(np.tile([3.0, 0.0], (9, 1)), np.tile([4.0, 0.0], (9, 1)), 50, 0)
    np.testing.assert_array_equal(value, [0.75, np.nan])
    assert np.isnan([low, high]).all()
    # Of 40 documents the first figure is over 10, the second over 9, the third over none.
    denominator = 2.0 * (np.arange(40)[:, None] < [10, 9, 0])
    value, (low, high) = ratio_with_interval(denominator / 2, denominator, 50, 0)
    np.testing.assert_array_equal(value, [0.5, 0.5, np.nan])
    np.testing.assert_array_equal([low, high], [[0.5, np.nan, np.nan]] * 2)


def test_draws_without_a_figure_are_left_out():
    denominator = np.zeros((40, 1))
    denominator[0] = 2
    low, high = bootstrap(ratio, denominator / 2, denominator, samples=50)
    np.testing.assert_array_equal([low, high], [[0.5]] * 2)


@pytest.mark.parametrize("permutations", [19, 39, 99])
def test_the_band_holds_the_whole_family_with_95_per_cent(permutations):
    rng = np.random.default_rng(permutations)
    scale = np.geomspace(1e-3, 10, 60).reshape(3, 20)  # figures of very different spread, alike in part
    inside, small = [], []
    for _ in range(1500):
        common, own = rng.normal(size=(permutations + 1, 1, 20)), rng.normal(size=(permutations + 1, 3, 20))
        figures = 0.5 + scale * (common + own)
        null, low, high, p = _against_null(figures[0], figures[1:], (-np.inf, np.inf))
        inside.append(np.all((low <= figures[0]) & (figures[0] <= high)))
        small.append(p.min() <= 0.05)
        assert np.all(low < null) and np.all(null < high)
    assert 0.935 <= np.mean(inside) <= 0.965 + 0.01  # the error of 1,500 trials is 0.006
    assert 0.035 - 0.01 <= np.mean(small) <= 0.065


def test_p_is_judged_by_the_most_extreme_figure_of_each_permutation():
    rng = np.random.default_rng(5)
    permuted = rng.normal(size=(39, 2, 4))
    value = np.zeros((2, 4))
    value[1, 2] = 9
    null, _, high, p = _against_null(value, permuted, (-np.inf, np.inf))
    np.testing.assert_allclose(null, permuted.mean(axis=0))
    assert p[1, 2] == pytest.approx(1 / 40) and value[1, 2] > high[1, 2]
    assert np.all(np.delete(p.ravel(), 6) > 0.3)


def test_figures_that_nothing_changes_are_not_significant_unless_they_differ():
    permuted = np.full((39, 1, 3), 0.7) + np.random.default_rng(6).normal(size=(39, 1, 3)) * [0, 0, 0.01]
    value = np.array([[0.7 + 1e-16, 0.8, 0.7]])
    _, low, high, p = _against_null(value, permuted, (0, 1))
    np.testing.assert_allclose(p[0, :2], [1, 1 / 40])
    np.testing.assert_allclose([low[0, 0], high[0, 0]], 0.7)


def test_figures_that_hardly_ever_move_are_judged_alone():
    rng = np.random.default_rng(8)
    permuted = np.full((39, 1, 5), 0.5)
    permuted[[3, 8, 9], 0, [0, 1, 2]] = 0.6  # three figures move in one permutation of 39
    permuted[:, 0, 3:] = rng.normal(0.5, 0.01, (39, 2))
    value = np.array([[0.5, 0.7, 0.6, 0.5, 0.7]])
    _, low, high, p = _against_null(value, permuted, (0, 1))
    np.testing.assert_allclose(low[0, :3], 0.5)
    np.testing.assert_allclose(high[0, :3], 0.6)
    np.testing.assert_allclose(p[0, :3], [1, 1 / 40, 2 / 40])
    rest = _against_null(value[:, 3:], permuted[..., 3:], (0, 1))  # as if the others were not there
    np.testing.assert_array_equal([low[:, 3:], high[:, 3:], p[:, 3:]], rest[1:])
    assert high[0, 3] < 0.55


def test_one_wild_permutation_widens_the_band_to_the_limits():
    permuted = np.full((19, 1, 1), 0.5) + 1e-9 * np.arange(19)[:, None, None]
    permuted[7] = 1.0
    _, low, high, _ = _against_null(np.full((1, 1), 0.5), permuted, (0, 1))
    np.testing.assert_array_equal([low, high], [[[0]], [[1]]])


def test_what_was_not_measured_stays_out_of_the_family():
    permuted = np.random.default_rng(7).normal(size=(39, 1, 3))
    permuted[..., 1] = np.nan
    value = np.array([[0.1, np.nan, 0.2]])
    whole = measure("m", "share", value, (value, value), permuted, (-9, 9))
    rest = measure("m", "share", value[:, ::2], (value, value), permuted[..., ::2], (-9, 9))
    for name in ("null", "null_low", "null_high", "p"):
        assert np.isnan(getattr(whole, name)[0, 1])
        np.testing.assert_array_equal(getattr(whole, name)[:, ::2], getattr(rest, name))


def test_without_permutations_there_is_no_null():
    value = np.ones((1, 1))
    assert measure("m", "share", value, (value, value), np.zeros((0, 1, 1))).null is None


def test_holm_steps_down_and_skips_what_was_not_tested():
    assert holm(np.array([0.01, 0.04, np.nan, 0.03])) == pytest.approx([0.03, 0.06, np.nan, 0.06], nan_ok=True)
    assert holm(np.array([0.6, 0.7])).tolist() == [1, 1]
    assert len(holm(np.array([]))) == 0

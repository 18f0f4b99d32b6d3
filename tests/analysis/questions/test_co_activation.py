from itertools import combinations
from math import prod

import numpy as np
import pytest

import analysis.questions.co_activation as co_activation_module
from analysis.questions.co_activation import _co_activation, _expected_shares
from analysis.questions.data import TraceSettings
from tests.synthetic_traces import make_trace
from varjax.errors import InputError, NotTestableError


def sets_with(weights, top_k):
    """Every set of K experts and its probability, proportional to the product of the weights."""
    sets = list(combinations(range(len(weights)), top_k))
    p = np.array([prod(weights[e] for e in one) for one in sets])
    return sets, p / p.sum()


def pairs_of(sets, p, num_experts):
    share = np.zeros((num_experts, num_experts))
    for one, probability in zip(sets, p, strict=True):
        share[np.ix_(one, one)] += probability
    return share


@pytest.mark.parametrize(("num_experts", "top_k"), [(5, 2), (7, 3), (8, 4), (6, 5), (4, 4)])
def test_expected_shares_are_those_of_all_sets_enumerated(num_experts, top_k):
    rng = np.random.default_rng(num_experts)
    for spread in (0.3, 2.0):
        share = pairs_of(*sets_with(np.exp(rng.normal(0, spread, num_experts)), top_k), num_experts)
        np.testing.assert_allclose(_expected_shares(np.diagonal(share), top_k), share, atol=1e-6)


def test_two_experts_make_a_hollow_symmetric_matrix_of_products():
    load = np.array([0.7, 0.5, 0.4, 0.3, 0.1])
    expected = _expected_shares(load, 2)
    np.testing.assert_allclose(expected.sum(axis=-1), 2 * load, atol=1e-6)  # (K - 1) load, and the diagonal
    a, b, c, d = 0, 1, 2, 3  # w_a w_b * w_c w_d = w_a w_c * w_b w_d
    assert expected[a, b] * expected[c, d] == pytest.approx(expected[a, c] * expected[b, d], rel=1e-5)


def test_experts_that_are_always_or_never_chosen():
    load = np.array([1.0, 0.0, 0.5, 0.3, 0.2])
    expected = _expected_shares(load, 2)
    np.testing.assert_allclose(expected[0], load)
    np.testing.assert_array_equal(expected[1], 0)
    assert np.all(expected[2:, 2:] == np.diag(load[2:]))  # one place is left: no two of these together
    with pytest.raises(InputError, match=r"add up to 0\.6; give loads of sum 2"):
        _expected_shares(np.array([0.2, 0.2, 0.2]), 2)


def test_loads_for_which_no_weights_are_found_are_not_testable(monkeypatch):
    monkeypatch.setattr(co_activation_module, "_ITERATIONS", 1)
    with pytest.raises(NotTestableError, match="no weights were found"):
        _expected_shares(np.array([0.9, 0.6, 0.3, 0.2]), 2)


def test_routing_by_load_alone_has_ratios_of_one():
    rng = np.random.default_rng(0)
    sets, p = sets_with([8, 4, 2, 1, 1, 1], 3)
    experts = np.array(sets)[rng.choice(len(sets), 40_000, p=p)][:, None]
    found = _co_activation(make_trace(experts, 6), settings=TraceSettings(samples=200))
    off_diagonal = ~np.eye(6, dtype=bool)
    np.testing.assert_allclose(found.ratio[0][off_diagonal], 1, atol=0.12)
    assert np.isnan(found.ratio[0][~off_diagonal]).all()
    assert found.build_documents + found.held_out_documents == 800


def test_independent_routing_has_no_strong_pairs_on_documents_that_did_not_choose_them():
    rng = np.random.default_rng(3)
    above, ratios = [], []
    for seed in range(10):
        experts = rng.random((4000, 2, 16)).argsort(axis=-1)[..., :2]
        found = _co_activation(
            make_trace(experts, 16, length=40), pairs=5, min_expected=10, settings=TraceSettings(samples=200, seed=seed)
        )
        above.append(found.strength.low > 1)
        ratios.append(found.strength.value)
    assert np.mean(ratios) == pytest.approx(1, abs=0.06)  # in the trace that chose them: 1.4
    assert np.mean(above) < 0.08  # 2.5 %, were they independent


def test_mixing_documents_of_different_load_lifts_ratios():
    rng = np.random.default_rng(4)
    busy = 4 * (np.arange(8000) // 50 % 2)[:, None] + np.arange(4)  # half of the experts, by the document
    chosen = np.where(rng.random((8000, 1)) < 0.8, busy, (busy + 4) % 8)
    experts = np.take_along_axis(chosen, rng.random((8000, 4)).argsort(axis=-1)[:, :2], axis=-1)
    found = _co_activation(make_trace(experts[:, None], 8), pairs=3, settings=TraceSettings(samples=100))
    assert np.all(found.strength.low > 1.3)


def test_without_a_held_out_part_no_pair_is_listed():
    experts = np.random.default_rng(5).random((500, 2, 6)).argsort(axis=-1)[..., :2]
    found = _co_activation(make_trace(experts, 6, length=500), pairs=3, settings=TraceSettings(samples=10))
    assert 0 in (found.build_documents, found.held_out_documents)
    assert np.all(found.strongest == -1)
    assert np.isnan([found.strength.value, found.strength.low, found.pair_share.T, found.pair_expected.T]).all()
    assert np.isfinite(found.ratio).sum() == 2 * 30  # all pairs of all documents are still there to be drawn


def test_the_order_of_a_tokens_experts_does_not_matter():
    experts = np.random.default_rng(6).random((1500, 1, 6)).argsort(axis=-1)[..., :3]
    one, other = (
        _co_activation(make_trace(e, 6, ranked=False), pairs=3, settings=TraceSettings(samples=10))
        for e in (experts, np.sort(experts))
    )
    for name in ("share", "expected", "strongest", "pair_share"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    np.testing.assert_array_equal(one.strength.low, other.strength.low)


def test_a_bound_pair_comes_first_with_an_interval():
    rng = np.random.default_rng(1)
    sets, p = sets_with(np.ones(8), 2)
    p[sets.index((2, 5))] = 0.3
    experts = np.array(sets)[rng.choice(len(sets), (5000, 2), p=p / p.sum())]
    experts[:, 1] = experts[:, 1, ::-1]  # the order within a token does not matter
    found = _co_activation(make_trace(experts, 8), pairs=3, settings=TraceSettings(samples=200))
    assert found.strongest.shape == (2, 3, 2) and found.strongest[:, 0].tolist() == [[2, 5], [2, 5]]
    assert np.all(found.strength.low[0] > 1.5) and np.all(found.strength.low[0] < found.strength.value[0])
    np.testing.assert_allclose(found.strength.value.T, found.pair_share / found.pair_expected)
    trace = make_trace(experts, 8)
    held_out = experts[~trace.build_documents()[trace.document]]
    both = np.isin(held_out, [2, 5]).all(axis=-1).mean(axis=0)
    np.testing.assert_allclose(found.pair_share[:, 0], both)
    load = np.bincount(held_out[:, 0].ravel(), minlength=8) / len(held_out)
    assert found.pair_expected[0, 0] == pytest.approx(_expected_shares(load, 2)[2, 5])
    np.testing.assert_allclose(found.share, found.share.swapaxes(1, 2))
    chosen = np.array([np.isin(experts[:, 0], [2]).any(-1), np.isin(experts[:, 0], [5]).any(-1)])
    assert found.share[0, 2, 5] == pytest.approx(chosen.all(axis=0).mean())
    assert found.share[0, 2, 2] == pytest.approx(chosen[0].mean())


def test_pairs_that_are_hardly_expected_are_not_listed():
    experts = np.tile([[[0, 1]], [[0, 2]], [[1, 2]]], (100, 1, 1))
    experts[0] = [[3, 4]]
    found = _co_activation(make_trace(experts, 5), pairs=5, min_expected=20, settings=TraceSettings(samples=10))
    assert sorted(found.strongest[0, :3].tolist()) == [[0, 1], [0, 2], [1, 2]]
    assert np.all(found.strongest[0, 3:] == -1) and np.isnan(found.strength.value[3:]).all()


def test_errors():
    with pytest.raises(NotTestableError, match="K = 1, which makes no pairs"):
        _co_activation(make_trace(np.zeros((10, 1, 1)), 4), TraceSettings())
    with pytest.raises(NotTestableError, match="the trace has no token"):
        _co_activation(make_trace([[[0, 1]]], 4).of(np.array([False])), TraceSettings())

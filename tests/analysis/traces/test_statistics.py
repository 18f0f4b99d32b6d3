"""Statistics from a trace equal those of a plain dictionary, token by token."""

import math
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
from scipy.special import entr

from analysis.traces.statistics import _key_rows, gate_entropy, trace_statistics
from analysis.traces.trace import Trace, TraceError


def trace(tokens=300, probs=True, **fields) -> Trace:
    """Five documents, one of them with gaps; 2 layers, 2 of 4 experts."""
    rng = np.random.default_rng(0)
    document = np.sort(rng.integers(0, 5, tokens))
    position = np.arange(tokens) - np.searchsorted(document, document)
    position[document == 2] *= 2
    values = np.sort(0.25 + 0.2 * rng.random((tokens, 2, 2)), axis=-1)[..., ::-1].astype(np.float32)  # the largest
    given = {
        "token_id": rng.integers(0, 6, tokens).astype(np.int32),
        "document": document.astype(np.int32),
        "position": position.astype(np.int32),
        "experts": np.argsort(rng.random((tokens, 2, 4)))[..., :2].astype(np.int16),
        "probs": values if probs else None,
        "document_ids": tuple("abcde"),
        "groups": tuple("ggggg"),
        "num_experts": 4,
        "probs_over": "all" if probs else None,
    }
    return Trace(**given | fields)


def occurrences(one: Trace, order: int) -> dict[tuple[int, ...], list[int]]:
    found = defaultdict(list)
    for at in range(len(one.token_id)):
        start = at - order + 1
        together = start >= 0 and all(
            one.document[i] == one.document[at] and one.position[i] == one.position[at] - (at - i)
            for i in range(start, at)
        )
        if together:
            found[tuple(one.token_id[start : at + 1].tolist())].append(at)
    return found


def least_entropy(probs) -> float:
    """What the chosen experts' probabilities leave over, spread as evenly as no smaller entropy allows."""
    return -sum(p * math.log(p) for p in probs) - max(1 - sum(probs), 0) * math.log(probs[-1])


@pytest.mark.parametrize("num_experts", [4, 64])
@pytest.mark.parametrize("sharpness", [0.1, 1.0, 50.0])
def test_gate_entropy_is_never_above_the_truth_and_near_it_for_a_flat_gate(num_experts, sharpness):
    rng = np.random.default_rng(0)
    gate = -np.sort(-rng.dirichlet(np.full(num_experts, sharpness), (300, 2)), axis=-1)
    truth = entr(gate).sum(axis=-1)
    given = trace(probs=False, num_experts=num_experts)
    bound = replace(given, probs=gate[..., :2].astype(np.float32), probs_over="all")
    for layer in range(2):
        least = gate_entropy(bound, layer)
        assert (least <= truth[:, layer] + 1e-5).all()
        assert (least >= entr(gate[:, layer, :2]).sum(axis=-1) - 1e-5).all()
        if sharpness == 50:
            assert least.mean() > 0.85 * truth[:, layer].mean()
        known = replace(bound, entropy=truth.astype(np.float32))
        np.testing.assert_allclose(gate_entropy(known, layer), truth[:, layer], rtol=1e-6)
        assert np.isnan(gate_entropy(given, layer)).all()


def test_gate_entropy_is_no_higher_than_the_truth_where_the_chosen_are_not_the_largest():
    """One expert that was not chosen has all the rest, as where a bias or a group limit forbids it."""
    gate = np.array([0.6, 0.2, 0.15, 0.05])
    chosen = np.tile(gate[1:3].astype(np.float32), (300, 2, 1))
    bound = replace(trace(probs=False), probs=chosen, probs_over="all")
    np.testing.assert_allclose(gate_entropy(bound, 1), entr([0.2, 0.15, 0.65]).sum(), rtol=1e-6)
    assert gate_entropy(bound, 1)[0] < entr(gate).sum()


def test_statistics_equal_a_dictionary():
    one = trace()
    stats = trace_statistics(one, (1, 2), min_count=4)
    oracle = {key: at for order in (1, 2) for key, at in occurrences(one, order).items() if len(at) >= 4}
    keys = [tuple(int(i) for i in key if i >= 0) for key in stats.keys]
    assert set(keys) == set(oracle) and stats.ngram_orders == (1, 2)
    for row, key in enumerate(keys):
        at = oracle[key]
        for layer in range(2):
            entropy = [least_entropy(probs) for probs in one.probs[at, layer].astype(float)]
            confidence = one.probs[at, layer, 0].astype(float)
            assert stats.count[layer, row] == len(at)
            for moments, std, values in (
                (stats.entropy, stats.std_entropy, entropy),
                (stats.confidence, stats.std_confidence, confidence),
            ):
                assert moments.mean[layer, row] == pytest.approx(np.mean(values))
                assert std[layer, row] == pytest.approx(np.std(values))
                assert (moments.min[layer, row], moments.max[layer, row]) == pytest.approx((min(values), max(values)))
            assert (
                stats.top1_counts[layer, row].tolist() == np.bincount(one.experts[at, layer, 0], minlength=4).tolist()
            )
            sums = np.zeros(4)
            np.add.at(sums, one.experts[at, layer], one.probs[at, layer])
            assert stats.sum_probs[layer, row] == pytest.approx(sums)
    seen = {order: sum(len(at) for key, at in oracle.items() if len(key) == order) for order in (1, 2)}
    assert stats.absent.tolist() == [300 - seen[1], 300 - seen[2]]
    assert (stats.tokens, stats.documents) == (300, 5)


def test_without_probabilities_choices_are_still_counted():
    with_them, without = trace_statistics(trace()), trace_statistics(trace(probs=False))
    assert np.array_equal(with_them.top1_counts, without.top1_counts)
    assert np.isnan(without.entropy.mean).all() and np.isnan(without.mean_probs).all()
    assert np.array_equal(with_them.count, without.count)


def test_key_rows_are_exact_beyond_the_keys():
    one = trace()
    stats = trace_statistics(one, (1, 2), min_count=1, max_keys=8)
    rows = _key_rows(one, stats.keys, 2)
    for at in np.flatnonzero(rows >= 0):
        assert stats.keys[rows[at]].tolist() == one.token_id[at - 1 : at + 1].tolist()
    assert np.sum(rows >= 0) == 300 - stats.absent[1] and np.any(rows < 0)


def test_unranked_experts_are_refused():
    with pytest.raises(TraceError, match="not ranked"):
        trace_statistics(trace(probs=False, ranked=False))

import math
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest

from analysis.questions.choice_entropy import PRIOR, _grassberger, choice_entropy
from analysis.questions.data import TraceSettings
from tests.synthetic_traces import make_trace, zipf_ids
from varjax.errors import NotTestableError

QUICK = {"permutations": 19, "samples": 10}


def with_firsts(token_id, first, num_experts, length=100):
    """One layer per column of the first choices [N, L]; the second choice is the next expert."""
    experts = np.stack([first, (first + 1) % num_experts], axis=-1)
    return make_trace(experts, num_experts, token_id=token_id, length=length)


def draw(rng, distribution):
    """One choice per row of distributions [N, E]."""
    return (rng.random((len(distribution), 1)) > distribution.cumsum(axis=-1)[:, :-1]).sum(axis=-1)


def entropy(distribution):
    return -np.sum(distribution * np.log(np.maximum(distribution, 1e-300)), axis=-1)


def test_grassbergers_numbers_follow_their_recursion():
    g = _grassberger(41)
    assert g[1] == pytest.approx(-np.euler_gamma - math.log(2))
    assert g[2] == pytest.approx(2 - np.euler_gamma - math.log(2))
    np.testing.assert_allclose(g[3::2], g[2:-1:2])
    np.testing.assert_allclose(g[4::2] - g[2:-2:2], 2 / (np.arange(1, 20) * 2 + 1))


@pytest.mark.parametrize("num_experts", [8, 32])
def test_the_correction_comes_near_a_known_entropy_that_plug_in_misses(num_experts):
    rng = np.random.default_rng(num_experts)
    ids = np.sort(rng.integers(0, 300, 9000))[rng.permutation(9000)]  # about 30 occurrences each
    distribution = rng.dirichlet(np.full(num_experts, 0.3), 300)
    trace = with_firsts(ids, draw(rng, distribution[ids])[:, None], num_experts)
    found = choice_entropy(trace, TraceSettings((1,), permutations=0, samples=200))
    truth = entropy(distribution)[ids].mean()
    plug_in, corrected = (found.measures[name].value[0, 0] for name in ("plug_in", "conditional_entropy"))
    assert truth - plug_in > 0.05
    assert abs(truth - corrected) < 0.25 * (truth - plug_in)
    cross = found.measures["cross_entropy"]
    assert cross.value[0, 0] > truth  # never flatters, and ...
    assert cross.value[0, 0] < found.unconditional.value[0, 0]  # ... knows more than the load
    low, high = found.measures["conditional_entropy"].low[0, 0], found.measures["conditional_entropy"].high[0, 0]
    assert low < corrected < high and high - low < 0.1


def test_independent_routing_is_explained_by_nothing():
    outside = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        first = draw(rng, np.tile(1 / np.arange(1.0, 17), (6000, 1)) / np.sum(1 / np.arange(1.0, 17))).reshape(-1, 2)
        found = choice_entropy(with_firsts(zipf_ids(rng, 3000, 200), first, 16), TraceSettings((1, 2), **QUICK))
        explained = found.measures["explained"]
        assert np.all(np.abs(explained.value) < 0.1)
        np.testing.assert_allclose(explained.null, 0)
        families = [found.measures[name] for name in ("plug_in", "conditional_entropy", "cross_entropy")]
        outside += any(np.any((m.value < m.null_low) | (m.value > m.null_high)) for m in families)
        # Plug-in calls the little evidence of bigrams knowledge; its null shows it.
        assert np.all(found.unconditional.value - found.measures["plug_in"].null > 0.05)
    assert outside <= 6  # three families that leave their bands with 5 % each: 7 of 20 or more with 2 %


def test_routing_by_the_last_two_ids_is_explained_by_two():
    rng = np.random.default_rng(1)
    ids = zipf_ids(rng, 30_000, 12)
    share = np.bincount(ids) / len(ids)
    function = rng.integers(0, 8, (12, 12))  # [previous, current]
    first = function[np.roll(ids, 1), ids]
    found = choice_entropy(with_firsts(ids, first[:, None], 8), TraceSettings((2, 1), permutations=19, samples=100))
    mixture = np.stack([np.bincount(function[:, one], share, 8) for one in range(12)])
    h = found.measures["conditional_entropy"]
    assert h.value[0, 0] == pytest.approx(share @ entropy(mixture), abs=0.01)
    assert h.value[1, 0] == pytest.approx(0, abs=0.005)
    assert found.measures["plug_in"].value[1, 0] == 0
    assert found.unconditional.value[0, 0] == pytest.approx(entropy(np.bincount(first) / len(first)), abs=0.001)
    explained = found.measures["explained"]
    assert explained.value[1, 0] > 0.99 and explained.p[1, 0] == 1 / 20
    assert explained.value[0, 0] == pytest.approx(1 - h.value[0, 0] / h.null[0, 0])
    assert explained.low[0, 0] < explained.value[0, 0] < explained.high[0, 0]
    assert found.measures["explained_held_out"].value[1, 0] > 0.9


def test_what_documents_repeat_word_for_word_is_explained_in_sample_alone():
    rng = np.random.default_rng(5)
    phrase = rng.integers(0, 30, (60, 20))  # every document says one phrase of common ids ten times ...
    routed = rng.integers(0, 8, (60, 20, 1))  # ... routed alike each time, and otherwise than in any other document
    repeat = dict(repeats=10, axis=0)
    ids, first = np.repeat(phrase, **repeat).ravel(), np.repeat(routed, **repeat).reshape(-1, 1)
    trace = with_firsts(ids, first, 8, length=200)
    found = choice_entropy(trace, TraceSettings((1, 2), **QUICK))
    explained, held_out = (found.measures[name] for name in ("explained", "explained_held_out"))
    assert np.all(explained.value[:, 0] > [0.03, 0.5]) and np.all(explained.p == 1 / 20)
    assert np.all(held_out.value < 0.02)
    loss = found.measures["cross_entropy"]
    np.testing.assert_allclose(held_out.value, 1 - loss.value / loss.null)
    np.testing.assert_allclose(held_out.low, 1 - loss.high / loss.null)


def test_figures_are_those_of_dictionaries():
    rng = np.random.default_rng(2)
    ids, min_count = zipf_ids(rng, 3000, 15), 8
    trace = with_firsts(ids, draw(rng, rng.dirichlet(np.ones(6), 15)[ids])[:, None], 6)
    found = choice_entropy(trace, TraceSettings((1, 2), min_count, permutations=0, samples=10))
    build = trace.build_documents()[trace.document]
    g = _grassberger(3000)
    for row, order in enumerate((1, 2)):
        every, inside = defaultdict(Counter), defaultdict(Counter)
        tokens = []
        for i in range(len(ids)):
            if trace.position[i] >= order - 1:
                key, expert = tuple(ids[i - order + 1 : i + 1]), int(trace.experts[i, 0, 0])
                tokens.append((i, key, expert))
                every[key][expert] += 1
                inside[key][expert] += build[i]
        known = [(key, e) for _, key, e in tokens if sum(every[key].values()) >= min_count]
        plug_in = np.mean([math.log(sum(every[key].values()) / every[key][e]) for key, e in known])
        corrected = np.mean([math.log(sum(every[key].values())) - g[every[key][e]] for key, e in known])
        load = Counter(trace.experts[build, 0, 0].tolist())
        marginal = {e: (load[e] + 0.5) / (build.sum() + 3) for e in range(6)}
        loss = [
            -math.log((inside[key][e] + PRIOR * marginal[e]) / (sum(inside[key].values()) + PRIOR))
            for i, key, e in tokens
            if not build[i] and sum(inside[key].values()) >= min_count
        ]
        values = [found.measures[name].value[row, 0] for name in ("plug_in", "conditional_entropy", "cross_entropy")]
        np.testing.assert_allclose(values, [plug_in, corrected, np.mean(loss)])
        assert found.measures["coverage"].value[row, 0] == pytest.approx(len(known) / len(ids))
        assert found.measures["held_out_coverage"].value[row, 0] == pytest.approx(len(loss) / np.sum(~build))


def test_one_document_has_neither_intervals_nor_a_cross_entropy():
    rng = np.random.default_rng(3)
    trace = with_firsts(zipf_ids(rng, 500, 10), rng.integers(0, 4, (500, 2)), 4, length=500)
    found = choice_entropy(trace, TraceSettings((1,), **QUICK))
    for name in ("held_out_coverage", "cross_entropy", "explained_held_out"):
        assert np.isnan(found.measures[name].value).all()
    entropy = found.measures["conditional_entropy"]
    assert np.isnan([entropy.low, entropy.high]).all()
    assert np.isfinite([entropy.value, entropy.null_low, entropy.p]).all()


def test_constant_routing_leaves_nothing_to_explain():
    trace = with_firsts(np.zeros(4096, int), np.zeros((4096, 1), int), 4)
    found = choice_entropy(trace, TraceSettings((1,), **QUICK))
    assert found.measures["plug_in"].value[0, 0] == 0
    assert found.measures["conditional_entropy"].value[0, 0] == pytest.approx(0, abs=1e-3)
    assert found.measures["conditional_entropy"].p[0, 0] == 1


def test_errors():
    rng = np.random.default_rng(4)
    trace = with_firsts(zipf_ids(rng, 500, 10), rng.integers(0, 4, (500, 1)), 4)
    with pytest.raises(NotTestableError, match=r"not ranked.*record the trace with probabilities"):
        choice_entropy(replace(trace, ranked=False), TraceSettings())
    with pytest.raises(NotTestableError, match="no context of 1, 3 ids occurs 501 times; give a longer trace"):
        choice_entropy(trace, TraceSettings((1, 3), min_count=501))
    one = replace(trace, ranked=False, experts=trace.experts[..., :1])  # one expert needs no ranking
    assert choice_entropy(one, TraceSettings((1,), permutations=0, samples=10)).measures["plug_in"].value[0, 0] > 1

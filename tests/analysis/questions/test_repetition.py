from dataclasses import replace

import numpy as np
import pytest

from analysis.questions.data import TraceSettings
from analysis.questions.repetition import _repetition, _uniform_repetition
from tests.synthetic_traces import make_trace
from varjax.errors import NotTestableError


def random_trace(seed, tokens=4000, layers=2, num_experts=8, top_k=2):
    rng = np.random.default_rng(seed)
    return make_trace(rng.random((tokens, layers, num_experts)).argsort(axis=-1)[..., :top_k], num_experts)


def test_chance_is_that_of_mixtrals_paper():
    chance = _uniform_repetition(8, 2)
    assert chance["first_choice"] == 0.125 and chance["first_or_second"] == pytest.approx(0.4643, abs=1e-4)
    assert _uniform_repetition(2, 2)["first_or_second"] == 1
    assert list(_uniform_repetition(8, 1)) == ["first_choice"]


def test_uniform_routing_repeats_by_chance_and_lies_within_the_band():
    outside = 0
    for seed in range(20):
        found = _repetition(random_trace(seed, top_k=3), TraceSettings(permutations=19, samples=10))
        for name, one in found.measures.items():
            np.testing.assert_allclose(one.value, found.uniform[name], atol=0.04)
            outside += bool(np.any((one.value < one.null_low) | (one.value > one.null_high)))
    assert outside <= 5  # 40 families that leave their bands with 5 % each: 6 or more with 1 %


def test_shares_are_those_of_a_loop():
    trace = random_trace(1, tokens=600, num_experts=5)
    trace = replace(trace, position=trace.position + (trace.position > 20) * 3)  # no pair over a gap
    first, either, pairs = np.zeros(2), np.zeros(2), 0
    for i in range(1, 600):
        if trace.document[i] == trace.document[i - 1] and trace.position[i] == trace.position[i - 1] + 1:
            pairs += 1
            for layer in range(2):
                before, after = trace.experts[i - 1, layer].tolist(), trace.experts[i, layer].tolist()
                first[layer] += before[0] == after[0]
                either[layer] += bool({*before} & {*after})
    found = _repetition(trace, TraceSettings(permutations=0, samples=10))
    assert found.pairs == pairs == 600 - 2 * 12
    np.testing.assert_allclose(found.measures["first_choice"].value, [first / pairs])
    np.testing.assert_allclose(found.measures["first_or_second"].value, [either / pairs])
    assert found.measures["first_choice"].null is None


def test_load_alone_repeats_more_than_uniform_routing_but_not_more_than_the_null():
    rng = np.random.default_rng(2)
    first = np.where(rng.random(5000) < 0.5, 0, rng.integers(1, 8, 5000))
    found = _repetition(make_trace(first[:, None, None], 8), TraceSettings(permutations=39, samples=10))
    one = found.measures["first_choice"]
    assert list(found.measures) == ["first_choice"]  # K = 1
    assert one.value[0, 0] > 2 * found.uniform["first_choice"]
    assert one.null_low[0, 0] <= one.value[0, 0] <= one.null_high[0, 0]


def test_persistent_routing_is_found():
    rng = np.random.default_rng(3)
    stays = rng.random(5000) < 0.5
    first = rng.integers(0, 8, 5000)[np.maximum.accumulate(np.where(stays, 0, np.arange(5000)))]
    found = _repetition(make_trace(first[:, None, None], 8), TraceSettings(permutations=39, samples=500))
    one = found.measures["first_choice"]
    assert one.low[0, 0] < 0.5 + 0.5 / 8 < one.high[0, 0]  # stays, or is drawn again by chance
    assert one.p[0, 0] == 1 / 40


def test_errors():
    trace = random_trace(4, tokens=100)
    with pytest.raises(NotTestableError, match="not ranked"):
        _repetition(replace(trace, ranked=False), TraceSettings())
    with pytest.raises(NotTestableError, match="no two tokens of the trace directly follow each other"):
        _repetition(replace(trace, position=2 * trace.position), TraceSettings())

import numpy as np
import pytest

from analysis.questions.data import TraceSettings
from analysis.questions.expert_load import _assignments, _expert_load
from tests.synthetic_traces import make_trace
from varjax.errors import NotTestableError


def test_even_load():
    experts = np.stack([np.arange(800) % 4, (np.arange(800) + 2) % 4], axis=-1)[:, None]
    found = _expert_load(make_trace(experts, 4, last_first=True), TraceSettings(samples=20))
    np.testing.assert_allclose(found.share.value, 0.25)
    np.testing.assert_allclose([found.imbalance.value, found.evenness.value], 1)
    assert found.unused.tolist() == [0] and found.documents == 16 and found.tokens == 800


def test_one_expert_for_all():
    experts = np.zeros((100, 2, 1))
    experts[::2, 1] = 3
    found = _expert_load(make_trace(experts, 4, last_first=True), TraceSettings(samples=20))
    np.testing.assert_allclose(found.share.value, [[1, 0.5], [0, 0], [0, 0], [0, 0.5]])
    np.testing.assert_allclose(found.imbalance.value, [[4, 2]])
    np.testing.assert_allclose(found.evenness.value, [[0, 0.5]], atol=1e-12)
    assert found.unused.tolist() == [3, 2]
    single = _expert_load(make_trace(np.zeros((100, 1, 1)), 1), TraceSettings(samples=5))
    assert single.evenness.value[0, 0] == single.imbalance.value[0, 0] == 1


def test_intervals_hold_the_truth_and_know_that_documents_differ():
    rng = np.random.default_rng(0)
    truth = np.array([0.4, 0.3, 0.2, 0.1])
    covered = []
    for seed in range(100):
        own = rng.dirichlet(20 * truth, 40)  # each document has its favorites
        experts = (rng.random((2000, 1)) > own.cumsum(axis=-1).repeat(50, axis=0)[:, :-1]).sum(axis=-1)
        share = _expert_load(make_trace(experts[:, None, None], 4), TraceSettings(samples=200, seed=seed)).share
        covered.append((share.low[:, 0] <= truth) & (truth <= share.high[:, 0]))
    assert 0.88 <= np.mean(covered) <= 0.98


def test_assignments_are_counted_per_document_that_has_tokens():
    rng = np.random.default_rng(1)
    trace = make_trace(rng.random((200, 3, 5)).argsort(axis=-1)[..., :2], 5)
    some = trace.of(np.array([True, False, True, True]))
    counts = _assignments(some)
    assert counts.shape == (3, 3, 5)
    for row, document in enumerate((0, 2, 3)):
        for layer in range(3):
            chosen = some.experts[some.document == document, layer]
            np.testing.assert_array_equal(counts[row, layer], [np.sum(chosen == e) for e in range(5)])


def test_one_document_has_no_interval_and_no_token_no_load():
    trace = make_trace(np.zeros((50, 1, 1)), 2)
    found = _expert_load(trace, TraceSettings(samples=5))
    assert np.isnan([found.imbalance.low, found.imbalance.high]).all() and found.imbalance.value[0, 0] == 2
    with pytest.raises(NotTestableError, match="the trace has no token"):
        _expert_load(trace.of(np.array([False])), TraceSettings())

"""Who stands above whom against a slow dictionary; shrinkage by hand; deviations against outputs drawn anew."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from varjax.answers import Answers
from varjax.keys import ANY
from varjax.routing import NO_ANSWER
from varjax.shrinkage import _parents, inherit, lineage, shrunk

EXPERTS, WIDTH = 3, 3


@st.composite
def keys_and_entries(draw):
    """Some keys of orders 0 to 3 in any order, gaps among them, and a pair's answer or none."""
    ids = st.lists(st.integers(0, 2), max_size=WIDTH).map(tuple)
    chosen = draw(st.lists(ids, unique=True, min_size=12, max_size=12))
    keys = np.array([(ANY,) * (WIDTH - len(key)) + key for key in chosen], np.int32)
    there = np.random.default_rng(draw(st.integers(0, 2**32 - 1))).random((len(keys), EXPERTS)) < 0.6
    entry = np.where(there, np.cumsum(there.ravel()).reshape(there.shape) - 1, NO_ANSWER).astype(np.int32)
    return chosen, keys, entry


@settings(max_examples=25, deadline=None)
@given(keys_and_entries())
def test_lineage_and_inheritance_equal_a_slow_search(case):
    chosen, keys, entry = case
    answer = {(key, e): entry[r, e] for r, key in enumerate(chosen) for e in range(EXPERTS) if entry[r, e] >= 0}
    chain = {key: [key[back:] for back in range(1, len(key) + 1)] for key in chosen}  # shorter keys, longest first
    expected = [next((chosen.index(k) for k in chain[key] if k in chosen), -1) for key in chosen]
    np.testing.assert_array_equal(_parents(keys), expected)

    inherited, (parent, depth) = inherit(keys, entry), lineage(keys, entry, len(answer) + 1)
    assert (parent[-1], depth[-1]) == (NO_ANSWER, 0)  # an answer that belongs to no pair
    for r, key in enumerate(chosen):
        for e in range(EXPERTS):
            above = [answer[k, e] for k in chain[key] if (k, e) in answer]
            own = answer.get((key, e))
            assert inherited[r, e] == (own if own is not None else above[0] if above else NO_ANSWER)
            if own is not None:
                assert (parent[own], depth[own]) == (above[0] if above else NO_ANSWER, len(above))


def answers_of(keys, entry, mean, mass, m2, count, **more) -> Answers:
    """One layer, 4, with the given columns."""
    columns = {"mean": (mean, float), "mass": (mass, float), "m2": (m2, float), "count": (count, np.int64)}
    arrays = {name: np.asarray(values, dtype)[None] for name, (values, dtype) in columns.items()}
    entry = np.asarray(entry, np.int32)[None]
    arrays["inputs"] = 2 * arrays["mean"] + 1
    figures = {"nonfinite": np.zeros(1, np.int64), "typical": np.zeros(1), "outliers": np.zeros((1, 2), np.int64)}
    return Answers(np.asarray(keys, np.int32), (4,), entry, **figures, **arrays, **more)


def test_an_answer_shrinks_toward_the_same_experts_at_the_longest_shorter_key():
    keys = [[ANY, ANY], [ANY, 2], [1, 2], [6, 5], [7, 2]]
    # Expert 0 has no answer at [2]: that of [1, 2] leans on the one of all tokens. Expert 1 has answers everywhere.
    entry = [[0, 1], [-1, 2], [3, 4], [5, -1], [-1, 6]]
    mean = [[9.0], [1.0], [2.0], [4.0], [3.0], [8.0], [0.0]]
    count, mass = [20, 10, 3, 1, 4, 12, 0], [10.0, 5.0, 1.5, 0.5, 2.0, 6.0, 0.0]  # 0.5 for each
    found = shrunk(answers_of(keys, entry, mean, mass, np.zeros(7), count), 4, 4.0)
    bigram = (3 * 2.0 + 4 * 1.0) / 7
    expected = [9.0, 1.0, bigram, (4.0 + 4 * 9) / 5, (4 * 3.0 + 4 * bigram) / 8, (12 * 8.0 + 4 * 9) / 16, bigram]
    np.testing.assert_allclose(found.answers[:, 0], expected, rtol=1e-6)
    assert found.parent.tolist() == [-1, -1, 1, 0, 2, 0, 2]
    # Without a prior only the one that never occurred takes its parent's place.
    none = shrunk(answers_of(keys, entry, mean, mass, np.zeros(7), count), 4, 0.0)
    np.testing.assert_allclose(none.answers[:, 0], [9, 1, 2, 4, 3, 8, 2], rtol=1e-6)


def drawn(rng, per_key, shrinkage, spread=0.7, between=0.5, hidden=6):
    """Answers of one expert at many keys, drawn around a common center, and the true root mean square distances."""
    num_keys = len(per_key)
    center = rng.normal(size=hidden)
    truth = center + between * rng.normal(size=(num_keys, hidden))
    outputs = [truth[r] + spread * rng.normal(size=(n, hidden)) for r, n in enumerate(per_key)]
    every = np.concatenate(outputs)
    sets = [every, *outputs]
    keys = np.arange(-1, num_keys)[:, None]
    mean = [one.mean(0) for one in sets]
    mass = [0.25 * len(one) for one in sets]
    m2 = [0.25 * np.square(one - one.mean(0)).sum() for one in sets]
    entry = np.arange(num_keys + 1)[:, None]
    answers = answers_of(keys, entry, mean, mass, m2, [len(one) for one in sets])
    found = shrunk(answers, 4, shrinkage)
    true = np.square(truth - found.answers[1:]).sum(1) + hidden * spread**2
    return found, np.sqrt(true)


@pytest.mark.parametrize("shrinkage", [0.0, 1.0, 5.0])
def test_the_deviation_is_that_of_outputs_that_were_not_collected(shrinkage):
    rng = np.random.default_rng(0)
    found, true = drawn(rng, np.full(400, 200), shrinkage)
    np.testing.assert_allclose(found.deviation[1:], true, rtol=0.1)
    # Few occurrences: right on average, though the mean was fitted to them. One without a prior is noise by itself.
    for n in (1, 2, 3, 8) if shrinkage else (2, 3, 8):
        found, true = drawn(rng, np.full(3000, n), shrinkage)
        ratio = np.square(found.deviation[1:]).mean() / np.square(true).mean()
        assert 0.85 < ratio < 1.2, (n, ratio)


def test_an_answer_of_one_occurrence_never_looks_certain():
    keys, entry, mean = [[ANY], [3]], [[0], [1]], [[3.0, 4.0], [3.0, 4.0]]
    once = shrunk(answers_of(keys, entry, mean, [0.25, 0.25], [0.0, 0.0], [1, 1]), 4, 1.0)
    np.testing.assert_allclose(once.deviation, [5.0, 5.0])  # as if there were no answer
    # Equal outputs, seen often: certain.
    often = shrunk(answers_of(keys, entry, mean, [25.0, 25.0], [0.0, 0.0], [100, 100]), 4, 1.0)
    np.testing.assert_allclose(often.deviation, 0.0, atol=1e-3)


def test_distilled_answers_are_used_as_they_are():
    keys, entry, mean = [[ANY], [3]], [[0], [1]], np.array([[3.0, 4.0], [-1.0, 0.5]], np.float32)
    counted = answers_of(keys, entry, mean, [25.0, 1.0], [50.0, 3.0], [100, 4], distilled=True)
    found = shrunk(counted, 4, 5.0)
    np.testing.assert_array_equal(found.answers, mean)
    np.testing.assert_allclose(found.deviation, np.sqrt([50 / 25, 3.0 / 1]), rtol=1e-6)
    assert not np.allclose(shrunk(replace(counted, distilled=False), 4, 5.0).answers, mean)


def test_a_layer_that_was_not_collected_is_refused():
    with pytest.raises(ValueError, match=r"no answers of layer 1; collected were the layers \[4\]"):
        shrunk(answers_of([[ANY]], [[0]], [[0.0]], [0.0], [0.0], [0]), 1, 1.0)

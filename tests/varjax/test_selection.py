"""What an answer is _worth, against the error that its occurrences make without it."""

import dataclasses
from itertools import combinations

import numpy as np
import pytest

from varjax.answers import Answers
from varjax.keys import ANY
from varjax.routing import NO_ANSWER
from varjax.shrinkage import _worth, likeliest, most_valuable
from varjax.stats import RoutingStats

EXPERTS, HIDDEN, IDS = 3, 4, 3
KEYS = [(ANY, i) for i in range(IDS)] + [(j, i) for j in range(IDS) for i in range(IDS)]


@pytest.fixture(scope="module")
def occurrences():
    """300 slots: previous id, id, expert, gate weight, output."""
    rng = np.random.default_rng(0)
    before, now, expert = (rng.integers(0, n, 300) for n in (IDS, IDS, EXPERTS))
    center = rng.normal(size=(IDS, IDS, EXPERTS, HIDDEN))
    outputs = center[before, now, expert] + rng.normal(size=(300, HIDDEN))
    return before, now, expert, rng.uniform(0.1, 1, 300), outputs


@pytest.fixture(scope="module")
def answers(occurrences) -> Answers:
    before, now, expert, weight, outputs = occurrences
    answers = Answers.empty(np.array(KEYS, np.int32), (5,), EXPERTS, HIDDEN)
    mean, mass, count = (np.zeros_like(getattr(answers, name)) for name in ("mean", "mass", "count"))
    for row, key in enumerate(answers.keys.tolist()):
        at_key = np.isin(before, key[0]) | (key[0] == ANY)
        at_key &= np.isin(now, key[1]) | (key[1] == ANY)
        for e in range(EXPERTS):
            here, entry = at_key & (expert == e), answers.entry[0, row, e]
            mass[0, entry], count[0, entry] = np.sum(weight[here] ** 2), here.sum()
            mean[0, entry] = (weight[here] ** 2) @ outputs[here] / max(mass[0, entry], 1e-30)
    return dataclasses.replace(answers, mean=mean, mass=mass, count=count)


def error(answers, occurrences, entry, key, expert):
    """Squared error of all occurrences of a key and an expert if the answer `entry` stands in; -1: nothing does."""
    before, now, experts, weight, outputs = occurrences
    here = (experts == expert) & (now == key[1]) & ((before == key[0]) | (key[0] == ANY))
    said = 0 if entry == NO_ANSWER else answers.mean[0, entry]
    return np.sum(weight[here, None] ** 2 * (outputs[here] - said) ** 2)


def test_an_answer_is_worth_the_error_that_would_be_made_without_it(answers, occurrences):
    """Without shrinkage answers are means, and the error that they remove is exactly what their worth says."""
    found = _worth(answers, 5, shrinkage=0.0)
    rows = {tuple(key): row for row, key in enumerate(answers.keys.tolist())}
    for key in KEYS:
        shorter = None if key[0] == ANY else (ANY, key[1])
        for expert in range(EXPERTS):
            entry = answers.entry[0, rows[key], expert]
            instead = NO_ANSWER if shorter is None else answers.entry[0, rows[shorter], expert]
            with_it, without = (error(answers, occurrences, one, key, expert) for one in (entry, instead))
            assert found[entry] == pytest.approx(without - with_it, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("bound", [1, 2, 5])
def test_the_kept_answers_are_those_of_the_best_choice(answers, bound):
    used = answers.entry[0, 1:5].reshape(-1)  # some keys only, and nothing of order 0
    value = _worth(answers, 5, shrinkage=1.0)
    best = max(combinations(used, bound), key=lambda chosen: value[list(chosen)].sum())
    fewer = most_valuable(answers, {5: np.append(used, NO_ANSWER)}, bound, shrinkage=1.0)
    assert set(fewer.entry[0, 1:][fewer.entry[0, 1:] != NO_ANSWER]) == set(best)
    left = fewer.entry != NO_ANSWER
    np.testing.assert_array_equal(fewer.entry[left], answers.entry[left])
    np.testing.assert_array_equal(fewer.entry[0, 0], answers.entry[0, 0])  # order 0 is not asked, and stays
    np.testing.assert_array_equal(fewer.mean, answers.mean)


def test_order_0_counts_where_it_is_in_use(answers):
    fewer = most_valuable(answers, {5: answers.entry[0, 0]}, 2, shrinkage=1.0)
    assert (fewer.entry[0, 0] != NO_ANSWER).sum() == 2


def test_a_bound_that_is_no_bound_keeps_everything(answers):
    used = {5: np.unique(answers.entry[0])}
    np.testing.assert_array_equal(most_valuable(answers, used, 10**6, 1.0).entry, answers.entry)


def test_the_likeliest_pairs_are_those_of_the_largest_squared_gate_weight():
    rng = np.random.default_rng(1)
    keys = np.array(KEYS, np.int32)
    stats = RoutingStats.empty(keys[::-1], (1, 2), 3, EXPERTS)
    count = rng.integers(0, 9, stats.count.shape)
    stats = dataclasses.replace(stats, count=count, sum_probs=count[..., None] * rng.dirichlet([1] * 3, count.shape))
    unknown = np.array([[7, 7]], np.int32)
    wanted = likeliest(stats, np.concatenate([keys, unknown]), (0, 2), bound=10)
    assert wanted.shape == (2, len(KEYS) + 1, EXPERTS) and wanted.sum((1, 2)).tolist() == [10, 10]
    assert not wanted[:, -1].any()
    for a, layer in enumerate((0, 2)):
        share = np.nan_to_num(stats.mean_probs[layer][::-1])
        mass = count[layer][::-1, None] * share**2
        assert mass[wanted[a, :-1]].min() > mass[~wanted[a, :-1]].max()
    every = likeliest(stats, keys, (0, 2), bound=1000)  # but for those that never occurred
    np.testing.assert_array_equal(every, np.broadcast_to((count[[0, 2], ::-1] > 0)[..., None], every.shape))

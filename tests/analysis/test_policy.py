import itertools

import numpy as np
import pytest

from analysis.collection.answers import collect_answers
from analysis.collection.statistics import KeySettings, choose_keys, collect
from analysis.policy import Measured, _prefix, _steps, candidate_rules, search
from varjax.answers import Rule
from varjax.config import VARConfig

READING = {"batch_size": 4, "max_length": 16, "progress": False}


def test_candidates_name_every_way_to_do_with_less():
    rules = candidate_rules(range(2), top_k=2, gate_ratios=(0.5,))
    assert rules == tuple(Rule(layer, *rest) for layer in (0, 1) for rest in ((0, 0.0), (1, 0.0), (2, 0.5)))


def test_steps_walk_the_lower_hull_by_price():
    # Layer 0: keeping one expert costs 1 %, none 4 %. Layer 1: one costs 3 % (above the hull), none 2 %.
    prices = {Rule(0, 1): 0.01, Rule(0, 0): 0.04, Rule(1, 1): 0.03, Rule(1, 0): 0.02}
    single = [Measured((rule,), loss, 2 - (2 - rule.kept) / 2) for rule, loss in prices.items()]
    assert _steps(single, num_layers=2, top_k=2) == [Rule(0, 1), Rule(1, 0), Rule(0, 0)] or _steps(
        single, num_layers=2, top_k=2
    ) == [Rule(1, 0), Rule(0, 1), Rule(0, 0)]
    assert _prefix(_steps(single, 2, 2), 3) == [Rule(0, 0), Rule(1, 0)]


def test_prefixes_lie_on_the_frontier_when_layers_add_up():
    rng = np.random.default_rng(0)
    rules = candidate_rules(range(3), 2, gate_ratios=(0.5,))
    saved = {rule: (2 - rule.kept + (0.4 if rule.gate_ratio else 0)) / 3 for rule in rules}
    loss = {rule: saved[rule] * rng.uniform(0.5, 2) for rule in rules}
    steps = _steps([Measured((rule,), loss[rule], 2 - saved[rule]) for rule in rules], 3, 2)
    choices = itertools.product(*([None, *(rule for rule in rules if rule.layer == layer)] for layer in range(3)))
    every = [(sum(saved[rule] for rule in some if rule), sum(loss[rule] for rule in some if rule)) for some in choices]
    for length in range(len(steps) + 1):
        taken = _prefix(steps, length)
        mine = sum(saved[rule] for rule in taken), sum(loss[rule] for rule in taken)
        assert not any(s >= mine[0] - 1e-9 and lo < mine[1] - 1e-9 for s, lo in every)


@pytest.fixture(scope="module")
def found(saved_model, documents):
    build, tune = documents[:120], documents[120:]
    keys = choose_keys(saved_model, build, 16, KeySettings(orders=(1,), min_count=3))
    stats = collect(saved_model, build, keys, **READING)
    rules = candidate_rules(range(saved_model.config.num_layers), saved_model.config.top_k, gate_ratios=(0.6,))
    answers = collect_answers(saved_model, build, stats.keys, (1,), rules, **READING)

    def run(budget):
        return search(saved_model, stats, answers, tune, VARConfig(), budget=budget, **READING)

    return run


def test_search_spends_the_budget_and_no_more(found):
    generous, strict = found(10.0), found(-1.0)
    assert generous.chosen.experts_per_token < 0.5  # only unseen and special tokens are left to the router
    assert strict.chosen == Measured((), 0.0, 2.0)
    assert all(policy is None for policy in map(strict.config.policy, range(2)))
    tight = found(0.002)
    assert tight.chosen.degradation <= 0.002
    assert generous.chosen.experts_per_token <= tight.chosen.experts_per_token

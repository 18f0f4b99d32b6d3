import itertools

import numpy as np
import pytest

from analysis.collection.answers import collect_answers
from analysis.collection.statistics import KeySettings, choose_keys, collect
from analysis.policy import QUANTILES, Choice, Measured, _prefix, _steps, candidate_tolerances, search
from varjax.config import VARConfig
from varjax.shrinkage import shrunk

READING = {"batch_size": 4, "max_length": 16, "progress": False}


def test_steps_walk_the_lower_hull_by_price():
    # Layer 0: the first half of an expert costs 1 %, a whole one 4 %. Layer 1: 3 % (above the hull), then 2 %.
    prices = {Choice(0, 0.1): 0.01, Choice(0, 0.2): 0.04, Choice(1, 0.1): 0.03, Choice(1, 0.2): 0.02}
    single = [Measured((choice,), loss, 2 - 5 * choice.tolerance) for choice, loss in prices.items()]
    steps = _steps(single, num_layers=2, top_k=2)
    assert sorted(steps[:2]) == [Choice(0, 0.1), Choice(1, 0.2)] and steps[2:] == [Choice(0, 0.2)]  # equal in price
    assert _prefix(steps, 3) == [Choice(0, 0.2), Choice(1, 0.2)]


def test_prefixes_lie_on_the_frontier_when_layers_add_up():
    rng = np.random.default_rng(0)
    every = [Choice(layer, tolerance) for layer in range(3) for tolerance in (0.1, 0.2, 0.3)]
    saved = {choice: 2 * choice.tolerance * rng.uniform(0.8, 1.2) for choice in every}
    loss = {choice: saved[choice] * rng.uniform(0.5, 2) for choice in every}
    steps = _steps([Measured((choice,), loss[choice], 2 - saved[choice]) for choice in every], 3, 2)
    together = itertools.product(*([None, *(c for c in every if c.layer == layer)] for layer in range(3)))
    sums = [[sum(of[choice] for choice in some if choice) for of in (saved, loss)] for some in together]
    for length in range(len(steps) + 1):
        taken = _prefix(steps, length)
        mine = sum(saved[choice] for choice in taken), sum(loss[choice] for choice in taken)
        assert not any(s >= mine[0] - 1e-9 and lo < mine[1] - 1e-9 for s, lo in sums)


@pytest.fixture(scope="module")
def collected(saved_model, documents):
    build = documents[:120]
    keys = choose_keys(saved_model, build, 16, KeySettings(orders=(1,), min_count=3))
    stats = collect(saved_model, build, keys, **READING)
    return stats, collect_answers(saved_model, build, stats.keys, (0, 1), **READING)


@pytest.fixture(scope="module")
def found(saved_model, documents, collected):
    def run(budget):
        return search(saved_model, *collected, documents[120:], VARConfig(), budget=budget, **READING)

    return run


@pytest.mark.parametrize("layer", [0, 1])
def test_tolerances_are_quantiles_of_an_answers_error_and_the_last_drops_all(collected, layer):
    answers = collected[1]
    tolerances = candidate_tolerances(answers, layer, 1.0)
    assert list(tolerances) == sorted(set(tolerances)) and 2 < len(tolerances) <= len(QUANTILES)
    count, deviation = answers.count[layer], shrunk(answers, layer, 1.0).deviation
    error = np.repeat(np.sqrt(answers.mass[layer] / np.maximum(count, 1)) * deviation, count)
    expected = np.quantile(error, QUANTILES[:-1], method="inverted_cdf")
    np.testing.assert_allclose(tolerances[:-1], np.unique(expected), rtol=1e-6)
    assert tolerances[-1] > deviation.max()  # no gate weight is above 1


def test_search_spends_the_budget_and_no_more(found):
    generous, strict = found(10.0), found(-1.0)
    assert generous.chosen.experts_per_token < 0.6  # unseen and special tokens, and experts that never spoke at a key
    assert strict.chosen == Measured((), 0.0, 2.0)
    assert all(policy is None for policy in map(strict.config.policy, range(2)))
    tight = found(0.002)
    assert tight.chosen.degradation <= 0.002
    assert generous.chosen.experts_per_token <= tight.chosen.experts_per_token
    assert len(generous.single) == sum(
        len({p.choices for p in generous.single if p.choices[0].layer == l}) for l in (0, 1)
    )


def test_the_config_that_was_chosen_does_what_was_measured(saved_model, documents, collected, found):
    """The search shares one table, and gives the layers that stay open a tolerance of 0."""
    from analysis.quality import plain_runner, score, var_runner
    from varjax.model import VARModel
    from varjax.step import summary
    from varjax.table import build

    result = found(0.01)
    table = build(collected[0], result.config, saved_model.config.top_k, collected[1])
    var_model = VARModel(saved_model, result.config, table=table)
    scoring = {"documents": documents[120:], **READING}
    plain, _ = score(plain_runner(saved_model), None, **scoring)
    scores, state = score(var_runner(var_model), var_model.init(), **scoring)
    assert np.expm1(scores.nll_per_token - plain.nll_per_token) == pytest.approx(result.chosen.degradation, abs=1e-5)
    experts = summary(state.counters, saved_model.config.top_k)["experts_per_token"]
    assert experts == pytest.approx(result.chosen.experts_per_token, abs=1e-2)
    assert 0 < experts < 2

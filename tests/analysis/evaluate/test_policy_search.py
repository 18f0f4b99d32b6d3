"""The ladder of policies, and a search that climbs it as far as a budget allows."""

import itertools

import numpy as np
import pytest

from analysis.evaluate.losses import plain_runner, score, var_runner
from analysis.evaluate.points import Subject
from analysis.evaluate.policy_search import (
    QUANTILES,
    Choice,
    Ladder,
    Measured,
    _candidate_tolerances,
    _hull_steps,
    policies,
    search,
)
from varjax.config import VARConfig
from varjax.model import VARModel
from varjax.shrinkage import shrunk
from varjax.step import summary

READING = {"batch_size": 20, "max_length": 16, "progress": False}


@pytest.fixture
def ladder():
    """Layer 0: half an expert costs 1 %, a whole one 4 %. Layer 1: 3 % (above the hull), then 2 %."""
    prices = {Choice(0, 0.1): 0.01, Choice(0, 0.2): 0.04, Choice(1, 0.1): 0.03, Choice(1, 0.2): 0.02}
    single = [Measured((choice,), loss, 2 - 5 * choice.tolerance) for choice, loss in prices.items()]
    return Ladder(tuple(single), tuple(_hull_steps(single, top_k=2)))


def test_steps_walk_the_lower_hull_by_price(ladder):
    choices = [step.choice for step in ladder.steps]
    assert sorted(choices[:2]) == [Choice(0, 0.1), Choice(1, 0.2)] and choices[2:] == [Choice(0, 0.2)]  # equal in price
    assert [step.loss for step in ladder.steps] == pytest.approx([0.01, 0.02, 0.03])
    assert ladder.after(3) == [Choice(0, 0.2), Choice(1, 0.2)]


def test_a_budget_takes_whole_steps_and_a_part_of_the_next(ladder):
    assert ladder.within(0.0) == []
    assert ladder.within(0.005) == [Choice(0, pytest.approx(0.05))]
    assert ladder.within(0.02) == [Choice(0, 0.1), Choice(1, pytest.approx(0.1))]
    assert ladder.within(0.045) == [Choice(0, pytest.approx(0.15)), Choice(1, 0.2)]
    assert ladder.within(1.0) == ladder.after(3)


def test_more_budget_never_lowers_a_tolerance(ladder):
    def tolerances(budget):
        return [dict(ladder.within(budget)).get(layer, 0.0) for layer in (0, 1)]

    climbing = np.array([tolerances(budget) for budget in np.linspace(0, 0.07, 50)])
    assert np.all(np.diff(climbing, axis=0) >= 0) and len(np.unique(climbing, axis=0)) > 40


def test_a_step_that_gains_is_taken_for_nothing():
    single = [Measured((Choice(0, 0.1),), -0.002, 1.5), Measured((Choice(1, 0.1),), 0.004, 1.5)]
    steps = _hull_steps(single, top_k=2)
    assert Ladder(tuple(single), tuple(steps)).within(0.0) == [Choice(0, 0.1), Choice(1, pytest.approx(0.05))]


def test_prefixes_lie_on_the_frontier_when_layers_add_up():
    rng = np.random.default_rng(0)
    every = [Choice(layer, tolerance) for layer in range(3) for tolerance in (0.1, 0.2, 0.3)]
    saved = {choice: 2 * choice.tolerance * rng.uniform(0.8, 1.2) for choice in every}
    loss = {choice: saved[choice] * rng.uniform(0.5, 2) for choice in every}
    single = tuple(Measured((choice,), loss[choice], 2 - saved[choice]) for choice in every)
    ladder = Ladder(single, tuple(_hull_steps(single, 2)))
    together = itertools.product(*([None, *(c for c in every if c.layer == layer)] for layer in range(3)))
    sums = [[sum(of[choice] for choice in some if choice) for of in (saved, loss)] for some in together]
    for length in range(len(ladder.steps) + 1):
        taken = ladder.after(length)
        mine = sum(saved[choice] for choice in taken), sum(loss[choice] for choice in taken)
        assert mine[1] == pytest.approx(sum(step.loss for step in ladder.steps[:length]))
        assert not any(s >= mine[0] - 1e-9 and lo < mine[1] - 1e-9 for s, lo in sums)


@pytest.mark.parametrize("layer", [0, 1])
def test_tolerances_are_quantiles_of_an_answers_error_and_the_last_drops_all(collected, layer):
    answers = collected.answers
    tolerances = _candidate_tolerances(answers, layer, 1.0)
    assert list(tolerances) == sorted(set(tolerances)) and 2 < len(tolerances) <= len(QUANTILES)
    count, deviation = answers.count[layer], shrunk(answers, layer, 1.0).deviation
    error = np.repeat(np.sqrt(answers.mass[layer] / np.maximum(count, 1)) * deviation, count)
    expected = np.quantile(error, QUANTILES[:-1], method="inverted_cdf")
    np.testing.assert_allclose(tolerances[:-1], np.unique(expected), rtol=1e-6)
    assert tolerances[-1] > deviation.max()  # no gate weight is above 1


@pytest.fixture(scope="module")
def subject(saved_model, collected):
    return Subject(saved_model, *collected[:2], VARConfig(), collected.held_out, **READING)


@pytest.fixture(scope="module")
def found(subject):
    return lambda budget: search(subject, budget=budget)


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


def test_the_config_that_was_chosen_does_what_was_measured(subject, found):
    """The search shares one table, and gives the layers that stay open a tolerance of 0."""
    result = found(0.01)
    var_model = VARModel(subject.model, result.config, table=subject.build(result.config, keep_shapes=False))
    plain, _ = score(plain_runner(subject.model), None, subject.documents, **READING)
    scores, state = score(var_runner(var_model), var_model.init(), subject.documents, **READING)
    assert np.expm1(scores.nll_per_token - plain.nll_per_token) == pytest.approx(result.chosen.degradation, abs=1e-5)
    experts = summary(state.counters, 2)["experts_per_token"]
    assert experts == pytest.approx(result.chosen.experts_per_token, abs=1e-2)
    assert 0 < experts < 2


@pytest.mark.parametrize("experts", [1, 2, 8])
def test_no_key_has_too_much_entropy_for_a_policy(experts):
    (policy,) = policies([Choice(0, 0.5)], experts, (1,)).values()
    assert policy.entropy_threshold > np.log(experts) + 1e-6  # that of a gate may be rounded up

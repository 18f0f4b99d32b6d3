"""A search for the policy with the fewest experts within a budget: one price for all layers."""

import dataclasses

import numpy as np
import pytest

from analysis.evaluate.losses import plain_runner, score, var_runner
from analysis.evaluate.points import Subject, score_point
from analysis.evaluate.policy_search import Measured, policies, search
from analysis.evaluate.prices import Choice
from varjax.config import VARConfig
from varjax.errors import InputError
from varjax.model import VARModel
from varjax.routing import NO_ANSWER
from varjax.step import summary

READING = {"batch_size": 20, "max_length": 16, "progress": False}


@pytest.fixture(scope="module")
def subject(saved_model, collected, tmp_path_factory):
    folder = tmp_path_factory.mktemp("points")  # prices and losses are measured once
    return Subject(saved_model, *collected[:2], VARConfig(), collected.held_out, folder=folder, **READING)


@pytest.fixture(scope="module")
def found(subject):
    return lambda budget: search(subject, budget=budget)


def test_search_spends_the_budget_and_no_more(found):
    generous, strict = found(10.0), found(-1.0)
    assert generous.chosen.experts_per_token < 0.6  # unseen and special tokens, and experts that never spoke at a key
    assert strict.chosen == Measured((), 0.0, 2.0)
    assert all(policy is None for policy in map(strict.config.policy, range(2)))
    tight = found(0.002)
    assert tight.chosen.degradation <= 0.002 and tight.chosen.experts_per_token < 1.0
    price = tight.chosen.choices[0].tolerance ** 2
    beyond = [one.choices[0].tolerance ** 2 for one in tight.path if one.degradation > 0.002]
    assert price < min(beyond) < 1.06 * price or tight.chosen.degradation >= 0.97 * 0.002
    assert 0.009 < found(0.01).chosen.degradation <= 0.01
    assert generous.chosen.experts_per_token <= tight.chosen.experts_per_token
    assert all(point.experts_per_token >= tight.chosen.experts_per_token for point in tight.path[:1])


def test_one_price_holds_in_all_layers(found):
    result = found(0.002)
    prices = [
        cost * choice.tolerance**2 for cost, choice in zip(result.prices.cost, result.chosen.choices, strict=True)
    ]
    np.testing.assert_allclose(prices, prices[0], rtol=1e-9)


def test_a_search_is_read_back(subject, found, monkeypatch):
    first = found(0.01)
    monkeypatch.setattr("analysis.evaluate.points.score", None)
    monkeypatch.setattr("analysis.evaluate.prices._measured", None)
    again = found(0.01)
    assert (again.chosen, again.path) == (first.chosen, first.path)


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


def test_a_text_without_answers_saves_nothing(subject):
    nothing = dataclasses.replace(subject.answers, entry=np.full_like(subject.answers.entry, NO_ANSWER))
    found = search(dataclasses.replace(subject, answers=nothing), budget=0.01)
    assert found.chosen == Measured((), 0.0, 2.0) and len(found.path) == 1


def test_a_search_needs_finite_losses(subject, monkeypatch):
    plain = score_point(subject)
    lost = dataclasses.replace(plain, nll=plain.nll * np.nan)
    monkeypatch.setattr("analysis.evaluate.policy_search.score_point", lambda _, *policy: lost if policy else plain)
    with pytest.raises(InputError, match="losses that are not finite"):
        search(subject, budget=0.01)


@pytest.mark.parametrize("experts", [1, 2, 8])
def test_no_key_has_too_much_entropy_for_a_policy(experts):
    (policy,) = policies([Choice(0, 0.5)], experts, (1,)).values()
    assert policy.entropy_threshold > np.log(experts) + 1e-6  # that of a gate may be rounded up

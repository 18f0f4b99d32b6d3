"""What errors cost: against the divergence that a planted error really causes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from analysis.evaluate.points import Subject
from analysis.evaluate.policy_search import policies
from analysis.evaluate.prices import Choice, Prices, _errors, _Probe, measure_prices
from varjax import step as var_step
from varjax.config import VARConfig
from varjax.routing import LayerAnswers
from varjax.step import Settings

PRICES = Prices(
    layers=(0, 3),
    cost=np.array([4.0, 1.0]),
    errors=np.stack([np.linspace(0.1, 1, 10), np.linspace(0.2, 2, 10)]),
    slots=np.array([1.0, 0.5]),
)


def test_tolerances_follow_the_price():
    assert PRICES.choices(1.0) == [Choice(0, 0.5), Choice(3, 1.0)]
    # Layer 0 drops the errors 0.1 to 0.4 of ten, layer 3 those from 0.2 to 0.8.
    squares = 0.01 + 0.04 + 0.09 + 0.16
    assert PRICES.expected(1.0) == pytest.approx(4 * squares / 10 + 0.5 * 4 * squares / 10)


def test_a_budget_is_spent_but_not_exceeded():
    assert PRICES.within(0.0) == [] and PRICES.within(-1.0) == []
    budgets = np.linspace(1e-4, 3, 40)
    found = [PRICES.at(budget) for budget in budgets]
    assert np.all(np.diff(found) >= 0)
    for budget, price in zip(budgets, found, strict=True):
        assert PRICES.expected(price) <= budget
        assert price == PRICES.highest or PRICES.expected(1.001 * price + 1e-9) > budget * 0.6
    everything = [choice.tolerance for choice in PRICES.within(1e9)]
    assert all(tolerance > errors[-1] for tolerance, errors in zip(everything, PRICES.errors, strict=True))


def test_nothing_is_dropped_where_no_answer_was_of_use():
    one = dataclasses.replace(PRICES, cost=np.array([4.0, 0.0]), slots=np.array([1.0, 0.0]))
    assert one.choices(1.0) == [Choice(0, 0.5)]
    none = dataclasses.replace(one, cost=np.zeros(2), errors=np.zeros((2, 10)), slots=np.zeros(2))
    assert none.within(0.01) == none.choices(none.highest) == []


@pytest.fixture(scope="module")
def subject(saved_model, collected):
    reading = {"batch_size": 20, "max_length": 16, "progress": False}
    return Subject(saved_model, *collected[:2], VARConfig(), collected.held_out, **reading)


@pytest.fixture(scope="module")
def everything(subject):
    layers = policies([Choice(0, 1.0), Choice(1, 1.0)], subject.stats.num_experts, (1, 2), frequency_threshold=1)
    return dataclasses.replace(subject.config, default=None, layers=layers, cache_size=0)


def test_divergences_are_those_of_small_errors(subject, everything):
    """At the last position of a text, where an error has one place to show, and averaged over many drawn labels."""
    model, table, factor, layers = subject.model, subject.build(everything), 0.05, (0, 1)
    rules = dataclasses.replace(table.rules, tolerance=jnp.zeros(2))
    table = dataclasses.replace(table, rules=rules, experts_kept=jnp.full_like(table.experts_kept, 2))
    ids = jnp.asarray(np.stack([one.ids[:16] for one in subject.documents]))
    mask = jnp.ones(ids.shape, bool)
    given = {"network": model.network, "config": everything, "layers": layers}
    draws = [_errors(model.params, table, ids, mask, jax.random.key(seed), **given) for seed in range(80)]
    valid = np.asarray(draws[0][2])[..., -1, 0]  # [A, B], of the best slot
    predicted = np.mean([np.asarray(divergence) for _, divergence, _ in draws], axis=0)[..., -1, 0]

    state = var_step.init(table, everything, len(ids))
    plan = var_step.plan(table, state, ids, 0.0, Settings.of(everything, 2))
    plain = model.network.forward(model.params, ids, recorded_layers=layers)
    target = jax.nn.log_softmax(plain.logits[:, -1])
    for layer in layers:
        known = table.answers[layer]
        answer = known.find(plan.row[layer], plain.routing.experts[layer])
        rows = known.answers[answer] * plain.routing.weights[layer][..., None]
        error = (rows - plain.recorded[layer].outputs)[:, :, 0].at[:, :-1].set(0)
        probes = []
        for place, one in enumerate(table.answers):
            own = {field.name: getattr(one, field.name) for field in dataclasses.fields(LayerAnswers)}
            probes.append(_Probe(**own, added=factor * error if place == layer else jnp.zeros_like(error)))
        out = model.network.forward(model.params, ids, plan=dataclasses.replace(plan, answers=tuple(probes)))
        divergence = jnp.sum(jnp.exp(target) * (target - jax.nn.log_softmax(out.logits[:, -1])), axis=-1) / factor**2
        real, expected = np.asarray(divergence)[valid[layer]], predicted[layer][valid[layer]]
        assert len(real) > 10
        assert expected.sum() == pytest.approx(real.sum(), rel=0.15)


def test_prices_are_those_of_the_cheaper_half(subject, everything):
    found = measure_prices(subject, everything, subject.build(everything))
    assert (found.cost > 0).all() and (np.diff(found.errors, axis=1) >= 0).all()
    assert (found.slots > 0).all() and (found.slots < 2).all()

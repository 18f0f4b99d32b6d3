"""Tables against a slow reading of the statistics, one context at a time."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from varjax.answers import Rule, residual_rows
from varjax.config import LayerPolicy, VARConfig
from varjax.keys import ANY, NONE, contexts
from varjax.routing import FAST, LEARNED, NO_ROW
from varjax.stats import RoutingStats
from varjax.table import build, fast_plan

LAYERS, EXPERTS, TOP_K, HIDDEN = 4, 5, 3, 2
POLICIES = {
    0: LayerPolicy(kept=1, orders=(1, 2)),
    1: None,
    2: LayerPolicy(kept=None, residual=False, orders=(2,), choice_from="table", frequency_threshold=3),
    3: LayerPolicy(kept=3, gate_ratio=0.5, orders=(1,), entropy_threshold=0.9),
}
CONFIG = VARConfig(
    frequency_threshold=8, entropy_threshold=0.6, mass_threshold=0.8, residual_shrinkage=2.0, layers=POLICIES
)
RULES = [Rule(0, 1), Rule(3, 3, 0.5), Rule(0, 0)]

fast_plan_jit = jax.jit(fast_plan)


def slow_plan(context, layer, stats, answers):
    """kept, residual row's values (None: none), experts, weights of one context [C]; None if the layer is open."""
    policy = CONFIG.policy(layer)
    if policy is None:
        return None
    for order in sorted(policy.orders, reverse=True):
        key = [ANY] * (2 - order) + list(context[2 - order :])
        at = [r for r, k in enumerate(stats.keys.tolist()) if k == key]
        if not at or stats.count[layer, at[0]] < policy.frequency_threshold:
            continue
        row = at[0]
        if not stats.entropy.mean[layer, row] <= policy.entropy_threshold:
            continue
        residual = None
        if policy.residual:
            rule = Rule.of(layer, policy)
            own = [r for r, k in enumerate(answers.keys.tolist()) if k == key]
            if not own or answers.count[answers.rules.index(rule), own[0]] == 0:
                continue
            residual = residual_rows(answers, rule, CONFIG.residual_shrinkage)[own[0]]
        probs = stats.sum_probs[layer, row]
        experts = sorted(range(EXPERTS), key=lambda e: -probs[e])[:TOP_K]
        weights = probs[experts] / probs[experts].sum()
        kept = policy.kept
        if kept is None:
            kept = next(m for m in range(1, TOP_K + 1) if m == TOP_K or weights[:m].sum() >= CONFIG.mass_threshold)
        return kept, residual, experts, weights
    return None


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_plan_equals_the_slow_one(random_stats, random_answers, seed):
    rng = np.random.default_rng(seed)
    stats = random_stats(rng, LAYERS, EXPERTS)
    answers = random_answers(rng, stats, RULES, HIDDEN)
    assert_plan_is_right(build(stats, CONFIG, TOP_K, answers, keep_shapes=True), stats, answers, rng)


def test_the_plan_is_the_same_when_useless_rows_are_dropped(random_stats, random_answers):
    rng = np.random.default_rng(0)
    stats = random_stats(rng, LAYERS, EXPERTS)
    answers = random_answers(rng, stats, RULES, HIDDEN)
    table = build(stats, CONFIG, TOP_K, answers)
    assert len(table.index.keys) < len(stats.keys)
    assert [len(rows) for rows in table.residuals] == [len(table.index.keys), 1, 1, len(table.index.keys)]
    assert_plan_is_right(table, stats, answers, rng)


def assert_plan_is_right(table, stats, answers, rng):
    recent = jnp.full((2, 1), NONE, jnp.int32)
    context = contexts(jnp.asarray(rng.integers(0, 4, size=(2, 16)), jnp.int32), recent, 2)
    plan = jax.tree.map(np.asarray, fast_plan_jit(table, context))
    for l, b, t in np.ndindex(plan.tier.shape):
        expected = slow_plan(np.asarray(context)[b, t].tolist(), l, stats, answers)
        if expected is None:
            assert (plan.tier[l, b, t], plan.kept[l, b, t], plan.row[l, b, t]) == (LEARNED, TOP_K, NO_ROW)
            assert plan.routing.experts[l, b, t].tolist() == [EXPERTS] * TOP_K
            assert plan.routing.weights[l, b, t].tolist() == [0] * TOP_K
            continue
        kept, residual, experts, weights = expected
        assert (plan.tier[l, b, t], plan.kept[l, b, t]) == (FAST, kept)
        assert plan.routing.experts[l, b, t].tolist() == experts
        np.testing.assert_allclose(plan.routing.weights[l, b, t], weights, rtol=1e-6)
        row = plan.row[l, b, t]
        assert (row == NO_ROW) == (residual is None)
        if residual is not None:
            np.testing.assert_array_equal(table.residuals[l][row], residual)


def test_rows_that_no_layer_may_use_are_dropped(random_stats):
    stats = random_stats(np.random.default_rng(4), LAYERS, EXPERTS)
    config = VARConfig(default=LayerPolicy(kept=1, residual=False, orders=(1, 2)), frequency_threshold=15)
    table = build(stats, config, TOP_K)
    usable = ((stats.count >= 15) & (stats.entropy.mean <= config.entropy_threshold)).any(axis=0)
    assert 0 < usable.sum() < len(usable)
    np.testing.assert_array_equal(table.index.keys, stats.keys[usable])
    assert np.asarray(table.eligible).any(axis=0).all()
    assert table.residuals is None


def test_a_table_without_any_eligible_row_leaves_everything_open(random_stats):
    stats = random_stats(np.random.default_rng(0), LAYERS, EXPERTS)
    config = VARConfig(frequency_threshold=10**6, default=LayerPolicy(residual=False))
    context = contexts(jnp.asarray([[0, 1, 2, 3]], jnp.int32), jnp.full((1, 1), NONE, jnp.int32), 2)
    for nothing in (config, replace(config, default=None)):
        assert (np.asarray(fast_plan_jit(build(stats, nothing, TOP_K), context).tier) == LEARNED).all()


def test_any_policy_has_the_same_shapes_and_compiles_nothing_new(random_stats, random_answers):
    rng = np.random.default_rng(1)
    stats = random_stats(rng, LAYERS, EXPERTS)
    answers = random_answers(rng, stats, RULES, HIDDEN)
    context = jnp.zeros((1, 3, 2), jnp.int32)
    plans = jax.jit(fast_plan)
    no_residual = LayerPolicy(kept=2, residual=False, orders=(2,))
    configs = [
        CONFIG,
        replace(CONFIG, layers={**POLICIES, 0: LayerPolicy(kept=0)}),
        VARConfig(default=None),
        VARConfig(default=no_residual, frequency_threshold=3),
    ]
    tables = [build(stats, config, TOP_K, answers, keep_shapes=True) for config in configs]
    plans(tables[0], context)
    compiled = plans._cache_size()
    for table in tables:
        assert jax.tree.structure(table) == jax.tree.structure(tables[0])
        assert jax.tree.map(jnp.shape, table) == jax.tree.map(jnp.shape, tables[0])
        plans(table, context)
    assert plans._cache_size() == compiled
    assert [r.shape[0] for r in tables[0].residuals] == [len(stats.keys), 1, 1, len(stats.keys)]


def test_without_normalisation_the_weights_are_mean_probabilities(random_stats):
    stats = random_stats(np.random.default_rng(2), LAYERS, EXPERTS)
    config = VARConfig(default=LayerPolicy(kept=1, residual=False))
    table = build(stats, config, EXPERTS, normalise=False, keep_shapes=True)
    seen = stats.count > 0
    best = -np.sort(-stats.mean_probs[seen], axis=-1)
    np.testing.assert_allclose(np.asarray(table.routing.weights)[seen], best, rtol=1e-6)
    assert (np.asarray(table.routing.experts)[~seen] == EXPERTS).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": {2: LayerPolicy(kept=4, residual=False)}}, r"layer 2: kept=4, but the model runs only 3"),
        ({"layers": {1: LayerPolicy(kept=1, residual=False, orders=(3,))}}, r"layer 1: orders \[3\]"),
        ({"layers": {1: LayerPolicy(kept=1)}}, r"layer 1: no residuals for Rule\(layer=1, kept=1"),
        ({"layers": {7: None}}, "layer 7: the statistics have only layers 0 to 3"),
        ({"cache_layers": (4,)}, "layer 4: the statistics have only layers 0 to 3"),
    ],
)
def test_a_policy_that_cannot_be_carried_out_is_explained(random_stats, random_answers, changes, message):
    rng = np.random.default_rng(3)
    stats = random_stats(rng, LAYERS, EXPERTS)
    config = VARConfig(default=LayerPolicy(kept=1, residual=False), **changes)
    with pytest.raises(ValueError, match=message):
        build(stats, config, TOP_K, random_answers(rng, stats, RULES, HIDDEN))


def test_residuals_that_were_never_collected_are_missed(random_stats):
    stats = random_stats(np.random.default_rng(3), LAYERS, EXPERTS)
    with pytest.raises(ValueError, match=r"layer 0: .*there are none\); collect them or set residual=False"):
        build(stats, VARConfig(), TOP_K)
    empty = RoutingStats.empty(np.zeros((0, 2), np.int32), (1, 2), LAYERS, EXPERTS)
    with pytest.raises(ValueError, match="no key at all"):
        build(empty, VARConfig(), TOP_K)

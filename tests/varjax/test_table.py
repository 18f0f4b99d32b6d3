"""Tables against a slow reading of the statistics, one context at a time."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from varjax.answers import Answers
from varjax.config import LayerPolicy, VARConfig
from varjax.keys import ANY, NONE, contexts
from varjax.routing import FAST, LEARNED, NO_ANSWER, NO_ROW, Dropped
from varjax.shrinkage import shrunk
from varjax.stats import RoutingStats
from varjax.step import Settings, follow, init, plan
from varjax.table import build_table, fast_plan, with_policies

LAYERS, EXPERTS, TOP_K, HIDDEN = 4, 5, 3, 2
POLICIES = {
    0: LayerPolicy(experts_kept=1, ngram_orders=(1, 2)),
    1: None,
    2: LayerPolicy(experts_kept=None, use_answers=False, ngram_orders=(2,), choice_from="table", frequency_threshold=3),
    3: LayerPolicy(experts_kept=None, tolerance=0.5, ngram_orders=(0, 1), entropy_threshold=0.9),
}
CONFIG = VARConfig(
    frequency_threshold=8, entropy_threshold=0.6, mass_threshold=0.8, answer_shrinkage=2.0, layers=POLICIES
)
COLLECTED = (0, 3)

fast_plan_jit = jax.jit(fast_plan)


def slow_answer(key, expert, layer, answers):
    """The answer of an expert at a key, or at the longest shorter one; that of all tokens at order 0 only."""
    known = dict(zip(map(tuple, answers.keys.tolist()), answers.entry[COLLECTED.index(layer)], strict=True))
    ids = [i for i in key if i != ANY]
    for back in range(max(len(ids), 1)):
        shorter = (*[ANY] * (2 - len(ids) + back), *ids[back:])
        if shorter in known and known[shorter][expert] != NO_ANSWER:
            return known[shorter][expert]
    return NO_ANSWER


def slow_plan(context, layer, stats, answers):
    """kept, answers [E] (None: not added), experts, weights of one context [C]; None if the layer is open."""
    policy = CONFIG.policy(layer)
    if policy is None:
        return None
    for order in sorted(policy.ngram_orders, reverse=True):
        key = [ANY] * (2 - order) + list(context[2 - order :])
        at = [r for r, k in enumerate(stats.keys.tolist()) if k == key]
        if order > 0 and (not at or stats.count[layer, at[0]] < policy.frequency_threshold):
            continue
        if order > 0 and not stats.entropy.mean[layer, at[0]] <= policy.entropy_threshold:
            continue
        found = None
        if policy.use_answers:
            found = [slow_answer(key, expert, layer, answers) for expert in range(EXPERTS)]
            if all(answer == NO_ANSWER for answer in found):
                continue
        if order == 0:
            return TOP_K, found, [EXPERTS] * TOP_K, [0.0] * TOP_K
        probs = stats.sum_probs[layer, at[0]]
        experts = sorted(range(EXPERTS), key=lambda e: -probs[e])[:TOP_K]
        weights = probs[experts] / probs[experts].sum()
        kept = policy.experts_kept
        if kept is None and policy.tolerance is not None:
            kept = TOP_K
        elif kept is None:
            kept = next(m for m in range(1, TOP_K + 1) if m == TOP_K or weights[:m].sum() >= CONFIG.mass_threshold)
        return kept, found, experts, weights
    return None


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_plan_equals_the_slow_one(random_stats, random_answers, seed):
    rng = np.random.default_rng(seed)
    stats = random_stats(rng, LAYERS, EXPERTS)
    answers = random_answers(rng, stats, COLLECTED, HIDDEN)
    assert_plan_is_right(build_table(CONFIG, stats, answers, top_k=TOP_K, keep_shapes=True), stats, answers, rng)


def test_the_plan_is_the_same_when_useless_rows_are_dropped(random_stats, random_answers):
    rng = np.random.default_rng(0)
    stats = random_stats(rng, LAYERS, EXPERTS)
    answers = random_answers(rng, stats, COLLECTED, HIDDEN)
    table = build_table(CONFIG, stats, answers, top_k=TOP_K)
    assert len(table.index.keys) < len(stats.keys)
    rows = len(table.index.keys)
    assert [known.entry.shape[0] for known in table.answers] == [rows, 1, 1, rows]
    for known, whole in zip(
        table.answers, build_table(CONFIG, stats, answers, top_k=TOP_K, keep_shapes=True).answers, strict=True
    ):
        assert len(np.unique(known.entry[known.entry != NO_ANSWER])) in (len(known.answers), 0)  # none is idle
        assert len(known.answers) <= len(whole.answers)
    assert_plan_is_right(table, stats, answers, rng)


def assert_plan_is_right(table, stats, answers, rng):
    recent = jnp.full((2, 1), NONE, jnp.int32)
    context = contexts(jnp.asarray(rng.integers(0, 4, size=(2, 16)), jnp.int32), recent, 2)
    plan = jax.tree.map(np.asarray, fast_plan_jit(table, context))
    entries, rows, deviations = (
        [np.asarray(getattr(known, name)) for known in table.answers] for name in ("entry", "answers", "deviation")
    )
    estimates = {layer: shrunk(answers, layer, CONFIG.answer_shrinkage) for layer in COLLECTED}
    for l, b, t in np.ndindex(plan.tier.shape):
        expected = slow_plan(np.asarray(context)[b, t].tolist(), l, stats, answers)
        if expected is None:
            assert (plan.tier[l, b, t], plan.experts_kept[l, b, t], plan.row[l, b, t]) == (LEARNED, TOP_K, NO_ROW)
            assert plan.routing.experts[l, b, t].tolist() == [EXPERTS] * TOP_K
            assert plan.routing.weights[l, b, t].tolist() == [0] * TOP_K
            continue
        kept, found, experts, weights = expected
        assert (plan.tier[l, b, t], plan.experts_kept[l, b, t]) == (FAST, kept)
        assert plan.routing.experts[l, b, t].tolist() == experts
        np.testing.assert_allclose(plan.routing.weights[l, b, t], weights, rtol=1e-6)
        assert plan.row[l, b, t] != NO_ROW
        known = entries[l][min(plan.row[l, b, t], len(entries[l]) - 1)]
        for answer, wanted in zip(known.tolist(), found or [NO_ANSWER] * EXPERTS, strict=True):
            assert (answer == NO_ANSWER) == (wanted == NO_ANSWER)
            if answer != NO_ANSWER:
                np.testing.assert_array_equal(rows[l][answer], estimates[l].answers[wanted])
                assert deviations[l][answer] == estimates[l].deviation[wanted]


def test_rows_that_no_layer_may_use_are_dropped(random_stats):
    stats = random_stats(np.random.default_rng(4), LAYERS, EXPERTS)
    config = VARConfig(
        default=LayerPolicy(experts_kept=1, use_answers=False, ngram_orders=(1, 2)), frequency_threshold=15
    )
    table = build_table(config, stats, top_k=TOP_K)
    usable = ((stats.count >= 15) & (stats.entropy.mean <= config.entropy_threshold)).any(axis=0)
    assert 0 < usable.sum() < len(usable)
    np.testing.assert_array_equal(table.index.keys, stats.keys[usable])
    assert np.asarray(table.eligible).any(axis=0).all()
    assert table.answers is None


def test_a_table_without_any_eligible_row_leaves_everything_open(random_stats):
    stats = random_stats(np.random.default_rng(0), LAYERS, EXPERTS)
    config = VARConfig(frequency_threshold=10**6, default=LayerPolicy(use_answers=False))
    context = contexts(jnp.asarray([[0, 1, 2, 3]], jnp.int32), jnp.full((1, 1), NONE, jnp.int32), 2)
    for nothing in (config, replace(config, default=None)):
        assert (np.asarray(fast_plan_jit(build_table(nothing, stats, top_k=TOP_K), context).tier) == LEARNED).all()


def test_any_policy_has_the_same_shapes_and_compiles_nothing_new(random_stats, random_answers):
    rng = np.random.default_rng(1)
    stats = random_stats(rng, LAYERS, EXPERTS)
    answers = random_answers(rng, stats, COLLECTED, HIDDEN)
    context = jnp.zeros((1, 3, 2), jnp.int32)
    plans = jax.jit(fast_plan)
    no_residual = LayerPolicy(experts_kept=2, use_answers=False, ngram_orders=(2,))
    configs = [
        CONFIG,
        replace(CONFIG, layers={**POLICIES, 0: LayerPolicy(experts_kept=0)}),
        VARConfig(default=None),
        VARConfig(default=no_residual, frequency_threshold=3),
        VARConfig(default=LayerPolicy(experts_kept=2, use_answers=False, gate_mass=0.5, ngram_orders=(0,))),
    ]
    tables = [build_table(config, stats, answers, top_k=TOP_K, keep_shapes=True) for config in configs]
    plans(tables[0], context)
    compiled = plans._cache_size()
    for table in tables:
        assert jax.tree.structure(table) == jax.tree.structure(tables[0])
        assert jax.tree.map(jnp.shape, table) == jax.tree.map(jnp.shape, tables[0])
        plans(table, context)
    assert plans._cache_size() == compiled
    rows = 1 + len(stats.keys)  # with that of order 0
    assert [known.entry.shape[0] for known in tables[0].answers] == [rows, 1, 1, rows]
    size = answers.count.shape[1]
    assert [len(known.answers) for known in tables[0].answers] == [size, 1, 1, size]


def test_only_a_table_of_all_rows_takes_other_policies(random_stats, random_answers):
    rng = np.random.default_rng(1)
    stats = random_stats(rng, LAYERS, EXPERTS)
    answers = random_answers(rng, stats, COLLECTED, HIDDEN)
    other = replace(CONFIG, frequency_threshold=3)
    changed = with_policies(build_table(CONFIG, stats, answers, top_k=TOP_K, keep_shapes=True), other, stats, answers)
    np.testing.assert_array_equal(
        changed.eligible, build_table(other, stats, answers, top_k=TOP_K, keep_shapes=True).eligible
    )
    with pytest.raises(ValueError, match="build the table from these statistics with keep_shapes=True"):
        with_policies(build_table(CONFIG, stats, answers, top_k=TOP_K), other, stats, answers)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer_dtype": "int8"}, "answer_dtype float32, the config has int8"),
        ({"answer_shrinkage": 7.5}, "answer_shrinkage 2.0, the config has 7.5"),
        ({"answers_per_layer": 3}, "answers_per_layer unbounded, the config has 3"),
    ],
)
def test_a_table_does_not_take_settings_that_it_was_not_built_with(random_stats, random_answers, changes, message):
    rng = np.random.default_rng(1)
    stats = random_stats(rng, LAYERS, EXPERTS)
    answers = random_answers(rng, stats, COLLECTED, HIDDEN)
    table = build_table(CONFIG, stats, answers, top_k=TOP_K, keep_shapes=True)
    other = replace(CONFIG, **changes)
    with pytest.raises(ValueError, match=f"the table was built with {message}: other policies cannot change that"):
        with_policies(table, other, stats, answers)
    same = with_policies(build_table(other, stats, answers, top_k=TOP_K, keep_shapes=True), other, stats, answers)
    shares = jax.tree.structure(same) == jax.tree.structure(table)
    assert shares or changes == {"answer_dtype": "int8"}  # tables that differ in the others share their programs
    with pytest.raises(ValueError, match="the table holds some, and none are given"):
        with_policies(table, CONFIG, stats)


def test_without_normalization_the_weights_are_mean_probabilities(random_stats):
    stats = random_stats(np.random.default_rng(2), LAYERS, EXPERTS)
    config = VARConfig(default=LayerPolicy(experts_kept=1, use_answers=False))
    table = build_table(config, stats, top_k=EXPERTS, normalize=False, keep_shapes=True)
    seen = np.pad(stats.count > 0, ((0, 0), (0, 1)))  # order 0 comes last, and predicts nothing
    best = -np.sort(-stats.mean_probs[seen[:, :-1]], axis=-1)
    np.testing.assert_allclose(np.asarray(table.routing.weights)[seen], best, rtol=1e-6)
    assert (np.asarray(table.routing.experts)[~seen] == EXPERTS).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"layers": {2: LayerPolicy(experts_kept=4, use_answers=False)}},
            r"layer 2: experts_kept=4, but the model runs only 3",
        ),
        ({"layers": {1: LayerPolicy(experts_kept=1, use_answers=False, ngram_orders=(3,))}}, r"layer 1: orders \[3\]"),
        (
            {"layers": {1: LayerPolicy(experts_kept=1)}},
            r"layer 1: it has no answers \(there are those of layers \[0, 3\]\)",
        ),
        ({"layers": {7: None}}, "layer 7: the statistics have only layers 0 to 3"),
        ({"cache_layers": (4,)}, "layer 4: the statistics have only layers 0 to 3"),
    ],
)
def test_a_policy_that_cannot_be_carried_out_is_explained(random_stats, random_answers, changes, message):
    rng = np.random.default_rng(3)
    stats = random_stats(rng, LAYERS, EXPERTS)
    config = VARConfig(default=LayerPolicy(experts_kept=1, use_answers=False), **changes)
    with pytest.raises(ValueError, match=message):
        build_table(config, stats, random_answers(rng, stats, COLLECTED, HIDDEN), top_k=TOP_K)


def test_answers_of_another_shape_are_refused(random_stats):
    stats = random_stats(np.random.default_rng(3), LAYERS, EXPERTS)
    config = VARConfig(default=LayerPolicy(experts_kept=1, use_answers=False))
    for keys, experts in ((stats.keys[:, 1:][:0], EXPERTS), (stats.keys, EXPERTS - 1)):
        with pytest.raises(ValueError, match=r"answers have \(ids per key, experts\) .*, the statistics \(2, 5\)"):
            build_table(config, stats, Answers.empty(keys, COLLECTED, experts, HIDDEN), top_k=TOP_K)


def test_answers_that_were_never_collected_are_missed(random_stats):
    stats = random_stats(np.random.default_rng(3), LAYERS, EXPERTS)
    with pytest.raises(ValueError, match=r"layer 0: .*there are none\); collect them or set use_answers=False"):
        build_table(VARConfig(), stats, top_k=TOP_K)
    empty = RoutingStats.empty(np.zeros((0, 2), np.int32), (1, 2), LAYERS, EXPERTS)
    with pytest.raises(ValueError, match="no key at all"):
        build_table(VARConfig(), empty, top_k=TOP_K)


def test_a_layer_whose_answers_are_at_no_admitted_key_stays_open(random_stats, random_answers):
    """Nothing can be gathered from no rows at all, so one stands there that belongs to no pair."""
    rng = np.random.default_rng(5)
    stats = random_stats(rng, LAYERS, EXPERTS)
    answers = random_answers(rng, stats, COLLECTED, HIDDEN)
    answers = replace(answers, entry=np.where([[[True]], [[False]]], answers.entry, NO_ANSWER))
    layers = {0: LayerPolicy(ngram_orders=(1, 2)), 3: LayerPolicy(ngram_orders=(1, 2))}
    config = VARConfig(default=None, layers=layers, frequency_threshold=1, entropy_threshold=9.0)
    context = contexts(jnp.asarray([[0, 1, 2, 3]], jnp.int32), jnp.full((1, 1), NONE, jnp.int32), 2)
    for keep_shapes in (False, True):
        table = build_table(config, stats, answers, top_k=TOP_K, keep_shapes=keep_shapes)
        tier = np.asarray(fast_plan_jit(table, context).tier)
        assert (tier[0] == FAST).any() and (tier[3] == LEARNED).all()
        assert (table.answers[3].entry == NO_ANSWER).all() and len(table.answers[3].answers) >= 1


def test_order_0_plans_known_and_unknown_tokens_alike_but_no_padding(random_stats, random_answers):
    rng = np.random.default_rng(6)
    stats = random_stats(rng, LAYERS, EXPERTS)
    answers = random_answers(rng, stats, COLLECTED, HIDDEN)
    config = VARConfig(default=None, layers={3: LayerPolicy(experts_kept=0, ngram_orders=(0,))})
    ids, mask = rng.integers(0, 40, size=(2, 9)), rng.random((2, 9)) < 0.7
    seen = contexts(jnp.asarray(ids, jnp.int32), jnp.full((2, 0), NONE, jnp.int32), 1, jnp.asarray(mask))
    plan = jax.tree.map(np.asarray, fast_plan_jit(build_table(config, stats, answers, top_k=TOP_K), seen))
    np.testing.assert_array_equal(plan.tier[3], np.where(mask, FAST, LEARNED))
    np.testing.assert_array_equal(plan.row[3], np.where(mask, 0, NO_ROW))
    assert (plan.tier[:3] == LEARNED).all()


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 2**-8), ("int8", 1 / 254)])
def test_smaller_answers_are_within_their_rounding(random_stats, random_answers, dtype, bound):
    """Of a bfloat16 half a unit in its last place, of an int8 half a step of the row's largest entry."""
    rng = np.random.default_rng(7)
    stats = random_stats(rng, LAYERS, EXPERTS)
    answers = random_answers(rng, stats, COLLECTED, HIDDEN)
    full, small = (
        build_table(replace(CONFIG, answer_dtype=kind), stats, answers, top_k=TOP_K).answers
        for kind in ("float32", dtype)
    )
    for exact, rounded in zip(full, small, strict=True):
        assert rounded.answers.dtype == dtype and (rounded.scale is None) == (dtype != "int8")
        np.testing.assert_array_equal(exact.entry, rounded.entry)
        answer = jnp.arange(len(exact.answers))[:, None]
        one = Dropped(answer.astype(jnp.int32), jnp.ones(answer.shape, jnp.float32))
        wanted, got = np.asarray(exact.total(one)), np.asarray(rounded.total(one))
        largest = np.abs(wanted).max(axis=-1, keepdims=True) if dtype == "int8" else np.abs(wanted)
        assert (np.abs(got - wanted) <= 1.0001 * bound * largest).all()
    assert any(np.asarray(exact.answers).any() for exact in full)


def test_layers_with_outliers_leave_the_first_token_open(random_stats, random_answers):
    rng = np.random.default_rng(5)
    stats = random_stats(rng, LAYERS, EXPERTS)
    answers = random_answers(rng, stats, COLLECTED, HIDDEN)
    policy = LayerPolicy(experts_kept=1, ngram_orders=(0, 1))
    everywhere = VARConfig(cache_size=0, default=policy, layers={1: None, 2: None})
    usual = build_table(everywhere, stats, answers, top_k=TOP_K)
    outliers = answers.outliers.copy()
    outliers[1, 0] = 3
    spared = build_table(everywhere, stats, replace(answers, outliers=outliers), top_k=TOP_K)
    assert usual.first_open == () and spared.first_open == (3,)
    ids = jnp.arange(6, dtype=jnp.int32)[None]
    how, tiers = Settings.of(everywhere, LAYERS), []
    for table in (usual, spared):
        state = init(table, everywhere, 1)
        tiers.append(np.array(plan(table, state, ids, 0.0, how).tier))
        # A text that goes on has no first token any more.
        tiers.append(np.array(plan(table, follow(state, ids), ids, 0.0, how).tier))
    fresh, going_on, fresh_spared, going_on_spared = tiers
    assert fresh[3, 0, 0] == FAST
    fresh[3, 0, 0] = LEARNED
    np.testing.assert_array_equal(fresh_spared, fresh)
    np.testing.assert_array_equal(going_on_spared, going_on)

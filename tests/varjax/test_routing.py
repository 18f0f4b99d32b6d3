"""`resolve` against a slow function that takes one token at a time; open tokens against the plain router."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from varjax.routing import (
    CACHED,
    FAST,
    LEARNED,
    NO_ANSWER,
    NO_ROW,
    LayerAnswers,
    LayerRules,
    Plan,
    Routing,
    resolve,
    top_k,
)

BATCH, LENGTH, EXPERTS, ROWS, ANSWERS, HIDDEN = 2, 12, 6, 5, 14, 3
NEVER = float("inf")
COLUMNS = (
    "gate_ratio",
    "gate_mass",
    "tolerance",
    "use_answers",
    "renormalize",
    "choice_from_table",
    "weights_from_table",
)
FLAGS = list(itertools.product((False, True), repeat=4))
DROPPING = [(0.0, NEVER, 0.0), (0.6, NEVER, 0.0), (0.0, 0.7, 0.0), (0.0, NEVER, 0.25), (0.4, 0.8, 0.1)]
RULES = [(*dropping, *flags) for dropping in DROPPING for flags in FLAGS]  # one layer for each


def rules_of_every_kind() -> LayerRules:
    columns = (np.array(column) for column in zip(*RULES, strict=True))
    return LayerRules(*(jnp.asarray(c, bool if c.dtype == bool else jnp.float32) for c in columns))


def random_answers(rng: np.random.Generator) -> LayerAnswers:
    """Some experts have an answer at a row, and some answers serve at several rows."""
    entry = rng.integers(0, ANSWERS, size=(len(RULES), ROWS, EXPERTS))
    entry[rng.random(entry.shape) < 0.4] = NO_ANSWER
    return LayerAnswers(
        entry=jnp.asarray(entry, jnp.int32),
        deviation=jnp.asarray(rng.random((len(RULES), ANSWERS)), jnp.float32),
        answers=jnp.asarray(rng.normal(size=(len(RULES), ANSWERS, HIDDEN)), jnp.float32),
        scale=None,
    )


def random_case(seed: int, k: int) -> tuple[np.ndarray, Plan, LayerAnswers]:
    """Gate probabilities [L, B, T, E]; a plan of all tiers and kept counts, full and empty predictions; answers."""
    rng = np.random.default_rng(seed)
    shape = (len(RULES), BATCH, LENGTH)
    probs = rng.dirichlet(np.full(EXPERTS, 0.7), size=shape).astype(np.float32)
    experts = np.argsort(rng.random((*shape, EXPERTS)))[..., :k].astype(np.int32)
    weights = -np.sort(-rng.dirichlet(np.ones(k), size=shape)).astype(np.float32)
    predicted = rng.integers(0, k + 1, size=(*shape, 1))  # the table may know fewer than k experts, or none
    unused = np.arange(k) >= predicted
    plan = Plan(
        tier=jnp.asarray(rng.choice([FAST, CACHED, LEARNED], size=shape).astype(np.int8)),
        experts_kept=jnp.asarray(rng.integers(0, k + 1, size=shape).astype(np.int8)),
        row=jnp.asarray(rng.integers(-1, ROWS, size=shape).astype(np.int32)),
        routing=Routing(
            jnp.asarray(np.where(unused, EXPERTS, experts)),
            jnp.asarray(np.where(unused, np.float32(0), weights)),
        ),
        rules=rules_of_every_kind(),
    )
    return probs, plan, random_answers(rng)


def slow_resolve(probs, k, normalize, tier, kept, row, experts, weights, rule, entry, deviation):
    """One token of one layer, in words that follow the docstring of `resolve`: what runs, what is dropped.

    Returns a list of (expert, weight) or None per slot, and one of (answer, weight) or None per slot.
    """
    ratio, gate_mass, tolerance, residual, renormalize, choice_from_table, weights_from_table = rule
    order = sorted(range(EXPERTS), key=lambda e: (-probs[e], e))[:k]
    total = sum(probs[e] for e in order) if normalize else 1.0
    slots = [(e, probs[e] / total) for e in order]
    if tier == LEARNED:
        return slots, [None] * k
    named = [(int(e), w) for e, w in zip(experts, weights, strict=True) if e < EXPERTS]
    if choice_from_table and named:
        total = sum(probs[e] for e, _ in named) if normalize else 1.0
        slots = [(e, probs[e] / total) for e, _ in named]
    if weights_from_table and named:
        slots = [(e, w) for (e, _), w in zip(slots, weights, strict=False)]
    runs, dropped = [], []
    for j, (expert, weight) in enumerate(slots):
        looked_up = residual and row != NO_ROW
        answer = entry[row][expert] if looked_up and entry is not None else NO_ANSWER
        unwanted = j >= kept
        if j >= 1:
            unwanted |= weight < ratio * slots[0][1]
            reached = np.float32(0)
            for before, _ in slots[:j]:
                reached += probs[before]
            unwanted |= reached >= np.float32(gate_mass)
        if answer != NO_ANSWER:
            unwanted |= np.float32(weight) * deviation[answer] < np.float32(tolerance)
        if looked_up and answer == NO_ANSWER:
            unwanted = False  # what is not known runs
        runs.append(None if unwanted else (expert, weight))
        dropped.append((answer, weight) if unwanted else None)
    left = sum(slot[1] for slot in runs if slot)
    if renormalize and None in runs and left > 0:
        scale = sum(w for _, w in slots) / left
        runs = [slot and (slot[0], slot[1] * scale) for slot in runs]
    return runs, dropped


@pytest.fixture(scope="module")
def resolve_all():
    """All layers in one compiled call: (probs, plan, answers, k, normalize) -> Routing, Dropped [L, B, T, K]."""

    def run(probs, plan, answers, k, normalize):
        if answers is None:
            return jax.vmap(lambda p, layer: resolve(p, k, layer, normalize))(probs, plan)
        return jax.vmap(lambda p, layer, known: resolve(p, k, replace(layer, answers=known), normalize))(
            probs, plan, answers
        )

    return jax.jit(run, static_argnums=(3, 4))


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(("k", "normalize"), [(2, True), (4, True), (4, False)])
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_resolve_equals_the_slow_reference(resolve_all, k, normalize, known, seed):
    probs, plan, answers = random_case(seed, k)
    routing, dropped = jax.tree.map(np.asarray, resolve_all(probs, plan, answers if known else None, k, normalize))
    host, entry, deviation = jax.tree.map(np.asarray, (plan, answers.entry, answers.deviation))
    for at in np.ndindex(host.tier.shape):
        layer = at[0]
        runs, gone = slow_resolve(
            probs[at], k, normalize, host.tier[at], host.experts_kept[at], host.row[at], host.routing.experts[at],
            host.routing.weights[at], RULES[layer], entry[layer] if known else None, deviation[layer],
        )  # fmt: skip
        runs, gone = (runs + [None] * k)[:k], (gone + [None] * k)[:k]
        assert routing.experts[at].tolist() == [EXPERTS if s is None else s[0] for s in runs]
        np.testing.assert_allclose(routing.weights[at], [0.0 if s is None else s[1] for s in runs], rtol=2e-6)
        assert dropped.answer[at].tolist() == [NO_ANSWER if s is None else s[0] for s in gone]
        np.testing.assert_allclose(dropped.weights[at], [0.0 if s is None else s[1] for s in gone], rtol=2e-6)


@pytest.mark.parametrize(("k", "normalize"), [(2, True), (4, False)])
def test_open_tokens_are_bit_identical_to_the_plain_router(resolve_all, k, normalize):
    probs, plan, answers = random_case(7, k)
    routing, dropped = resolve_all(probs, plan, answers, k, normalize)
    plain = jax.jit(top_k, static_argnums=(1, 2))(probs, k, normalize)
    is_open = np.asarray(plan.tier) == LEARNED
    assert is_open.any()
    np.testing.assert_array_equal(np.asarray(routing.experts)[is_open], np.asarray(plain.experts)[is_open])
    np.testing.assert_array_equal(np.asarray(routing.weights)[is_open], np.asarray(plain.weights)[is_open])
    assert (np.asarray(dropped.answer)[is_open] == NO_ANSWER).all()
    assert (np.asarray(dropped.weights)[is_open] == 0).all()


def test_no_plan_and_an_open_plan_are_the_same():
    probs = jax.nn.softmax(jax.random.normal(jax.random.key(0), (2, 3, EXPERTS)))
    plan = Plan.open(num_layers=4, batch=2, length=3, top_k=2, num_experts=EXPERTS)
    planned, plain = (jax.tree.leaves(resolve(probs, 2, p)) for p in (plan.layer(3), None))
    for with_plan, without in zip(planned, plain, strict=True):
        np.testing.assert_array_equal(with_plan, without)
        assert with_plan.dtype == without.dtype


# --- rules of one's own ----------------------------------------------------------------------------------------------


def planned(k: int, row: int = NO_ROW, **rules) -> Plan:
    """One layer in which every token [B, T] is planned with all K slots, at one row."""
    plan = Plan.open(1, BATCH, LENGTH, k, EXPERTS).layer(0)
    changed = {name: jnp.asarray(value, getattr(plan.rules, name).dtype) for name, value in rules.items()}
    return replace(
        plan,
        tier=jnp.full_like(plan.tier, FAST),
        row=jnp.full_like(plan.row, row),
        rules=replace(plan.rules, **changed),
    )


def sharp_probs(seed: int = 0) -> jax.Array:
    """Gate probabilities [B, T, E]; of some the first is 1 to the last bit."""
    logits = 20 * np.random.default_rng(seed).normal(size=(BATCH, LENGTH, EXPERTS))
    probs = jax.nn.softmax(jnp.asarray(logits, jnp.float32))
    assert bool(jnp.any(jnp.max(probs, axis=-1) == 1))
    return probs


def test_neutral_rules_drop_nothing_though_one_probability_be_1():
    probs = sharp_probs()
    jax.tree.map(np.testing.assert_array_equal, resolve(probs, 4, planned(4))[0], top_k(probs, 4))


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.9])
def test_gate_mass_is_top_p(threshold):
    probs = np.random.default_rng(1).dirichlet(np.full(EXPERTS, 1.0), size=(BATCH, LENGTH)).astype(np.float32)
    routing, _ = resolve(jnp.asarray(probs), EXPERTS, planned(EXPERTS, gate_mass=threshold))
    for at in np.ndindex(BATCH, LENGTH):
        ranked = sorted(range(EXPERTS), key=lambda e: -probs[at][e])
        fewest = next(m for m in range(1, EXPERTS + 1) if probs[at][ranked[:m]].sum() >= threshold)
        ran = [e for e in np.asarray(routing.experts[at]).tolist() if e < EXPERTS]
        assert ran == ranked[:fewest]


@pytest.fixture
def one_layer() -> LayerAnswers:
    """Five rows: no expert has an answer at row 0, all have one at row 1."""
    answers = jax.tree.map(lambda leaf: leaf[0], random_answers(np.random.default_rng(2)))
    entry = answers.entry.at[0].set(NO_ANSWER).at[1].set(jnp.arange(EXPERTS, dtype=jnp.int32))
    return replace(answers, entry=entry)


def test_what_is_not_known_runs(one_layer):
    """With answers a token of an unanswered row keeps every expert; without, the rules alone decide."""
    probs = sharp_probs(3)
    harsh = {"gate_ratio": 1.0, "gate_mass": 0.01, "tolerance": 1e9}
    for row, use_answers, runs in ((0, True, 4), (1, True, 0), (1, False, 0), (NO_ROW, True, 0)):
        plan = replace(
            planned(4, row, use_answers=use_answers, **harsh), experts_kept=jnp.zeros((BATCH, LENGTH), jnp.int8)
        )
        routing, dropped = resolve(probs, 4, replace(plan, answers=one_layer))
        assert (np.asarray(routing.experts) < EXPERTS).sum(-1).tolist() == [[runs] * LENGTH] * BATCH
        answered = (np.asarray(dropped.answer) != NO_ANSWER).sum()
        assert answered == (4 * BATCH * LENGTH if (row, use_answers) == (1, True) else 0)


def test_without_answers_a_policy_that_uses_them_leaves_no_expert_out():
    probs = sharp_probs(3)
    plan = replace(planned(4, row=1, use_answers=True), experts_kept=jnp.zeros((BATCH, LENGTH), jnp.int8))
    routing, _ = resolve(probs, 4, plan)
    jax.tree.map(np.testing.assert_array_equal, routing, top_k(probs, 4))


def test_no_tolerance_drops_nothing_and_a_huge_one_is_look_up_only(one_layer):
    probs = sharp_probs(4)
    for row in range(ROWS):
        strict, _ = resolve(probs, 4, replace(planned(4, row, use_answers=True, tolerance=0.0), answers=one_layer))
        np.testing.assert_array_equal(strict.experts, top_k(probs, 4).experts)
        np.testing.assert_array_equal(strict.weights, top_k(probs, 4).weights)

        huge = resolve(probs, 4, replace(planned(4, row, use_answers=True, tolerance=1e9), answers=one_layer))
        nothing = replace(planned(4, row, use_answers=True), experts_kept=jnp.zeros((BATCH, LENGTH), jnp.int8))
        jax.tree.map(np.testing.assert_array_equal, huge, resolve(probs, 4, replace(nothing, answers=one_layer)))


def test_a_tolerance_drops_first_what_costs_least(one_layer):
    probs = jax.nn.softmax(jax.random.normal(jax.random.key(5), (BATCH, LENGTH, EXPERTS)))
    full, deviation = top_k(probs, 4), np.asarray(one_layer.deviation)
    error = np.asarray(full.weights) * deviation[np.asarray(full.experts)]  # at row 1 an expert's answer has its number
    for tolerance in (0.05, 0.15, 0.3):
        routing, _ = resolve(probs, 4, replace(planned(4, 1, use_answers=True, tolerance=tolerance), answers=one_layer))
        np.testing.assert_array_equal(np.asarray(routing.experts) < EXPERTS, error >= np.float32(tolerance))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8])
def test_the_answers_of_what_was_dropped_are_summed_by_their_weights(one_layer, dtype):
    probs = sharp_probs(6)
    plan = planned(4, 2, use_answers=True, tolerance=0.2)
    scale = jnp.asarray(np.random.default_rng(0).random(ANSWERS), jnp.float32) if dtype == jnp.int8 else None
    known = replace(one_layer, answers=(10 * one_layer.answers).astype(dtype), scale=scale)
    _, dropped = resolve(probs, 4, replace(plan, answers=known))
    total, host = known.total(dropped), np.asarray(known.answers.astype(jnp.float32))
    assert total.dtype == jnp.float32 and total.shape == (BATCH, LENGTH, HIDDEN)
    for at in np.ndindex(BATCH, LENGTH):
        expected = np.zeros(HIDDEN)
        for answer, weight in zip(dropped.answer[at].tolist(), dropped.weights[at].tolist(), strict=True):
            if answer != NO_ANSWER:
                expected += weight * host[answer] * (1.0 if scale is None else float(scale[answer]))
        np.testing.assert_allclose(total[at], expected, rtol=1e-5, atol=1e-5)
    assert np.asarray(total).any()


def test_find_answers_no_unused_slot_and_no_unknown_row(one_layer):
    rows = jnp.array([NO_ROW, 0, 1, 1], jnp.int32)
    experts = jnp.array([[0, 1], [2, 3], [4, 5], [3, EXPERTS]], jnp.int32)
    assert one_layer.find(rows, experts).tolist() == [[-1, -1], [-1, -1], [4, 5], [3, -1]]


def test_dtypes_and_shapes_are_fixed(resolve_all):
    routing, dropped = resolve_all(*random_case(1, 2), 2, True)
    assert (routing.experts.dtype, routing.weights.dtype) == (jnp.int32, jnp.float32)
    assert (dropped.answer.dtype, dropped.weights.dtype) == (jnp.int32, jnp.float32)
    assert {leaf.shape for leaf in jax.tree.leaves((routing, dropped))} == {(len(RULES), BATCH, LENGTH, 2)}


def test_another_policy_compiles_nothing(resolve_all):
    resolve_all(*random_case(2, 2), 2, True)
    before = resolve_all._cache_size()
    resolve_all(*random_case(3, 2), 2, True)
    assert resolve_all._cache_size() == before

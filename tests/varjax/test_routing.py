"""`resolve` against a slow function that takes one token at a time; open tokens against the plain router."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from varjax.routing import CACHED, FAST, LEARNED, NO_ROW, LayerRules, Plan, Routing, resolve, top_k

BATCH, LENGTH, EXPERTS = 2, 12, 6
RULES = list(itertools.product((0.0, 0.6), (False, True), (False, True), (False, True)))  # one layer for each


def rules_of_every_kind() -> LayerRules:
    ratio, renormalise, choice, weights = (np.array(column) for column in zip(*RULES, strict=True))
    return LayerRules(
        jnp.asarray(ratio, jnp.float32), jnp.asarray(renormalise), jnp.asarray(choice), jnp.asarray(weights)
    )


def random_case(seed: int, k: int) -> tuple[np.ndarray, Plan]:
    """Gate probabilities [L, B, T, E]; a plan of all tiers and kept counts, full and empty predictions."""
    rng = np.random.default_rng(seed)
    shape = (len(RULES), BATCH, LENGTH)
    probs = rng.dirichlet(np.full(EXPERTS, 0.7), size=shape).astype(np.float32)
    experts = np.argsort(rng.random((*shape, EXPERTS)))[..., :k].astype(np.int32)
    weights = -np.sort(-rng.dirichlet(np.ones(k), size=shape)).astype(np.float32)
    predicted = rng.integers(0, k + 1, size=(*shape, 1))  # the table may know fewer than k experts, or none
    unused = np.arange(k) >= predicted
    plan = Plan(
        tier=jnp.asarray(rng.choice([FAST, CACHED, LEARNED], size=shape).astype(np.int8)),
        kept=jnp.asarray(rng.integers(0, k + 1, size=shape).astype(np.int8)),
        row=jnp.asarray(rng.integers(-1, 50, size=shape).astype(np.int32)),
        routing=Routing(
            jnp.asarray(np.where(unused, EXPERTS, experts)),
            jnp.asarray(np.where(unused, np.float32(0), weights)),
        ),
        rules=rules_of_every_kind(),
    )
    return probs, plan


def slow_resolve(probs, k, normalise, tier, kept, row, experts, weights, rule):
    """One token of one layer, in words that follow the docstring of `resolve`."""
    ratio, renormalise, choice_from_table, weights_from_table = rule
    order = sorted(range(EXPERTS), key=lambda e: (-probs[e], e))[:k]
    total = sum(probs[e] for e in order) if normalise else 1.0
    slots = [(e, probs[e] / total) for e in order]
    if tier == LEARNED:
        return slots, NO_ROW
    named = [(int(e), w) for e, w in zip(experts, weights, strict=True) if e < EXPERTS]
    if choice_from_table and named:
        total = sum(probs[e] for e, _ in named) if normalise else 1.0
        slots = [(e, probs[e] / total) for e, _ in named]
    if weights_from_table and named:
        slots = [(e, w) for (e, _), w in zip(slots, weights, strict=False)]
    keep = [j < kept and (j == 0 or slots[j][1] >= ratio * slots[0][1]) for j in range(len(slots))]
    if all(keep):
        return slots, NO_ROW
    left = sum(w for (_, w), stays in zip(slots, keep, strict=True) if stays)
    scale = sum(w for _, w in slots) / left if renormalise and left > 0 else 1.0
    return [(e, w * scale) if stays else None for (e, w), stays in zip(slots, keep, strict=True)], row


@pytest.fixture(scope="module")
def resolve_all():
    """All layers in one compiled call: (probs, plan, k, normalise) -> Routing [L, ...], row [L, ...]."""

    def run(probs, plan, k, normalise):
        return jax.vmap(lambda p, layer: resolve(p, k, layer, normalise))(probs, plan)

    return jax.jit(run, static_argnums=(2, 3))


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("k", [2, 4])
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_resolve_equals_the_slow_reference(resolve_all, k, normalise, seed):
    probs, plan = random_case(seed, k)
    routing, row = jax.tree.map(np.asarray, resolve_all(probs, plan, k, normalise))
    host = jax.tree.map(np.asarray, plan)
    for at in np.ndindex(row.shape):
        slots, expected_row = slow_resolve(
            probs[at], k, normalise, host.tier[at], host.kept[at], host.row[at],
            host.routing.experts[at], host.routing.weights[at], RULES[at[0]],
        )  # fmt: skip
        slots = (slots + [None] * k)[:k]
        assert row[at] == expected_row
        assert routing.experts[at].tolist() == [EXPERTS if s is None else s[0] for s in slots]
        np.testing.assert_allclose(routing.weights[at], [0.0 if s is None else s[1] for s in slots], rtol=2e-6)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("k", [2, 4])
def test_open_tokens_are_bit_identical_to_the_plain_router(resolve_all, k, normalise):
    probs, plan = random_case(7, k)
    routing, row = resolve_all(probs, plan, k, normalise)
    plain = jax.jit(top_k, static_argnums=(1, 2))(probs, k, normalise)
    is_open = np.asarray(plan.tier) == LEARNED
    assert is_open.any()
    np.testing.assert_array_equal(np.asarray(routing.experts)[is_open], np.asarray(plain.experts)[is_open])
    np.testing.assert_array_equal(np.asarray(routing.weights)[is_open], np.asarray(plain.weights)[is_open])
    assert (np.asarray(row)[is_open] == NO_ROW).all()


def test_no_plan_and_an_open_plan_are_the_same():
    probs = jax.nn.softmax(jax.random.normal(jax.random.key(0), (2, 3, EXPERTS)))
    plan = Plan.open(num_layers=4, batch=2, length=3, top_k=2, num_experts=EXPERTS)
    planned, plain = (jax.tree.leaves(resolve(probs, 2, p)) for p in (plan.layer(3), None))
    for with_plan, without in zip(planned, plain, strict=True):
        np.testing.assert_array_equal(with_plan, without)
        assert with_plan.dtype == without.dtype


def test_dtypes_and_shapes_are_fixed(resolve_all):
    probs, plan = random_case(1, 2)
    routing, row = resolve_all(probs, plan, 2, True)
    assert (routing.experts.dtype, routing.weights.dtype, row.dtype) == (jnp.int32, jnp.float32, jnp.int32)
    assert routing.experts.shape == (*row.shape, 2)


def test_another_policy_compiles_nothing(resolve_all):
    probs, plan = random_case(2, 2)
    resolve_all(probs, plan, 2, True)
    before = resolve_all._cache_size()
    resolve_all(*random_case(3, 2), 2, True)
    assert resolve_all._cache_size() == before

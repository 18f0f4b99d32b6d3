"""Affine answers inside a layer, against the formula for one expert at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varjax.affine import Maps
from varjax.errors import InputError
from varjax.routing import FAST, LEARNED, NO_ANSWER, NO_ROW, LayerAnswers, LayerRules, Plan, Routing, resolve, top_k

BATCH, LENGTH, EXPERTS, TOP_K, HIDDEN, RANK, ROWS = 2, 5, 4, 2, 8, 3, 6
RNG = np.random.default_rng(0)
ENTRY = RNG.permutation(ROWS * EXPERTS).reshape(ROWS, EXPERTS).astype(np.int32)
ENTRY[RNG.random(ENTRY.shape) < 0.2] = NO_ANSWER
OWNER = np.zeros(ROWS * EXPERTS, np.int32)
for expert_of_row in ENTRY:
    OWNER[expert_of_row[expert_of_row != NO_ANSWER]] = np.flatnonzero(expert_of_row != NO_ANSWER)
MEAN, INPUTS = RNG.normal(size=(2, ROWS * EXPERTS, HIDDEN)).astype(np.float32)
DEVIATION = RNG.random(ROWS * EXPERTS).astype(np.float32)
MAPS = Maps(
    read=RNG.normal(size=(1, HIDDEN, RANK)).astype(np.float32),
    mix=RNG.normal(size=(1, EXPERTS, RANK, RANK)).astype(np.float32),
    write=np.linalg.qr(RNG.normal(size=(HIDDEN, RANK)))[0].T[None].astype(np.float32),
    unexplained=np.array([[0.1, 0.4, 0.9, 1.0]]),
)
X = jnp.asarray(RNG.normal(size=(BATCH, LENGTH, HIDDEN)), jnp.float32)
PROBS = jax.nn.softmax(jnp.asarray(RNG.normal(size=(BATCH, LENGTH, EXPERTS)), jnp.float32))


def known(dtype="float32"):
    affine, left = MAPS.of_layer(0, INPUTS, OWNER, DEVIATION)
    return LayerAnswers(jnp.asarray(ENTRY), jnp.asarray(left), jnp.asarray(MEAN), None, affine.stored(dtype))


def planned(answers, kept=TOP_K, **rules):
    neutral = jax.tree.map(lambda leaf: leaf[0], LayerRules.neutral(1))
    rules = {name: jnp.asarray(value, getattr(neutral, name).dtype) for name, value in rules.items()}
    row = np.random.default_rng(1).integers(0, ROWS, (BATCH, LENGTH)).astype(np.int32)
    row[0, 0] = NO_ROW
    tier = np.where(row == NO_ROW, LEARNED, FAST).astype(np.int8)
    nothing = Routing.unused((BATCH, LENGTH, TOP_K), EXPERTS)
    experts_kept = jnp.full((BATCH, LENGTH), kept, jnp.int8)
    return Plan(
        jnp.asarray(tier), experts_kept, jnp.asarray(row), nothing, dataclasses.replace(neutral, **rules), answers
    )


def moved(answer, expert, x):
    """By how much the input x moves an answer."""
    return (x - INPUTS[answer]) @ MAPS.read[0] @ MAPS.mix[0, expert] @ MAPS.write[0]


def test_dropped_experts_are_answered_by_their_affine_answers():
    plan = planned(known(), kept=0, use_answers=True)
    executed, dropped = resolve(PROBS, TOP_K, plan, inputs=X)
    total = np.asarray(plan.answers.total(dropped))
    choice = top_k(PROBS, TOP_K)
    for b, t in np.ndindex(BATCH, LENGTH):
        expected = np.zeros(HIDDEN)
        for k in range(TOP_K):
            expert, row = int(choice.experts[b, t, k]), int(plan.row[b, t])
            answer = NO_ANSWER if row == NO_ROW else ENTRY[row, expert]
            assert (int(executed.experts[b, t, k]) == expert) == (answer == NO_ANSWER)
            if answer != NO_ANSWER:
                expected += float(choice.weights[b, t, k]) * (MEAN[answer] + moved(answer, expert, np.asarray(X[b, t])))
        np.testing.assert_allclose(total[b, t], expected, atol=1e-5)


def test_the_expected_error_grows_with_the_deviation():
    plan = planned(known(), tolerance=1.0, use_answers=True)
    executed, _ = resolve(PROBS, TOP_K, plan, inputs=X)
    choice, share = top_k(PROBS, TOP_K), MAPS.unexplained[0]
    slope = np.minimum(share / np.maximum(2 * (1 - share), 1e-30), 1)
    outcomes = set()
    for b, t, k in np.ndindex(BATCH, LENGTH, TOP_K):
        expert, row = int(choice.experts[b, t, k]), int(plan.row[b, t])
        answer = NO_ANSWER if row == NO_ROW else ENTRY[row, expert]
        away = np.sum(moved(answer, expert, np.asarray(X[b, t])) ** 2)
        variance = DEVIATION[answer] ** 2 * (share[expert] - slope[expert] * (1 - share[expert])) + slope[expert] * away
        dropped = answer != NO_ANSWER and float(choice.weights[b, t, k]) * np.sqrt(variance) < 1.0
        assert (int(executed.experts[b, t, k]) == EXPERTS) == dropped
        outcomes.add(dropped)
    assert outcomes == {True, False}


def test_a_map_that_leaves_everything_unexplained_expects_the_error_of_a_constant_answer():
    """Where the deviations are as large as the unexplained share says, the expected error is that share of v."""
    share = MAPS.unexplained[0]
    affine, left = MAPS.of_layer(0, INPUTS, OWNER, DEVIATION)
    explained = (1 - share[OWNER]) * DEVIATION**2
    np.testing.assert_allclose(left**2 + affine.slope[OWNER] * explained, share[OWNER] * DEVIATION**2, rtol=1e-5)


def test_half_the_bytes_give_nearly_the_same_output():
    totals = []
    for dtype in ("float32", "bfloat16"):
        plan = planned(known(dtype), kept=0, use_answers=True)
        totals.append(np.asarray(plan.answers.total(resolve(PROBS, TOP_K, plan, inputs=X)[1])))
    assert 0 < np.abs(totals[1] - totals[0]).max() < 0.02 * np.abs(totals[0]).max()


def test_affine_answers_need_the_inputs():
    with pytest.raises(InputError, match="pass resolve the inputs"):
        resolve(PROBS, TOP_K, planned(known(), kept=0, use_answers=True))


def test_a_map_of_nothing_changes_nothing():
    """Rank 0, bit for bit: an affine answer whose map is zero is the constant answer."""
    nothing = Maps(np.zeros_like(MAPS.read), np.zeros_like(MAPS.mix), MAPS.write, np.ones((1, EXPERTS)))
    assert nothing.of_layer(0, INPUTS, OWNER, DEVIATION)[0] is None
    constant = dataclasses.replace(known(), affine=None, deviation=jnp.asarray(DEVIATION))
    _, left = nothing.of_layer(0, INPUTS, OWNER, DEVIATION)
    np.testing.assert_array_equal(left, DEVIATION)
    plan = planned(constant, kept=1, use_answers=True)
    executed, dropped = resolve(PROBS, TOP_K, plan)
    again, same = resolve(PROBS, TOP_K, plan, inputs=X)
    jax.tree.map(np.testing.assert_array_equal, (executed, dropped), (again, same))

"""A program less a component is the same program for all the others."""

import jax
import jax.numpy as jnp
import numpy as np

from profiling.ablation import WHOLE, borders, by_ablation, evaluate, needed, without
from profiling.calls import Calls, Carry, Fixed, prepare
from profiling.costs import COMPONENTS
from profiling.scopes import Program


def layered(x, count):
    with jax.named_scope("norms"):
        normed = x * 2
    with jax.named_scope("gate"):
        weight = jax.nn.softmax(normed)
    with jax.named_scope("experts"):
        y = jax.lax.fori_loop(0, 3, lambda _, y: y * weight + 1, normed)
        count = count + 1
    with jax.named_scope("head"):
        return count, y.sum() + x[0]


def program_and_values(x, count):
    program = Program.of(jax.make_jaxpr(layered)(x, count))
    values = dict(zip(program.arguments, (x, count), strict=True))
    evaluate(program.equations, values)
    return program, values


def test_given_what_a_component_makes_the_others_do_the_same():
    x, count = jnp.arange(4.0), jnp.int32(0)
    program, values = program_and_values(x, count)
    expected = layered(x, count)
    np.testing.assert_array_equal(values[program.results[1]], expected[1])
    for name in ("norms", "gate", "experts"):
        made, read = borders(program, name)
        carry, others = without(program, name, [(1, 0)])([x, count], [values[one] for one in made])
        np.testing.assert_array_equal(others[-1], expected[1])
        # What the left-out component alone reads is handed out: its producers go on working.
        kept = [one for one in program.equations if one.component != name]
        dead = set(read) - needed(kept, {program.results[1]} - set(made))
        assert len(others) == 1 + len(dead)
        assert int(carry[0]) == (0 if name == "experts" else 1)  # nobody else reads the count


def test_a_component_left_out_is_not_computed():
    x, count = jnp.arange(4.0), jnp.int32(0)
    program, _ = program_and_values(x, count)
    (y,) = (one for one in borders(program, "experts")[0] if one != program.results[0])
    made = [jnp.full(4, 7.0) if one == y else count for one in borders(program, "experts")[0]]
    _, others = without(program, "experts", [(1, 0)])([x, count], made)
    np.testing.assert_array_equal(others[-1], 28.0 + x[0])
    _, others = without(program, "experts", [(1, 0)], left_out=False)([x, count], made)
    np.testing.assert_array_equal(others[-1], layered(x, count)[1])


def test_a_recorded_value_takes_the_place_of_a_carried_one_that_others_read():
    def step(count):
        with jax.named_scope("plan"):
            seen = count * 2
        with jax.named_scope("commit"):
            count = count + 1
        return count, seen

    program = Program.of(jax.make_jaxpr(step)(jnp.int32(3)))
    carry, others = without(program, "commit", [(0, 0)])([jnp.int32(3)], [jnp.int32(4)])
    assert (int(carry[0]), int(others[-1])) == (4, 6)


def test_the_larger_product_saves_more():
    def step(fixed, carry, ids):
        with jax.named_scope("gate"):
            small = fixed.table @ fixed.table
        with jax.named_scope("experts"):
            x = fixed.params
            for _ in range(12):
                x = x @ fixed.params
        return carry, x.sum() + small.sum() + ids.sum()

    fixed = Fixed(jnp.eye(512), jnp.eye(4), None, None)
    calls = Calls("prefill", 1, 1, 0, step, fixed, Carry(None, None), [jnp.zeros((1, 1))])
    seconds = {name: np.median(one) for name, one in by_ablation(calls, repeats=5).items()}
    assert set(seconds) == {WHOLE, "gate", "experts"}
    assert seconds["experts"] > seconds["gate"], seconds  # by four orders of magnitude


def test_a_var_model_less_a_component_gives_the_same_logits(small_var_model, documents):
    ids = np.stack([one.ids[:12] for one in documents if len(one.ids) >= 12][:2])
    calls = prepare(small_var_model, ids, "decode", max_calls=1)
    program = Program.of(jax.make_jaxpr(calls.step)(calls.fixed, calls.carry, calls.inputs[0]))
    arguments = jax.tree.leaves((calls.fixed, calls.carry, calls.inputs[0]))
    _, logits = calls.step(calls.fixed, calls.fresh(), calls.inputs[0])
    values = dict(zip(program.arguments, arguments, strict=True))
    evaluate(program.equations, values)
    np.testing.assert_allclose(values[program.results[-1]], logits, rtol=1e-4, atol=1e-5)  # jitted: rounded otherwise
    assert {one.component for one in program.equations} >= set(COMPONENTS)
    for name in ("plan", "scores", "experts", "answers"):
        made, _ = borders(program, name)
        _, others = without(program, name, [])(arguments, [values[one] for one in made])
        np.testing.assert_array_equal(others[-1], values[program.results[-1]])

"""One conformance suite for all expert engines: against a slow loop over tokens in float64.

Kernels for GPUs are interpreted here; `test_experts_pallas.py` lowers them.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.experts import ENGINES, _pallas_engine, expert_outputs, get_engine
from models.experts_blocks import block_sizes, cut
from varjax.routing import Routing

HIDDEN, SIZE, EXPERTS, SLOTS = 8, 12, 4, 2
ROWS = 13  # not a multiple of any block
ANYWHERE = ENGINES | {"pallas": _pallas_engine(interpret=True)}  # what runs on any device
FAST = sorted(ENGINES.keys() - {"reference"})


@pytest.fixture(params=sorted(ENGINES))
def engine(request):
    return ANYWHERE[request.param]


def random_experts(rng, num_experts=EXPERTS, dtype=jnp.float32):
    shapes = {"gate": (HIDDEN, SIZE), "up": (HIDDEN, SIZE), "down": (SIZE, HIDDEN)}
    return {
        index: {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}
        for index in range(num_experts)
    }


def random_routing(rng, rows, slots=SLOTS, num_experts=EXPERTS, used=None, unused_share=0.3) -> Routing:
    """[N, K]: experts out of `used`, repeated ones included; unused slots may be anywhere."""
    pool = np.arange(num_experts) if used is None else np.asarray(used, int)
    experts = rng.choice(pool, (rows, slots)) if len(pool) else np.full((rows, slots), num_experts)
    experts = np.where(rng.random(experts.shape) < unused_share, num_experts, experts)
    weights = np.where(experts < num_experts, rng.random(experts.shape), 0)
    return Routing(jnp.asarray(experts, jnp.int32), jnp.asarray(weights, jnp.float32))


def random_rows(rng, rows, dtype=jnp.float32):
    return jnp.asarray(rng.normal(size=(rows, HIDDEN)), dtype)


def slow(x, routing, experts) -> np.ndarray:
    """float64[N, D], one assignment after the other."""
    x, weights = np.asarray(x, np.float64), np.asarray(routing.weights, np.float64)
    out = np.zeros(x.shape)
    for token, slot in np.ndindex(*weights.shape):
        expert = int(routing.experts[token, slot])
        if expert < len(experts):
            gate, up, down = (np.asarray(experts[expert][name], np.float64) for name in ("gate", "up", "down"))
            inner = x[token] @ gate
            out[token] += weights[token, slot] * ((inner / (1 + np.exp(-inner)) * (x[token] @ up)) @ down)
    return out


def check(engine, apply, x, routing, experts, atol=1e-4) -> None:
    """`apply` is the engine's, jitted."""
    out = apply(x, routing, engine.prepare(experts))
    assert (out.shape, out.dtype) == (x.shape, x.dtype)
    np.testing.assert_allclose(np.asarray(out, np.float64), slow(x, routing, experts), rtol=0, atol=atol)


def test_every_pattern_of_empty_experts_and_nothing_compiles_twice(engine):
    rng = np.random.default_rng(0)
    experts, traces = random_experts(rng), []

    @jax.jit
    def apply(*args):
        traces.append(None)
        return engine.apply(*args)

    # JAX brings in what interprets kernels at their first use, and takes programs traced before for others.
    check(engine, jax.jit(engine.apply), random_rows(rng, ROWS), random_routing(rng, ROWS), experts)
    for size in range(EXPERTS + 1):
        for used in itertools.combinations(range(EXPERTS), size):  # none at all comes first
            check(engine, apply, random_rows(rng, ROWS), random_routing(rng, ROWS, used=used), experts)
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("rows", "slots", "num_experts"),
    [(1, 2, 4), (1, 1, 4), (2, 2, 4), (70, 2, 4), (301, 2, 4), (601, 2, 4), (5, 3, 1)],
    ids=["one-token", "one-slot", "few-rows", "medium-blocks", "large-blocks", "largest-blocks", "one-expert"],
)
def test_shapes(engine, rows, slots, num_experts):
    rng = np.random.default_rng(1)
    experts, apply = random_experts(rng, num_experts), jax.jit(engine.apply)
    for unused_share in (0.0, 0.5):
        routing = random_routing(rng, rows, slots, num_experts, unused_share=unused_share)
        check(engine, apply, random_rows(rng, rows), routing, experts)


@pytest.mark.parametrize(("rows", "num_experts"), [(1, 128), (19, 64)])
@pytest.mark.parametrize("engine", FAST, indirect=True)  # the reference unrolls them all, which compiles for long
def test_many_experts_with_any_number_of_slots_unused(engine, rows, num_experts):
    rng = np.random.default_rng(7)
    experts, x, apply = random_experts(rng, num_experts), random_rows(rng, rows), jax.jit(engine.apply)
    for unused in range(9):
        chosen = np.argsort(rng.random((rows, num_experts)))[:, :8]
        chosen[np.argsort(rng.random((rows, 8))) < unused] = num_experts  # anywhere among the slots
        weights = np.where(chosen < num_experts, rng.random(chosen.shape), 0)
        routing = Routing(jnp.asarray(chosen, jnp.int32), jnp.asarray(weights, jnp.float32))
        assert (np.asarray(routing.experts) == num_experts).sum(1).tolist() == [unused] * rows
        check(engine, apply, x, routing, experts, atol=5e-4)


@pytest.mark.parametrize("num_slots", [16, 64, 640, 6400, 64000])
@pytest.mark.parametrize("num_experts", [8, 64])
def test_blocks_hold_all_rows_and_none_is_idle(num_slots, num_experts):
    sizes = block_sizes(num_slots, num_experts)
    assert list(sizes) == sorted(sizes, reverse=True)
    rows = np.arange(1, 3 * sizes[0])
    blocks = cut(rows, sizes)
    held = sum(size * number for size, number in zip(sizes, blocks, strict=True))
    used = [np.where(number > 0, size, sizes[0]) for size, number in zip(sizes, blocks, strict=True)]
    assert ((held >= rows) & (held - np.min(used, axis=0) < rows)).all()
    assert [int(number[0]) for number in cut(np.array([0]), sizes)] == [0] * len(sizes)


def test_one_expert_in_several_slots_counts_each_time(engine):
    rng = np.random.default_rng(2)
    experts, x = random_experts(rng), random_rows(rng, ROWS)
    twice = Routing(jnp.full((ROWS, 2), 3, jnp.int32), jnp.full((ROWS, 2), 0.5, jnp.float32))
    once = Routing(jnp.tile(jnp.array([[4, 3]], jnp.int32), (ROWS, 1)), jnp.tile(jnp.array([[0.0, 1.0]]), (ROWS, 1)))
    apply = jax.jit(engine.apply)
    check(engine, apply, x, twice, experts)
    check(engine, apply, x, once, experts)
    np.testing.assert_allclose(slow(x, twice, experts), slow(x, once, experts))


def test_an_unused_slot_adds_nothing_whatever_its_weight_or_the_other_rows_hold(engine):
    rng = np.random.default_rng(3)
    experts, x = random_experts(rng), random_rows(rng, ROWS).at[0].set(jnp.inf)
    routing = random_routing(rng, ROWS)
    routing = Routing(routing.experts.at[0].set(EXPERTS), routing.weights.at[0].set(7.0))
    out = np.asarray(jax.jit(engine.apply)(x, routing, engine.prepare(experts)))
    np.testing.assert_array_equal(out[0], 0)
    np.testing.assert_allclose(out[1:], slow(x[1:], jax.tree.map(lambda leaf: leaf[1:], routing), experts), atol=1e-4)


def test_bfloat16_stays_bfloat16(engine):
    rng = np.random.default_rng(4)
    experts, x = random_experts(rng, dtype=jnp.bfloat16), random_rows(rng, ROWS, jnp.bfloat16)
    routing = random_routing(rng, ROWS)
    largest = np.abs(slow(x, routing, experts)).max()
    check(engine, jax.jit(engine.apply), x, routing, experts, atol=0.02 * largest)


@pytest.mark.parametrize(
    ("engine", "rows", "slots", "num_experts"),
    [
        *(("blocks", *shape) for shape in ((1, 2, 4), (ROWS, 2, 4), (601, 2, 4), (5, 8, 16))),
        ("pallas", ROWS, 2, 4),  # whose gradients are those of blocks
    ],
    indirect=["engine"],
)
def test_gradients_are_those_of_the_reference(engine, rows, slots, num_experts):
    rng = np.random.default_rng(5)
    experts, x = random_experts(rng, num_experts), random_rows(rng, rows)
    routing, pull = random_routing(rng, rows, slots, num_experts), random_rows(rng, rows)

    def gradients(engine):
        def objective(x, weights, experts):
            return (engine.apply(x, Routing(routing.experts, weights), engine.prepare(experts)) * pull).sum()

        return jax.grad(objective, argnums=(0, 1, 2))

    ours = jax.jit(gradients(engine))(x, routing.weights, experts)
    theirs = gradients(get_engine("reference"))(x, routing.weights, experts)
    for one, reference in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        np.testing.assert_allclose(one, reference, rtol=1e-4, atol=1e-4 * float(jnp.abs(reference).max()))


def test_expert_outputs_are_the_summands(engine):
    rng = np.random.default_rng(6)
    experts, x, routing = random_experts(rng), random_rows(rng, ROWS), random_routing(rng, ROWS)
    params = engine.prepare(experts)
    slots = jax.jit(lambda *args: expert_outputs(engine, *args))(x, routing, params)
    np.testing.assert_allclose(slots.sum(1), slow(x, routing, experts), atol=1e-4)
    for slot in range(SLOTS):
        alone = jax.tree.map(lambda leaf, slot=slot: leaf[:, slot : slot + 1], routing)
        np.testing.assert_allclose(slots[:, slot], slow(x, alone, experts), atol=1e-4)
    np.testing.assert_array_equal(np.asarray(slots)[np.asarray(routing.experts) == EXPERTS], 0)


def test_an_unknown_engine_is_answered_with_the_known_ones():
    with pytest.raises(
        ValueError, match=r"'magic' is not an expert engine; choose one of \['blocks', 'pallas', 'reference'\]"
    ):
        get_engine("magic")

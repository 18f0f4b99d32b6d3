"""What XLA counts wrongly, each error in a program of its own, as jaxlib 0.10.2 has them on a CPU. A failure here means
that a version counts differently, and `KNOWN_ERRORS` must follow. And peak memory against XLA's layout."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from models import Model, MoEConfig
from models.experts import get_engine
from models.parameters import init_params, prepare
from profiling.points import policies, random_answers, random_stats
from profiling.xla import KNOWN_ERRORS, Peak, _constructs, _explain, analyze, costs, memory, memory_section
from varjax import VARModel
from varjax.model import build_for

N = 64
SQUARE = jax.ShapeDtypeStruct((N, N), jnp.float32)
PRODUCT = 2 * N**3  # operations of one matrix product


def cost_of(function, *arguments):
    return analyze(jax.jit(function).trace(*arguments))


def test_a_program_without_doubts_is_counted_right():
    cost = cost_of(lambda x: x @ x @ x, SQUARE)
    assert cost.flops == 2 * PRODUCT and cost.doubts == {} and _explain(cost.doubts) == []
    assert cost.argument_bytes == cost.output_bytes == 4 * N * N
    assert cost.peak_bytes == cost.argument_bytes + cost.output_bytes + cost.temporary_bytes


def test_a_donated_argument_takes_no_second_place():
    donated = analyze(jax.jit(lambda x: x + 1, donate_argnums=0).trace(SQUARE))
    assert donated.aliased_bytes == 4 * N * N
    assert donated.peak_bytes == 4 * N * N + donated.temporary_bytes


@pytest.mark.parametrize(
    "loop",
    [
        lambda x: lax.scan(lambda carry, _: (carry @ carry, None), x, None, length=10)[0],
        lambda x: lax.fori_loop(0, 10, lambda _, carry: carry @ carry, x),
        lambda x: lax.while_loop(lambda c: c[0] < 10, lambda c: (c[0] + 1, c[1] @ c[1]), (0, x))[1],
        lambda x: lax.map(lambda row: x @ x + row, jnp.ones(10)),
    ],
    ids=["scan", "fori_loop", "while_loop", "map"],
)
def test_a_loops_body_is_counted_once(loop):
    cost = cost_of(loop, SQUARE)
    assert PRODUCT <= cost.flops < 1.1 * PRODUCT
    assert cost.doubts["loop"] == 1


def test_a_conditional_is_charged_its_most_expensive_branch():
    branches = [lambda x: x @ x @ x, lambda x: x @ x, lambda x: x]
    cost = cost_of(lambda index, x: lax.switch(index, branches, x), 2, SQUARE)
    assert 2 * PRODUCT <= cost.flops < 2.1 * PRODUCT  # though the third, which is nothing, is taken
    assert cost.doubts == {"conditional": 1}
    chosen = cost_of(lambda yes, x: lax.cond(yes, branches[2], branches[1], x), True, SQUARE)
    assert PRODUCT <= chosen.flops < 1.1 * PRODUCT and chosen.doubts == {"conditional": 1}


def test_opaque_calls_count_minus_one():
    def callback(x):
        return jax.pure_callback(lambda x: np.asarray(x), x, x)

    for opaque in (lambda x: lax.top_k(x, 2), callback):
        assert cost_of(opaque, SQUARE).flops == -1
        with_product = cost_of(lambda x, opaque=opaque: opaque(x @ x), SQUARE)
        assert with_product.flops == PRODUCT - 1
        assert with_product.doubts == {"opaque call": 1}


def test_a_gather_is_charged_the_whole_table():
    cost = cost_of(
        lambda table, rows: table[rows],
        jax.ShapeDtypeStruct((10_000, N), jnp.float32),
        jax.ShapeDtypeStruct((3,), jnp.int32),
    )
    assert cost.bytes > 4 * 10_000 * N > 1000 * (2 * 4 * 3 * N)
    assert cost.doubts == {"gather": 1}


def test_a_ragged_product_is_charged_for_all_groups():
    rows, experts = 32, 4
    shapes = [(rows, N), (experts, N, N)]
    cost = cost_of(
        lax.ragged_dot,
        *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes),
        jax.ShapeDtypeStruct((experts,), jnp.int32),
    )
    useful = 2 * rows * N * N
    assert experts * useful <= cost.flops < 1.1 * experts * useful
    assert cost.doubts == {"ragged product": 1}


def test_constructs_inside_others_are_found_and_explained():
    def body(carry, _):
        carry = lax.cond(carry[0, 0] > 0, lambda x: x @ x, lambda x: x, carry)
        return carry, lax.top_k(carry, 2)

    doubts = cost_of(lambda x: lax.scan(body, x, None, length=5), SQUARE).doubts
    assert doubts == {"loop": 1, "conditional": 1, "opaque call": 1}
    assert list(doubts) == [name for name in KNOWN_ERRORS if name in doubts]
    assert _explain(doubts)[0].startswith("1 x loop: its body is counted once")


def test_names_that_only_sound_like_constructs_are_no_doubts():
    text = '  ROOT %while.1 = f32[2]{0} add(%gather.3, %b), metadata={op_name="jit(f)/while/body/gather"}'
    assert _constructs(text) == {}
    assert _constructs("  %w = (s32[], f32[2]{0}) while(%t), condition=%c, body=%b") == {"loop": 1}


def test_the_prediction_is_near_what_xla_lays_out(small_var_model):
    """A model so small that its activations are most of it; they are what the prediction overstates."""
    found = memory(small_var_model, [(1, 32), (8, 64), (8, 64)])
    assert [(one.side, one.batch, one.length) for one in found] == [
        *(("plain", 1, 32), ("VAR", 1, 32), ("plain", 8, 64), ("VAR", 8, 64))
    ]
    assert [one.relative for one in found] == pytest.approx([0.0] * 4, abs=0.25)
    assert found[2].allocated > 1.5 * found[0].allocated  # activations count, not only parameters


@pytest.fixture(scope="module")
def affine() -> VARModel:
    """Many experts and a hidden size that is small next to the rank, so that the mixes of all experts are large."""
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16}
    config = MoEConfig(vocab_size=64, num_layers=2, num_experts=32, top_k=2, **sizes)
    engine = get_engine("blocks")
    params = prepare(init_params(config, jax.random.key(0)), engine)
    model = Model(config, params, engine, "random", "none")
    stats = random_stats(model, [np.random.default_rng(0).integers(3, 64, 400).astype(np.int32)], 20)
    rule = policies(2)["affine, one"]
    return VARModel(model, rule, build_for(model, rule, stats, random_answers(model, stats.keys, rank=32)))


def test_the_memory_of_affine_answers_is_predicted(affine):
    """And would not be without what the mixes of all experts give."""
    (_, found), (_, other) = (memory(one, [(8, 128)]) for one in (affine, without_maps(affine)))
    assert found.relative == pytest.approx(0, abs=0.25)
    assert found.allocated - other.allocated > 0.5 * 4 * 8 * 128 * 32 * 32


def test_affine_answers_are_counted_and_xla_sees_them_too(affine):
    texts = {"prefill": np.zeros((2, 16), np.int32), "decode": np.zeros((2, 16), np.int32)}
    found = costs(affine, texts)
    other = costs(without_maps(affine), texts)
    for ours, theirs in zip(found, other, strict=True):
        more = ours.written["answers"].flops - theirs.written["answers"].flops
        if ours.side == "plain":
            assert more == 0
            continue
        assert 0 < ours.needed["answers"].flops < ours.written["answers"].flops
        assert ours.xla.flops - theirs.xla.flops == pytest.approx(more, rel=0.05)


def without_maps(var_model: VARModel) -> VARModel:
    answers = tuple(dataclasses.replace(known, affine=None) for known in var_model.table.answers)
    return VARModel(var_model.model, var_model.config, dataclasses.replace(var_model.table, answers=answers))


def test_the_section_names_the_farthest():
    said = memory_section([Peak("plain", 1, 32, 1.1e6, 1_000_000), Peak("VAR", 8, 64, 0.8e6, 1_000_000)])
    assert "-20.0%, VAR, 8 x 64" in said.outcome
    assert memory_section([]).verdict == "not measured"

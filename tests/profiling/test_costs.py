"""Analytical counts against a program's matrix products, against XLA where XLA is right, against known shares."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.attention import Sight, attend
from models.config import MoEConfig, read_config
from models.decoder import forward
from models.experts import Engine, get_engine
from models.kv_cache import KVCache
from models.layers import _Attention, _linear
from models.parameters import init_params
from profiling.costs import (
    COMPONENTS,
    Cost,
    Mix,
    Workload,
    _distinct_experts,
    component_costs,
    flops_per_token,
    map_products,
    parameters,
    table_bytes,
)
from profiling.published import PUBLISHED
from profiling.xla import _equations, analyze
from varjax import LayerPolicy, VARConfig
from varjax.affine import AffineMap
from varjax.routing import LayerAnswers, Plan, Routing
from varjax.stats import RoutingStats
from varjax.table import build_table

MIXTRAL_8X7B = PUBLISHED["mixtral-8x7b"]

PRODUCTS = ("projections", "scores", "gate", "experts", "head")  # components of which only matrix products are counted
CONFIG = MoEConfig(
    vocab_size=640,
    hidden_size=512,
    intermediate_size=768,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=256,
    num_experts=8,
    top_k=2,
)
ONE_LAYER = dataclasses.replace(CONFIG, num_layers=1)
SHAPE = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)


def products(traced) -> int:
    """Operations of the matrix products in a traced function, a multiply-add as two."""
    total = 0
    for equation in _equations(traced.jaxpr):
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            lengths = [equation.invars[0].aval.shape[axis] for axis in contracted]
            total += 2 * int(np.prod(equation.outvars[0].aval.shape)) * int(np.prod(lengths))
    return total


def sight(batch: int, length: int, slots: int | None = None, cached: bool = False) -> Sight:
    """What the queries of a call see, as shapes."""
    queries, keys = (jax.ShapeDtypeStruct((batch, count), jnp.int32) for count in (length, slots or length))
    offset = jax.ShapeDtypeStruct((), jnp.int32) if cached else None
    return Sight(queries, keys, jax.ShapeDtypeStruct(keys.shape, bool), offset, None)


def check(traced, flops: float) -> None:
    """The products are exactly those; XLA, which also counts what is left out, agrees within 1 %."""
    assert products(traced) == flops
    assert analyze(traced).flops == pytest.approx(flops, rel=0.01)


@pytest.mark.parametrize("length", [48, 160, 384])
def test_attention_of_a_whole_text_agrees_with_xla(length):
    linear = partial(_linear, use_bias=False)
    graph, state = nnx.split(nnx.eval_shape(lambda: _Attention(CONFIG, linear, nnx.Rngs(0))))
    heads = SHAPE((2, length, 1, 256))

    def run(state, x, cos, sin, seen):
        return nnx.merge(graph, state)(x, (cos, sin), seen, None, 0, attend)[0]

    traced = jax.jit(run).trace(state, SHAPE((2, length, 512)), heads, heads, sight(2, length))
    costs = component_costs(ONE_LAYER, Workload(2, length), Mix.plain(CONFIG, 2 * length), as_written=True)
    assert not analyze(traced).doubts
    check(traced, (costs["projections"] + costs["scores"]).flops)


@pytest.mark.parametrize("length", [1, 64, 65, 512, 513, 1000])
def test_scores_of_a_whole_text_are_those_of_its_blocks(length):
    queries, keys = SHAPE((1, length, 4, 256)), SHAPE((1, 2, length, 256))
    traced = jax.jit(attend).trace(queries, keys, keys, sight(1, length))
    costs = component_costs(ONE_LAYER, Workload(1, length), Mix.plain(CONFIG, length), as_written=True)
    assert products(traced) == costs["scores"].flops


def test_scores_with_a_key_value_cache_agree_with_xla():
    queries, keys = SHAPE((3, 1, 4, 256)), SHAPE((3, 2, 90, 256))
    traced = jax.jit(attend).trace(queries, keys, keys, sight(3, 1, 90, cached=True))
    workload = Workload(3, 1, cached=50, capacity=90)
    check(traced, component_costs(ONE_LAYER, workload, Mix.plain(CONFIG, 3), as_written=True)["scores"].flops)


def test_gate_head_and_expert_agree_with_xla():
    costs = component_costs(ONE_LAYER, Workload(1, 40), Mix(experts=1, distinct=1))
    x = SHAPE((40, 512))
    check(jax.jit(lambda x, w: jax.nn.softmax(x @ w)).trace(x, SHAPE((512, 8))), costs["gate"].flops)
    check(jax.jit(jnp.dot).trace(x, SHAPE((512, 640))), costs["head"].flops)

    expert = {"gate": SHAPE((512, 768)), "up": SHAPE((512, 768)), "down": SHAPE((768, 512))}
    routing = Routing(jax.ShapeDtypeStruct((40, 1), jnp.int32), SHAPE((40, 1)))
    check(jax.jit(get_engine("reference").apply).trace(x, routing, (expert,)), costs["experts"].flops)


def _first_experts(x, routing, experts):
    first = Routing(jnp.broadcast_to(jnp.arange(CONFIG.top_k), routing.experts.shape), routing.weights)
    return get_engine("reference").apply(x, first, experts[: CONFIG.top_k])


FIRST = Engine("first experts", get_engine("reference").prepare, _first_experts)
"""Runs as many experts on every token as a router would choose, but always the first ones."""


@pytest.mark.parametrize("cached", [0, 30])
@pytest.mark.parametrize("last_logits_only", [False, True])
def test_a_whole_plain_forward_agrees_with_xla(cached, last_logits_only):
    params = jax.eval_shape(lambda: _prepared(FIRST))
    kv = jax.eval_shape(lambda: KVCache.empty(CONFIG, 2, 120, jnp.float32)) if cached else None
    ids = jax.ShapeDtypeStruct((2, 80), jnp.int32)
    traced = forward.trace(params, ids, config=CONFIG, engine=FIRST, kv=kv, last_logits_only=last_logits_only)
    workload = Workload(2, 80, cached=cached, capacity=120 if cached else None, last_logits_only=last_logits_only)
    costs = component_costs(CONFIG, workload, Mix.plain(CONFIG, 160), as_written=True)
    assert products(traced) == sum(costs[name].flops for name in PRODUCTS)
    xla = analyze(traced)
    assert "loop" not in xla.doubts and "conditional" not in xla.doubts
    assert xla.flops == pytest.approx(sum(costs.values(), Cost()).flops, rel=0.01)


RANK, ANSWERS = 64, 300
MAPPED = AffineMap(
    *(SHAPE(shape) for shape in ((512, RANK), (RANK, 8, RANK), (RANK, 512), (ANSWERS, RANK), (8,))),
)


def _answers(affine: AffineMap | None) -> LayerAnswers:
    return LayerAnswers(
        jax.ShapeDtypeStruct((90, 8), jnp.int32), SHAPE((ANSWERS,)), SHAPE((ANSWERS, 512)), None, affine
    )


def test_a_map_agrees_with_xla():
    """What a layer's map computes for 40 tokens, without the look-up of the centers."""

    def run(affine, x, experts, answer, deviation, weights):
        deviations = affine.deviations(x, experts, answer)
        moved = jnp.sum(weights[..., None] * deviations, axis=-2)
        return affine.output(moved), affine.error(deviation, experts, deviations)

    slots = jax.ShapeDtypeStruct((40, 2), jnp.int32), jax.ShapeDtypeStruct((40, 2), jnp.int32)
    traced = jax.jit(run).trace(MAPPED, SHAPE((40, 512)), *slots, SHAPE((40, 2)), SHAPE((40, 2)))
    mix = Mix(experts=1, distinct=1, answers=1.0, planned=True, answer_rank=RANK)
    workload = Workload(1, 40)
    found = map_products(ONE_LAYER, workload, mix, as_written=True)
    assert products(traced) == found.flops == 40 * (4 * 512 * RANK + 2 * 8 * RANK * RANK)
    affine, constant = (
        component_costs(ONE_LAYER, workload, one, as_written=True)["answers"].flops
        for one in (mix, dataclasses.replace(mix, answer_rank=0))
    )
    assert affine - constant == found.flops + 40 * 2 * 5 * RANK
    assert analyze(traced).flops == pytest.approx(affine - constant, rel=0.01)


@pytest.mark.parametrize("rank", [0, RANK])
def test_a_whole_forward_with_answers_agrees_with_xla(rank):
    """One layer has a map, the other only answers."""
    params = jax.eval_shape(lambda: _prepared(FIRST))
    opened = jax.eval_shape(lambda: Plan.open(2, 2, 80, CONFIG.top_k, CONFIG.num_experts))
    plan = dataclasses.replace(opened, answers=(_answers(MAPPED if rank else None), _answers(None)))
    ids = jax.ShapeDtypeStruct((2, 80), jnp.int32)
    traced = forward.trace(params, ids, config=CONFIG, engine=FIRST, plan=plan)
    mix = dataclasses.replace(Mix.plain(CONFIG, 160), answers=0.5, answer_rank=rank, mapped=0.5)
    costs = component_costs(CONFIG, Workload(2, 80), mix, as_written=True)
    moving = map_products(CONFIG, Workload(2, 80), mix, as_written=True).flops
    assert (moving > 0) == (rank > 0)
    assert products(traced) == sum(costs[name].flops for name in PRODUCTS) + moving
    assert analyze(traced).flops == pytest.approx(sum(costs.values(), Cost()).flops, rel=0.01)


def test_what_a_map_needs_is_that_of_its_tokens_and_answers():
    """In one layer; a token is read and written once, however many of its experts are replaced."""
    unit, token = 2 * RANK * RANK, 4 * 512 * RANK
    for answers, tokens in ((0.0, 0.0), (0.25, 0.25), (1.0, 1.0), (1.5, 1.0)):
        mix = Mix(experts=2 - answers, distinct=8, answers=answers, planned=True, answer_rank=RANK)
        found = map_products(ONE_LAYER, Workload(1, 64), mix)
        assert found.flops == pytest.approx(64 * (tokens * token + answers * unit))
        mixes = _distinct_experts(8, answers, 64)
        arrays = 4 * (2 * 512 * RANK + mixes * RANK * RANK + 64 * tokens * 512)
        assert found.bytes == pytest.approx(arrays if answers else 0.0)
    constant = Mix.even(ONE_LAYER, 64, 1.0)
    assert map_products(ONE_LAYER, Workload(1, 64), constant) == Cost()
    affine = Mix.even(ONE_LAYER, 64, 1.0, answer_rank=RANK)
    more = component_costs(ONE_LAYER, Workload(1, 64), affine)["answers"]
    less = component_costs(ONE_LAYER, Workload(1, 64), constant)["answers"]
    moving = map_products(ONE_LAYER, Workload(1, 64), affine)
    assert more == less + moving + Cost(64 * 5.0 * RANK, 64 * 4.0 * RANK)


def test_the_bytes_of_maps_are_those_of_their_arrays():
    mix = Mix(experts=1, distinct=8, answers=1.0, planned=True, answer_rank=RANK)
    found = map_products(CONFIG, Workload(1, 3), mix, as_written=True)
    maps = 4 * sum(int(np.prod(leaf.shape)) for leaf in (MAPPED.read, MAPPED.mix, MAPPED.write))
    assert found.bytes == 2 * (maps + 4 * 3 * (512 + 2 * 8 * RANK))


def test_a_rank_beyond_the_hidden_size_is_refused():
    with pytest.raises(ValueError, match=r"mix\.answer_rank=513, mix\.mapped=1\.0: expected 0 to 512"):
        component_costs(CONFIG, Workload(1, 1), Mix(experts=2, distinct=2, answer_rank=513))


def _prepared(engine):
    params = init_params(CONFIG, jax.random.key(0))
    return {"decoder": params["decoder"], "experts": [engine.prepare(layer) for layer in params["experts"]]}


@pytest.mark.parametrize("window", [None, 1, 5, 64])
@pytest.mark.parametrize(("cached", "length"), [(0, 1), (0, 40), (7, 3), (100, 1), (3, 200)])
def test_needed_scores_are_those_that_the_mask_lets_through(cached, length, window):
    config = dataclasses.replace(ONE_LAYER, sliding_window=window)
    positions = jnp.arange(cached + length)[None]
    everything = Sight(positions[:, cached:], positions, jnp.ones(positions.shape, bool), cached, window)
    seen = everything.mask(0, length, cached + length)
    costs = component_costs(config, Workload(1, length, cached, itemsize=2), Mix.plain(config, length))["scores"]
    assert costs.flops == 4 * int(seen.sum()) * config.num_heads * config.head_dim
    queries = 2 * length * config.num_heads * config.head_dim
    keys = 2 * int(seen.any(axis=(0, 1)).sum()) * config.num_kv_heads * config.head_dim
    assert costs.bytes == 2 * (queries + keys)


def test_what_is_written_is_never_less_than_what_is_needed():
    mix = Mix.even(CONFIG, 1, 1.25, answer_rank=RANK)
    for workload in (Workload(2, 700), Workload(2, 1, cached=9, capacity=64), Workload(1, 1)):
        needed = component_costs(CONFIG, workload, mix)
        written = component_costs(CONFIG, workload, mix, as_written=True)
        for name in COMPONENTS:
            assert written[name].flops >= needed[name].flops and written[name].bytes >= needed[name].bytes
        assert written["answers"].flops > needed["answers"].flops  # all K are gathered


def test_one_token_reads_the_weights_of_the_experts_that_it_runs():
    numbers = sum(
        leaf.size for leaf in jax.tree.leaves(jax.eval_shape(partial(init_params, CONFIG), jax.random.key(0)))
    )
    assert parameters(CONFIG) == numbers
    few = component_costs(CONFIG, Workload(1, 1), Mix(experts=2, distinct=2))
    all_of_them = component_costs(CONFIG, Workload(1, 1), Mix(experts=2, distinct=8))
    left = numbers - CONFIG.vocab_size * CONFIG.hidden_size  # of the embedding a row is read
    weights = sum(cost.bytes for cost in all_of_them.values())
    assert weights == pytest.approx(4 * left, rel=0.01)  # activations are the rest
    assert all_of_them["experts"].bytes - few["experts"].bytes == 4 * 2 * 6 * 3 * 512 * 768


def test_a_plan_has_the_bytes_of_its_arrays():
    plan = Plan.open(2, 3, 5, CONFIG.top_k, CONFIG.num_experts)
    arrays = sum(leaf.nbytes for leaf in jax.tree.leaves((plan.tier, plan.experts_kept, plan.row, plan.routing)))
    costs = component_costs(CONFIG, Workload(3, 5), Mix(experts=2, distinct=8, planned=True))
    assert costs["plan"].bytes == arrays
    off = component_costs(CONFIG, Workload(3, 5), Mix(experts=2, distinct=8))
    assert off["plan"] == off["commit"] == off["answers"] == Cost()


def test_tied_embeddings_hold_fewer_parameters_and_cost_the_same():
    tied = dataclasses.replace(CONFIG, tie_word_embeddings=True)
    tree = jax.eval_shape(partial(init_params, tied), jax.random.key(0))
    assert parameters(tied) == sum(leaf.size for leaf in jax.tree.leaves(tree))
    workload, mix = Workload(1, 3), Mix.plain(CONFIG, 3)
    assert component_costs(tied, workload, mix) == component_costs(CONFIG, workload, mix)


@pytest.mark.parametrize("norm", ["head", "projection"])
def test_layers_without_experts_biases_and_norms_are_counted(norm):
    changes = {"query_key_norm": norm, "attention_bias": True, "dense_layers": (0, 2), "dense_size": 320}
    other = dataclasses.replace(CONFIG, **changes)
    tree = jax.eval_shape(partial(init_params, other), jax.random.key(0))
    assert parameters(other) == sum(leaf.size for leaf in jax.tree.leaves(tree))
    workload, mix = Workload(2, 3), Mix.plain(CONFIG, 6)
    before, after = (component_costs(config, workload, mix) for config in (CONFIG, other))
    assert after["experts"].flops - before["experts"].flops == 2 * 6 * 2 * 3 * 320 * CONFIG.hidden_size
    assert after["scores"].flops == before["scores"].flops * (CONFIG.num_layers + 2) / CONFIG.num_layers
    assert after["gate"] == before["gate"]


def test_a_mix_of_another_model_is_refused():
    with pytest.raises(ValueError, match=r"mix\.experts=3: expected 0 to 2"):
        component_costs(CONFIG, Workload(1, 1), Mix(experts=3, distinct=3))
    with pytest.raises(ValueError, match=r"mix\.distinct=9: expected 0 to 8"):
        component_costs(CONFIG, Workload(1, 1), Mix(experts=2, distinct=9))


@pytest.mark.parametrize(
    "file, name, number",
    [
        ("mixtral/config.json", "mixtral-8x7b", 46_702_792_704),
        ("olmoe_config.json", "olmoe-1b-7b", 6_919_161_856),
        ("qwen3_moe_config.json", "qwen3-30b-a3b", 30_532_122_624),
    ],
)
def test_published_models_are_as_published(shared_data, file, name, number):
    assert read_config(shared_data / file) == PUBLISHED[name]
    assert parameters(PUBLISHED[name]) == number


def test_shares_of_mixtrals_operations_and_bytes():
    """Experts dominate and the gate is nothing: at 1,024 keys, what a whole text of 2,048 tokens has on average."""
    flops = flops_per_token(MIXTRAL_8X7B, context=1024, experts=2)
    bytes_ = {
        name: cost.bytes
        for name, cost in component_costs(
            MIXTRAL_8X7B, Workload(1, 1, cached=1023, itemsize=2), Mix.plain(MIXTRAL_8X7B, 1)
        ).items()
    }
    for found, experts, attention, head, gate in ((flops, 86.6, 12.4, 1.0, 0.01), (bytes_, 88.0, 11.0, 1.0, 0.01)):
        share = {name: 100 * value / sum(found.values()) for name, value in found.items()}
        assert share["experts"] == pytest.approx(experts, abs=0.06)
        assert share["projections"] + share["scores"] == pytest.approx(attention, abs=0.06)
        assert share["head"] == pytest.approx(head, abs=0.06)
        assert share["gate"] == pytest.approx(gate, abs=0.006)


@pytest.mark.parametrize(("share", "ceiling"), [(0, 1), (0.25, 1.12), (0.5, 1.28), (0.75, 1.48), (1, 1.76)])
def test_the_most_that_single_expert_tokens_save_of_mixtrals_operations(share, ceiling):
    plain = sum(flops_per_token(MIXTRAL_8X7B, 1024, 2).values())
    var = sum(flops_per_token(MIXTRAL_8X7B, 1024, 2 - share).values())
    assert plain / var == pytest.approx(ceiling, abs=0.005)


@pytest.mark.parametrize(("k", "tokens"), [(1, 5), (2, 1), (2, 8), (3, 20)])
def test_distinct_experts_are_those_of_tokens_that_draw_different_ones(k, tokens):
    drawn = np.argsort(np.random.default_rng(0).random((20_000, tokens, 8)), axis=-1)[..., :k]
    hit = (drawn[..., None] == np.arange(8)).any(axis=(1, 2))  # [samples, E]
    assert _distinct_experts(8, k, tokens) == pytest.approx(hit.sum(axis=-1).mean(), abs=0.03)


def test_a_fraction_of_an_expert_is_a_mean_over_tokens():
    rng = np.random.default_rng(0)
    order = np.argsort(rng.random((20_000, 6, 8)), axis=-1)
    runs = rng.integers(0, 3, (20_000, 6, 1, 1))  # 0, 1 or 2 experts, 1 on average
    hit = ((order[..., :2, None] == np.arange(8)) & (np.arange(2)[:, None] < runs)).any(axis=2)
    assert _distinct_experts(8, 1.0, 6) == pytest.approx(hit.any(axis=1).sum(axis=-1).mean(), abs=0.03)
    with pytest.raises(ValueError, match="k=4 of 3 experts"):
        _distinct_experts(3, 4, 1)


def test_a_look_up_reads_a_bucket_its_keys_and_a_row_of_every_array():
    rng = np.random.default_rng(0)
    keys = np.arange(200, dtype=np.int32)[:, None]
    stats = RoutingStats.empty(keys, (1,), 3, 4)
    count = np.full_like(stats.count, 7)
    stats = dataclasses.replace(stats, count=count, sum_probs=7 * rng.dirichlet(np.ones(4), count.shape))
    config = VARConfig(
        frequency_threshold=1, entropy_threshold=9.0, default=LayerPolicy(experts_kept=1, use_answers=False)
    )
    table = build_table(config, stats, top_k=2)

    bucket, width = table.index.buckets.shape[1], table.index.keys.shape[1]
    look_up = (table.index.buckets.nbytes / len(table.index.buckets)) + bucket * 4 * width
    rows = len(table.index.keys)
    per_row = [leaf.nbytes / rows for leaf in (table.experts_kept, table.routing.experts, table.routing.weights)]
    expected = 5 * (look_up + table.eligible.nbytes / rows + sum(per_row))
    model = dataclasses.replace(MIXTRAL_8X7B, num_layers=3)
    assert table_bytes(model, 5, orders=1, width=width, bucket=bucket) == expected


def test_a_cache_too_small_for_its_positions_is_refused():
    with pytest.raises(ValueError, match="give 12 or more"):
        Workload(batch=1, length=2, cached=10, capacity=11)
    with pytest.raises(ValueError, match="at least 1"):
        Workload(batch=0, length=2)


def test_what_var_leaves_out_is_answered():
    mix = Mix.even(MIXTRAL_8X7B, tokens=1, experts=0.75)
    assert (mix.experts, mix.answers, mix.distinct) == (0.75, 1.25, 0.75)
    assert mix.planned and mix.table_bytes > 0
    assert not Mix.plain(MIXTRAL_8X7B, 1).planned

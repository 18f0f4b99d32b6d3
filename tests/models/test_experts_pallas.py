"""The engine for GPUs without one: its table of blocks, its kernels lowered for CUDA, and when it is chosen."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from models import experts_pallas, triton
from models.experts import _default_engine, get_engine
from models.experts_pallas import _block_table, _choose_tiles, _most_blocks, apply_pallas, stack_experts
from models.parameters import init_params, prepare
from profiling.published import PUBLISHED
from tests.lowering import lowered_for_cuda
from varjax.routing import Routing


@pytest.mark.parametrize(("tokens", "slots", "num_experts"), [(1, 3, 4), (2, 1, 8), (40, 2, 4), (7, 8, 64)], ids=str)
def test_each_used_slot_is_in_one_block_of_its_expert_and_no_block_is_idle(tokens, slots, num_experts):
    rng, rows = np.random.default_rng(0), 16
    most = _most_blocks(tokens * slots, num_experts, rows)
    for unused in (0.0, 0.4, 1.0):
        experts = rng.integers(0, num_experts, (tokens, slots))
        experts[rng.random(experts.shape) < unused] = num_experts
        routing = Routing(jnp.asarray(experts, jnp.int32), jnp.ones(experts.shape, jnp.float32))
        blocks = _block_table(routing, num_experts, rows)
        flat, order, held = experts.reshape(-1), np.asarray(blocks.order), []
        for expert, start, end in zip(*map(np.asarray, blocks[:3]), strict=True):
            if expert < num_experts:
                assignments = order[start : min(start + rows, end)]
                assert len(assignments) and (flat[assignments] == expert).all()
                held.extend(assignments)
        assert sorted(held) == np.flatnonzero(flat < num_experts).tolist()
        used = np.asarray(blocks.experts) < num_experts
        assert len(used) == most
        if tokens > 1:  # a token alone has a block for each slot, in order
            counts = np.bincount(flat, minlength=num_experts + 1)[:-1]
            assert used.tolist() == [True] * used.sum() + [False] * (most - used.sum())
            assert used.sum() == np.ceil(counts / rows).sum()


def test_the_bound_on_blocks_is_reached_and_never_passed():
    rng = np.random.default_rng(1)
    for slots, num_experts, rows in ((5, 8, 16), (64, 4, 16), (257, 8, 32)):
        most = _most_blocks(slots, num_experts, rows)
        drawn = [np.bincount(rng.integers(0, num_experts, slots)) for _ in range(50)]
        hit = min(num_experts, slots)
        worst = np.ones(hit, int)  # one row each, all others one expert's
        worst[0] += slots - hit
        needed = [int(np.ceil(counts / rows).sum()) for counts in (*drawn, worst)]
        assert max(needed) <= most == needed[-1]


def test_many_tokens_run_in_parts_with_the_same_result(monkeypatch):
    """So that the activations between the kernels stay small; the last part overlaps with the one before."""
    rng, (tokens, hidden, size) = np.random.default_rng(0), (23, 16, 32)
    sizes = {"gate": (4, hidden, size), "up": (4, hidden, size), "down": (4, size, hidden)}
    experts = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in sizes.items()}
    x = jnp.asarray(rng.normal(size=(tokens, hidden)), jnp.float32)
    chosen = rng.integers(0, 5, (tokens, 2))  # 4: an unused slot
    routing = Routing(jnp.asarray(chosen, jnp.int32), jnp.asarray(rng.random((tokens, 2)), jnp.float32))
    whole = apply_pallas(x, routing, experts, True)
    monkeypatch.setattr(experts_pallas, "_HIDDEN_BYTES", 2 * size * 4 * 9)  # of nine tokens
    lengths, run = [], experts_pallas._apply
    monkeypatch.setattr(experts_pallas, "_apply", lambda x, *rest: lengths.append(len(x)) or run(x, *rest))
    np.testing.assert_allclose(apply_pallas(x, routing, experts, True), whole, rtol=1e-5, atol=1e-5)
    assert set(lengths) == {8}


def grids_of(monkeypatch, arguments) -> dict[str, tuple[int, ...]]:
    """The programs of each kernel: blocks, tiles of columns, and parts of the depth."""
    grids, call = {}, experts_pallas._call
    monkeypatch.setattr(experts_pallas, "_call", lambda *rest: grids.update({rest[4]: rest[2]}) or call(*rest))
    jax.eval_shape(lambda *given: experts_pallas._apply(*given, interpret=False), *arguments)
    monkeypatch.setattr(experts_pallas, "_call", call)
    return grids


def test_few_tokens_divide_the_depth_of_down_with_the_same_result(monkeypatch):
    rng, (hidden, size) = np.random.default_rng(0), (48, 600)  # 600: five steps of 128, the last with 88 columns
    sizes = {"gate": (4, hidden, size), "up": (4, hidden, size), "down": (4, size, hidden)}
    experts = {name: jnp.asarray(rng.normal(size=shape) / 10, jnp.float32) for name, shape in sizes.items()}
    for tokens in (1, 3):
        x = jnp.asarray(rng.normal(size=(tokens, hidden)), jnp.float32)
        chosen = rng.integers(0, 5, (tokens, 2))  # 4: an unused slot
        routing = Routing(jnp.asarray(chosen, jnp.int32), jnp.asarray(rng.random((tokens, 2)), jnp.float32))
        assert grids_of(monkeypatch, (x, routing, experts))["down"][2] > 1
        divided = experts_pallas._apply(x, routing, experts, True)
        with monkeypatch.context() as patch:
            patch.setattr(experts_pallas, "PROGRAMS", 1)
            assert grids_of(patch, (x, routing, experts))["down"][2] == 1
            whole = experts_pallas._apply(x, routing, experts, True)
        np.testing.assert_allclose(divided, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "least"), [("mixtral-8x7b", (264, 264)), ("olmoe-1b-7b", (32, 256))])
def test_one_expert_of_one_token_starts_programs_enough_for_a_gpu(monkeypatch, name, least):
    """A product of gate and up is not divided by depth; the small experts of OLMoE have few columns."""
    grids = grids_of(monkeypatch, arguments_of(PUBLISHED[name], 1))
    assert all(
        np.prod(grids[kernel][1:]) >= wanted for kernel, wanted in zip(("gate_and_up", "down"), least, strict=True)
    )
    prefill = grids_of(monkeypatch, arguments_of(PUBLISHED[name], 2048))
    assert prefill["down"][2] == 1 and prefill["down"][1] == PUBLISHED[name].hidden_size // 256  # wide tiles, whole


def arguments_of(config, tokens: int):
    """What the engine takes, at the sizes of a model, in bfloat16."""
    sizes, dtype = (config.num_experts, config.hidden_size, config.intermediate_size), jnp.bfloat16
    wide, tall = (jax.ShapeDtypeStruct(shape, dtype) for shape in (sizes, (sizes[0], sizes[2], sizes[1])))
    routing = Routing(*(jax.ShapeDtypeStruct((tokens, config.top_k), kind) for kind in (jnp.int32, jnp.float32)))
    return jax.ShapeDtypeStruct((tokens, config.hidden_size), dtype), routing, dict(gate=wide, up=wide, down=tall)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("tokens", [1, 64, 2048])
@pytest.mark.parametrize("name", PUBLISHED)
def test_both_kernels_are_lowered_for_cuda_at_real_sizes(name, tokens):
    config = PUBLISHED[name]
    out, text = lowered_for_cuda(get_engine("pallas").apply, *arguments_of(config, tokens))
    assert text.count("gpu.triton") == 2 and 'name = "gate_and_up"' in text and 'name = "down"' in text
    assert ("sort" in text) == (tokens > 1)
    assert (out.shape, out.dtype) == ((tokens, config.hidden_size), jnp.bfloat16)


def test_tiles_follow_the_rows_of_an_expert_and_the_bytes_of_a_number():
    mixtral = [_choose_tiles(2 * tokens, 8, 2) for tokens in (1, 64, 256)]
    assert [(one.rows, one.columns, one.depth) for one in mixtral] == [(16, 128, 128), (32, 128, 128), (128, 256, 64)]
    assert _choose_tiles(8 * 64, 128, 2).rows == 16 < _choose_tiles(8 * 2048, 128, 2).rows
    assert _choose_tiles(2, 8, 4).depth == mixtral[0].depth // 2


def test_specs_are_stacked_as_arrays_are():
    specs = stack_experts({index: {"down": PartitionSpec("model", None)} for index in range(3)})
    assert specs == {"down": PartitionSpec(None, "model", None)}


def test_layers_are_let_go_of_where_parameters_are_donated(tiny_config):
    params = init_params(tiny_config, jax.random.key(0))
    kept = prepare(params, get_engine("pallas"))
    assert len(params["experts"]) == tiny_config.num_layers
    donated = prepare(params, get_engine("pallas"), donate=True)
    assert params["experts"] == []
    jax.tree.map(np.testing.assert_array_equal, donated, kept)


def gpu(capability: str | None, platform: str = "gpu"):
    fields = {} if capability is None else {"compute_capability": capability}
    return SimpleNamespace(platform=platform, device_kind="A device", **fields)


@pytest.mark.parametrize("capability", ["8.0", "8.9", "9.0", "10.0"])
def test_on_cuda_the_default_is_pallas(capability):
    assert _default_engine(gpu(capability)) is get_engine("pallas")


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_elsewhere_the_default_is_blocks_and_nothing_is_said(platform):
    assert _default_engine(gpu(None, platform)) is get_engine("blocks") is get_engine()


@pytest.mark.parametrize(("capability", "reason"), [("7.5", "it needs 8.0 or more"), ("gfx942", "not an NVIDIA GPU")])
def test_a_fallback_says_why(capability, reason):
    with pytest.warns(UserWarning, match=f"on the engine 'blocks', not 'pallas': A device .*{reason}"):
        assert _default_engine(gpu(capability)) is get_engine("blocks")


def test_a_jax_without_the_backend_is_a_reason_too(monkeypatch):
    monkeypatch.setattr(triton, "backend", None)
    with pytest.warns(UserWarning, match="no Triton backend"):
        assert _default_engine(gpu("9.0")).name == "blocks"

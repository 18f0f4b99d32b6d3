"""The device's benchmark on what there is: every part runs, tiny, and its figures hang together."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from analysis.report.provenance import write_json
from benchmarks import experts, torch_model
from benchmarks import rivals as rivals_module
from benchmarks.device import QUICK, _experts, layers_that_fit, run
from benchmarks.rivals import rivals
from models.experts import Engine, get_engine
from models.experts_pallas import stack_experts
from profiling.costs import parameters
from profiling.published import HARDWARE, PUBLISHED
from varjax.routing import Routing

MIXTRAL_8X7B = PUBLISHED["mixtral-8x7b"]

TINY = dataclasses.replace(
    MIXTRAL_8X7B,
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    num_experts=4,
)
LITTLE = dataclasses.replace(QUICK, rounds=2, tokens=(1, 8), single=(0.0, 1.0), length=16, cached=8, keys=8, steps=2)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "benchmarks" / "here.json"
    write_json(path, run(TINY, LITTLE, say=lambda line: None))
    return json.loads(path.read_text())


def test_all_parts_are_there_or_it_is_said_why(result):
    there = {"experts/1", "experts/8", "prefill", "decode/1", "ceilings", "layers", "engine", "provenance"}
    assert there <= result.keys() and result["layers"] == 1
    if jax.default_backend() == "cpu":
        assert result["left_out"]["pallas"].endswith("is not an NVIDIA GPU") and result["engine"] == "blocks"
        assert "transformers" in result["left_out"] and "peak_bytes" in result["left_out"]


def test_figures_are_those_of_the_work_that_was_asked_for(result):
    for tokens in (1, 8):
        cells = {(one["engine"], one["experts_kept"]): one for one in result[f"experts/{tokens}"]}
        assert cells.keys() >= {(name, kept) for name in ("blocks", "lax.ragged_dot") for kept in (2.0, 1.0)}
        for (_, kept), one in cells.items():
            assert one["single"] == 2 - kept
            flops = 2 * tokens * kept * 3 * TINY.hidden_size * TINY.intermediate_size
            assert one["flops_per_second"] * one["seconds"]["value"] == pytest.approx(flops)
            assert 0 < one["of_ceiling"] < 1 and one["of_plain"]["value"] > 0
    for part in ("prefill", "decode/1"):
        plain, one = result[part]
        assert (plain["mix"], plain["experts"], one["mix"], one["experts"]) == ("plain", 2.0, "one", 1.0)
        assert plain["speedup"] == 1 and plain["tokens_per_second"] > 0


def test_a_rival_that_fails_is_left_out_and_a_fault_of_ours_is_not(monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise ValueError("operands could not be broadcast together")

    engines = {"theirs": Engine("theirs", stack_experts, partial(rivals_module._apply, product=broken))}
    given = (TINY, dataclasses.replace(LITTLE, rounds=1), 2, {"blocks": get_engine("blocks")}, engines)
    hardware, left_out = HARDWARE["h200"], {}
    found = _experts(*given, hardware, left_out)
    assert {one["engine"] for one in found} == {"blocks"}
    assert left_out == {"theirs/2": "ValueError: operands could not be broadcast together"}

    measure = experts.measure
    monkeypatch.setattr(
        experts, "measure", lambda *args: broken() if "theirs" in args[-2] else measure(*args)
    )  # the measuring itself is at fault
    with pytest.raises(ValueError, match="broadcast"):
        _experts(*given, hardware, {})


def test_no_part_begins_when_time_is_up():
    found = run(TINY, dataclasses.replace(LITTLE, seconds=0), say=lambda line: None)
    assert not any(name.startswith(("experts/", "decode/", "prefill")) for name in found)
    assert {"experts/1", "prefill", "decode/1"} <= found["left_out"].keys()


def test_layers_are_left_out_where_memory_is_short():
    whole = 2 * parameters(MIXTRAL_8X7B)
    assert layers_that_fit(MIXTRAL_8X7B, None) == layers_that_fit(MIXTRAL_8X7B, whole / 0.84) == 32
    fewer = layers_that_fit(MIXTRAL_8X7B, 80e9)
    assert 2 * parameters(dataclasses.replace(MIXTRAL_8X7B, num_layers=fewer)) <= 0.85 * 80e9
    assert 2 * parameters(dataclasses.replace(MIXTRAL_8X7B, num_layers=fewer + 1)) > 0.85 * 80e9
    with pytest.raises(ValueError, match="the device has 1,000,000,000"):
        layers_that_fit(MIXTRAL_8X7B, 1e9)


def test_rivals_compute_the_same():
    rng, reference = np.random.default_rng(0), get_engine("reference")
    x = jnp.asarray(rng.normal(size=(5, 8)), jnp.float32)
    experts = {
        index: {
            name: jnp.asarray(rng.normal(size=shape), jnp.float32)
            for name, shape in (("gate", (8, 12)), ("up", (8, 12)), ("down", (12, 8)))
        }
        for index in range(3)
    }
    routing = Routing(jnp.asarray(rng.integers(0, 4, (5, 2)), jnp.int32), jnp.asarray(rng.random((5, 2)), jnp.float32))
    expected = reference.apply(x, routing, reference.prepare(experts))
    found, missing = rivals(jax.devices()[0])
    assert {*found, *missing} == {"lax.ragged_dot", "tokamax"}
    for engine in found.values():
        np.testing.assert_allclose(engine.apply(x, routing, engine.prepare(experts)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "fields",
    [{}, {"family": "olmoe", "query_key_norm": "projection", "normalize_top_k": False}],
    ids=["Mixtral", "OLMoE"],
)
def test_transformers_is_timed_where_torch_is(fields):
    pytest.importorskip("torch")
    options = {"tokens": [1, 4], "length": 8, "cached": 4, "batches": [1, 2], "steps": 2, "rounds": 2}
    found = torch_model.measure(dataclasses.replace(TINY, **fields), device="cpu", **options)
    assert found["seconds"].keys() == {"experts/1", "experts/4", "prefill", "decode/1", "decode/2"}
    assert all(len(own) == 2 and min(own) > 0 for own in found["seconds"].values())

"""Rules on made-up evidence, and slow-downs that are planted in a real run, found and named."""

import dataclasses
import time

import jax
import numpy as np
import pytest

import profiling.bottlenecks
from analysis.resampling import Estimate
from models import load_model
from profiling import components
from profiling.bottlenecks import Evidence, _bottlenecks, examine, gather
from profiling.calls import workload_and_mix
from profiling.components import OTHER, Breakdown, measure_sides
from profiling.points import embedded_texts, policies, random_stats
from varjax import VARModel, step
from varjax.config import VARConfig
from varjax.table import build_table

WELL = Evidence(
    phase="decode",
    batch=1,
    plain={"plan": 0.0, "experts": 6e-3, "projections": 3e-3, "commit": 0.0, "other": 1e-3},
    var={"plan": 1e-4, "experts": 2.4e-3, "projections": 3e-3, "commit": 1e-4, "other": 1e-3},
    speedup=Estimate(1.5, 1.45, 1.55),
    experts=(2.0, 0.8),
    tiers={"fast": 0.95, "cached": 0.0, "learned": 0.05},
    cached_tier=False,
    overhead=1e-4,
    waiting={"experts": False, "projections": False},
    exponent=(1.02, 1.0),
)


def seen(**changes):
    return {one.name: one for one in _bottlenecks(dataclasses.replace(WELL, **changes))}


@pytest.mark.parametrize("raised", [ValueError, RuntimeError])
def test_a_fault_in_a_rule_is_no_finding(monkeypatch, raised):
    def broken(evidence):
        raise raised("operands could not be broadcast together")

    monkeypatch.setattr(profiling.bottlenecks, "RULES", (*profiling.bottlenecks.RULES, broken))
    with pytest.raises(raised, match="broadcast"):
        _bottlenecks(WELL)


def test_where_all_is_well_nothing_is_found():
    assert _bottlenecks(WELL) == []


@pytest.mark.parametrize(
    ("changes", "name", "severity", "said"),
    [
        ({"speedup": Estimate(0.7, 0.6, 0.8)}, "slow-down", "high", "0.70x [0.60, 0.80]"),
        ({"speedup": Estimate(0.96, 0.95, 0.99)}, "slow-down", "low", "0.96x"),
        ({"var": {**WELL.var, "plan": 5e-3}}, "look-up", "high", "plan 5.00 ms, commit 100 µs"),
        ({"tiers": {"fast": 0.4, "cached": 0.0, "learned": 0.6}}, "learned share", "high", "60% of tokens and layers"),
        ({"cached_tier": True}, "cache use", "low", "decides 0.00%"),
        ({"var": {**WELL.var, "answers": 4e-4}}, "answers", "medium", "answers take 400 µs: 6% of the call"),
        ({"var": {**WELL.var, "answers": 2e-3}, "answer_rank": 64}, "answers", "high", "2.00 ms, with maps of rank 64"),
        ({"var": {**WELL.var, "experts": 6e-3}}, "padding waste", "high", "0.40 of the plain model's expert runs"),
        ({"overhead": 3e-3}, "dispatch-bound", "high", "3.00 ms of 6.60 ms"),
        ({"waiting": {"experts": True, "projections": True}}, "memory-bound", "low", "82% of the call waits"),
        ({"exponent": (1.6, 1.0)}, "poor scaling", "high", "to the power of 1.60, 1.00"),
    ],
)
def test_each_bottleneck_is_named_alone_with_its_severity_and_numbers(changes, name, severity, said):
    found = seen(**changes)
    assert list(found) == [name] and found[name].severity == severity
    assert said in found[name].evidence and found[name].where == "decode, batch 1" and found[name].advice


@pytest.mark.parametrize(
    "changes",
    [
        {"speedup": Estimate(0.98, 0.9, 1.02)},  # the interval reaches 1
        {"cached_tier": True, "tiers": {"fast": 0.8, "cached": 0.15, "learned": 0.05}},
        {"overhead": None, "waiting": None, "exponent": None},  # not measured
        {"var": {**WELL.var, "answers": 1e-4}, "answer_rank": 64},
        {"experts": (2.0, 2.0), "var": {**WELL.plain, "plan": 1e-4}, "speedup": Estimate(1.0, 0.99, 1.01)},
    ],
)
def test_what_is_no_bottleneck_is_not_found(changes):
    assert seen(**changes) == {}


def test_the_most_expensive_comes_first():
    found = _bottlenecks(
        dataclasses.replace(WELL, var={**WELL.var, "plan": 5e-3}, cached_tier=True, exponent=(1.2, 1.0))
    )
    assert [one.name for one in found] == sorted(
        [one.name for one in found], key=lambda name: -seen_cost(found, name)
    ) and len(found) == 3


def seen_cost(found, name):
    return next(one.cost for one in found if one.name == name)


def test_advice_that_was_tried_says_what_came_of_it():
    found = seen(cached_tier=True, tried={"cache use": 1.5})
    assert "Tried: 1.50x" in found["cache use"].advice
    assert found["cache use"].cost == pytest.approx(1 / 3) and found["cache use"].severity == "high"


def test_a_slow_down_names_the_component_that_grew_most():
    found = seen(var={**WELL.var, "commit": 9e-3}, speedup=Estimate(0.6, 0.55, 0.65))
    assert "commit grew most, by 9.00 ms" in found["slow-down"].evidence


def test_of_the_plain_model_nothing_is_said_that_compares():
    """VAR is switched off: no speed-up, no tiers; what the call itself is bound by is still said."""
    seconds = {"experts": 0.5, "attention": 0.1, "other": 0.4}
    seen = Evidence(
        phase="decode",
        batch=1,
        plain=seconds,
        var=seconds,
        speedup=None,
        experts=(2.0, 2.0),
        tiers=None,
        cached_tier=False,
        overhead=seconds["other"],
    )
    assert [one.name for one in _bottlenecks(seen)] == ["dispatch-bound"]


MEASURING = {"turns": 2, "max_calls": 4, "recording": 0.0}


@pytest.fixture(scope="module")
def reference():
    return load_model("reference")


@pytest.fixture(scope="module")
def texts(reference):
    return embedded_texts(reference, 40)


def one_expert(model, texts):
    """VAR with one expert instead of two for every token."""
    config = policies(model.config.num_layers)["one"]
    stats = random_stats(model, list(texts), 50)
    return VARModel(model, config, table=build_table(config, stats, top_k=model.config.top_k))


@pytest.fixture(autouse=True)
def short_turns(monkeypatch):
    monkeypatch.setattr(components, "TURN", 0.01)


def found(var_model, ids, phase, folder):
    breakdowns = measure_sides(var_model, {phase: ids}, folder=folder, **MEASURING)
    (seen,) = gather(var_model, {phase: ids}, breakdowns, rounds=3)
    section, named = examine([seen])
    assert section.verdict == ("FAIL" if any(one.severity == "high" for one in named) else "PASS")
    return seen, {one.name: one for one in named}


def test_a_sleep_in_the_look_up_is_found_and_named(small_var_model, documents, tmp_path, monkeypatch):
    real = step.fast_plan

    def sleepy(table, contexts):
        plan = real(table, contexts)

        def rest(tier):
            time.sleep(0.02)
            return tier

        return dataclasses.replace(plan, tier=jax.pure_callback(rest, plan.tier, plan.tier))

    monkeypatch.setattr(step, "fast_plan", sleepy)
    jax.clear_caches()  # what was compiled does not sleep
    ids = np.stack([one.ids[:12] for one in documents[:1]])
    seen, named = found(small_var_model, ids, "decode", tmp_path)
    jax.clear_caches()  # and nobody else is to
    assert named["look-up"].severity == "high" and named["slow-down"].severity == "high"
    assert seen.var["plan"] > 0.015 and "plan grew most" in named["slow-down"].evidence


def test_a_cache_of_one_entry_is_found_and_a_useful_one_is_not(saved_model, documents):
    """Nothing but the cached tier plans; it remembers every decision. How long components take is made up."""
    some = documents[:60]
    stats = random_stats(saved_model, [one.ids for one in some], 50)
    config = VARConfig(confidence_threshold=0.0, entropy_threshold=0.0, context_window_size=1)
    text = np.concatenate([one.ids for one in some])[None, :120]  # few words, again and again
    seconds = {"plan": 1e-4, "experts": 1e-3, "commit": 1e-4, OTHER: 1e-4}
    traced = [Breakdown(side, "decode", 1, 1, 1.0, 1.0, 0.0, seconds, 0.0) for side in ("plain", "VAR")]
    for size, useless in ((1, True), (1000, False)):
        sized = dataclasses.replace(config, cache_size=size)
        sized = dataclasses.replace(sized, default=dataclasses.replace(sized.default, use_answers=False))
        var_model = VARModel(saved_model, sized, table=build_table(sized, stats, top_k=saved_model.config.top_k))
        (seen,) = gather(var_model, {"decode": text}, traced, rounds=1)
        _, named = examine([seen])
        assert ("cache use" in {one.name for one in named}) == (seen.tiers["cached"] < 0.01)
        assert (seen.tiers["cached"] < 0.5) == useless
        assert "cache use" in seen.tried


def test_an_engine_that_runs_experts_for_nothing_is_found(texts, tmp_path):
    ids = np.concatenate(texts)[None, :128].astype(np.int32)
    padding = load_model("reference", implementation="reference")  # every expert for every token
    seen, named = found(one_expert(padding, texts), ids, "prefill", tmp_path)
    assert seen.experts == (2.0, 1.0)
    assert "padding waste" in named and "0.50 of the plain model's expert runs" in named["padding waste"].evidence


def test_the_mix_of_a_call_is_what_ran(reference, texts):
    ids = np.concatenate(texts)[None, :32].astype(np.int32)
    var_model = one_expert(reference, texts)
    workload, mix = workload_and_mix(var_model, ids, "decode")
    assert (workload.batch, workload.length, workload.cached) == (1, 1, 16)
    assert (mix.experts, mix.distinct, mix.answers, mix.planned) == (1.0, 1.0, 0.0, True)  # the table holds no answers
    assert workload.itemsize == 4 and mix.table_bytes > 0
    workload, mix = workload_and_mix(var_model.disabled(), ids, "prefill")
    assert workload.tokens == 32 and mix.experts == 2.0 and not mix.planned and 2 < mix.distinct <= 8

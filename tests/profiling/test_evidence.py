"""Slow-downs that are planted in a real run, found and named."""

import dataclasses
import time

import jax
import numpy as np
import pytest

from models import load_model
from profiling.bottlenecks import bottlenecks
from profiling.components import measure_sides
from profiling.evidence import gather, workload_and_mix
from profiling.points import embedded_texts, policies
from profiling.step_bench import random_stats
from varjax import VARModel, step
from varjax.config import VARConfig
from varjax.table import build_table

MEASURING = {"turns": 2, "max_calls": 4, "ablate": False, "recording": 0.0}


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


def found(var_model, ids, phase, folder):
    breakdowns = measure_sides(var_model, {phase: ids}, folder=folder, **MEASURING)
    (seen,) = gather(var_model, {phase: ids}, breakdowns, rounds=3)
    return seen, {one.name: one for one in bottlenecks(seen)}


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


def test_a_cache_of_one_entry_is_found_and_a_useful_one_is_not(saved_model, documents, tmp_path):
    """Nothing but the cached tier plans; it remembers every decision."""
    some = documents[:60]
    stats = random_stats(saved_model, [one.ids for one in some], 50)
    config = VARConfig(confidence_threshold=0.0, entropy_threshold=0.0, context_window_size=1)
    text = np.concatenate([one.ids for one in some])[None, :200]  # few words, again and again
    for size, useless in ((1, True), (1000, False)):
        sized = dataclasses.replace(config, cache_size=size)
        sized = dataclasses.replace(sized, default=dataclasses.replace(sized.default, use_answers=False))
        var_model = VARModel(saved_model, sized, table=build_table(sized, stats, top_k=saved_model.config.top_k))
        seen, named = found(var_model, text, "decode", tmp_path / str(size))
        assert ("cache use" in named) == (seen.tiers["cached"] < 0.01)
        assert (seen.tiers["cached"] < 0.5) == useless
        assert "cache use" in seen.tried


def test_an_engine_that_runs_experts_for_nothing_is_found(texts, tmp_path):
    ids = np.concatenate(texts)[None, :256].astype(np.int32)
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

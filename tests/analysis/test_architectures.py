"""Statistics, answers, traces and a policy on models of other families, with a layer without experts between others."""

import dataclasses

import jax
import numpy as np
import pytest

from analysis.collect.answers import collect_answers
from analysis.collect.statistics import KeySettings, choose_keys, collect
from analysis.evaluate.points import Subject
from analysis.evaluate.policy_search import search
from analysis.traces.recording import record
from analysis.traces.trace import read
from models import Model
from models.experts import get_engine
from models.parameters import init_params, prepare
from varjax import LayerPolicy, VARConfig, VARModel
from varjax.model import build_for

READING = {"batch_size": 20, "max_length": 16, "progress": False}
BETWEEN = {"dense_layers": (1,), "dense_size": 20}
FAMILIES = {
    "olmoe": {"query_key_norm": "projection", "clip_qkv": 1.0, "normalize_top_k": False},
    "qwen3_moe": {"query_key_norm": "head", "attention_bias": True},
}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, saved_model) -> Model:
    """Three layers, the middle one without experts; the tokenizer of `saved_model`."""
    config = dataclasses.replace(saved_model.config, family=request.param, **FAMILIES[request.param], **BETWEEN)
    params = prepare(init_params(config, jax.random.key(1)), get_engine())
    return dataclasses.replace(saved_model, config=config, params=params, fingerprint=request.param)


@pytest.fixture(scope="module")
def known(documents):
    return [dataclasses.replace(one, ids=one.ids[:16]) for one in documents if len(one.ids) >= 16]


@pytest.fixture(scope="module")
def stats(model, known):
    return collect(model, known[:-40], choose_keys(model, known[:-40], 16, KeySettings((1,), min_count=1)), **READING)


@pytest.fixture(scope="module")
def answers(model, known, stats):
    return collect_answers(model, known[:-40], stats.keys, range(2), **READING)


def test_statistics_are_of_the_layers_with_experts(model, known, stats):
    ids = np.stack([one.ids for one in known[:-40]])
    ordinary = ~np.isin(ids, model.config.special_token_ids)
    probs = np.asarray(model(ids).router_probs, np.float64)
    assert stats.count.shape == (2, len(stats.keys))
    np.testing.assert_allclose(stats.sum_probs.sum(1), probs[:, ordinary].sum(1), rtol=1e-5)


def test_the_table_weighs_experts_as_the_gate_does(model, stats):
    config = VARConfig(
        default=LayerPolicy(use_answers=False, ngram_orders=(1,)), frequency_threshold=1, entropy_threshold=9.0
    )
    table = build_for(model, config, stats, keep_shapes=True)
    sums = np.asarray(table.routing.weights.sum(-1))[:, :-1]  # the last row is order 0
    mean = stats.sum_probs / stats.count[..., None]
    best = -np.sort(-mean, axis=-1)[..., : model.config.top_k].sum(-1)
    np.testing.assert_allclose(sums, 1 if model.config.normalize_top_k else best, rtol=1e-5)


@pytest.mark.optimized
def test_switched_off_it_is_the_plain_model_bit_for_bit(model, known):
    ids = np.stack([one.ids for one in known[-4:]])
    plain, (off, _) = model(ids), VARModel(model, VARConfig(enable_var=False))(ids, None)
    for name in ("logits", "router_probs", "routing"):
        jax.tree.map(np.testing.assert_array_equal, getattr(off, name), getattr(plain, name))


def test_switched_on_it_runs_fewer_experts(model, known, stats, answers):
    config = VARConfig(default=LayerPolicy(experts_kept=1), frequency_threshold=3, entropy_threshold=9.0)
    var_model = VARModel(model, config, table=build_for(model, config, stats, answers))
    ids = np.stack([one.ids for one in known[-4:]])
    on, state = var_model(ids, var_model.init(4))
    assert len(var_model.report(state)["layers"]) == 2
    assert 1 <= var_model.report(state)["experts_per_token"] < model.config.top_k
    assert np.abs(on.logits - model(ids).logits).max() > 0


def test_a_policy_is_found(model, known, stats, answers):
    found = search(Subject(model, stats, answers, VARConfig(), known[-40:], **READING), budget=0.5)
    assert found.chosen.degradation <= 0.5
    assert found.chosen.experts_per_token < model.config.top_k
    assert {choice.layer for one in found.path for choice in one.choices} == {0, 1}


def test_a_trace_has_the_layers_with_experts(model, known, tmp_path):
    record(model, known[:3], tmp_path / "trace.parquet", **READING)
    trace = read(tmp_path / "trace.parquet")
    routing = model(np.stack([one.ids for one in known[:3]])).routing
    assert trace.experts.shape[1:] == (2, model.config.top_k)
    kept = ~np.isin(np.stack([one.ids for one in known[:3]]), model.config.special_token_ids)
    np.testing.assert_array_equal(trace.experts, np.moveaxis(np.asarray(routing.experts), 0, 2)[kept])

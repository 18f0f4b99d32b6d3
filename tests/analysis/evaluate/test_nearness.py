"""Divergence and agreement with the plain model, against a slow loop."""

import dataclasses

import numpy as np
import pytest

from analysis.evaluate.losses import plain_runner, score, var_runner
from analysis.evaluate.nearness import nearness
from varjax import LayerPolicy, VARConfig, VARModel
from varjax.model import build_for
from varjax.step import summary

READING = {"batch_size": 20, "max_length": 16, "progress": False}


@pytest.fixture(scope="module")
def var_model(saved_model, collected):
    policy = LayerPolicy(experts_kept=0, ngram_orders=(1, 2), entropy_threshold=10.0)
    config = VARConfig(frequency_threshold=1, cache_size=0, default=policy)
    return VARModel(saved_model, config, build_for(saved_model, config, collected.stats, collected.answers))


def test_nearness_is_that_of_single_positions(var_model, collected):
    documents = collected.held_out[:3]
    (found,) = nearness(var_model.model, [var_model], documents, **READING)
    for number, document in enumerate(documents):
        ids = np.asarray(document.ids)[None]
        plain = np.asarray(var_model.model(ids).logits, np.float64)[0, :-1]  # the last position predicts nothing here
        changed = np.asarray(var_model(ids, var_model.init())[0].logits, np.float64)[0, :-1]
        logs = [logits - np.log(np.exp(logits).sum(-1, keepdims=True)) for logits in (plain, changed)]
        divergence = (np.exp(logs[0]) * (logs[0] - logs[1])).sum()
        assert found.tokens[number] == len(plain)
        assert found.divergence[number] == pytest.approx(divergence, rel=1e-3, abs=1e-6)
        assert found.agreements[number] == (plain.argmax(-1) == changed.argmax(-1)).sum()
        targets = ids[0, 1:, None]
        losses = [-np.take_along_axis(log, targets, axis=-1).sum() for log in logs]
        assert found.added[number] == pytest.approx(losses[1] - losses[0], rel=1e-3, abs=1e-3)


def test_the_experts_and_the_loss_are_those_of_an_evaluation(var_model, collected):
    (found,) = nearness(var_model.model, [var_model], collected.held_out, **READING)
    plain, _ = score(plain_runner(var_model.model), None, collected.held_out, **READING)
    scores, state = score(var_runner(var_model), var_model.init(20), collected.held_out, **READING)
    assert found.experts_per_token == pytest.approx(summary(state.counters, 2)["experts_per_token"])
    np.testing.assert_allclose(found.added, scores.nll - plain.nll, atol=1e-3)
    change = found.degradation()
    assert change.value == pytest.approx(np.expm1(scores.nll_per_token - plain.nll_per_token), abs=1e-5)
    assert change.low < change.value < change.high


def test_the_plain_model_is_nearest_to_itself(var_model, collected):
    both = nearness(var_model.model, [var_model.disabled(), var_model], collected.held_out, **READING)
    assert both[0].degradation().value == 0.0 and both[0].experts_per_token == 2.0
    found, changed = (one.summary() for one in both)
    assert found["divergence"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert found["agreement"]["value"] == 1.0
    assert 0 < changed["divergence"]["low"] < changed["divergence"]["value"] < changed["divergence"]["high"]
    assert changed["agreement"]["value"] < 1 and changed["tokens"] == found["tokens"]


def test_windows_are_those_of_the_losses(var_model, collected):
    """A document longer than a window is scored as a whole."""
    long = dataclasses.replace(collected.held_out[0], ids=np.concatenate([one.ids for one in collected.held_out[:5]]))
    (found,) = nearness(var_model.model, [var_model], [long], **READING)
    assert found.tokens[0] == len(long.ids) - 1

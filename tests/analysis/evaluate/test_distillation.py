"""Distilled answers: nothing to learn changes nothing, training lowers the divergence, a resumed run repeats itself."""

import dataclasses

import numpy as np
import pytest

from analysis.checkpoints import Checkpoints
from analysis.evaluate.distillation import DistillConfig, _lines, distill
from analysis.evaluate.losses import plain_runner, score, var_runner
from varjax.config import LayerPolicy, VARConfig
from varjax.model import VARModel
from varjax.routing import NO_ANSWER
from varjax.shrinkage import lineage, shrunk
from varjax.table import build_table

READING = {"batch_size": 20, "max_length": 16, "progress": False}
POLICY = LayerPolicy(experts_kept=0, ngram_orders=(1, 2), frequency_threshold=3, entropy_threshold=5.0)
CONFIG = VARConfig(default=POLICY, cache_size=0)
SETTINGS = DistillConfig(steps=52, batch_size=8, max_length=16, learning_rate=0.03, min_count=8)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict:
    """Arguments of a run that saves what it did."""
    return {"checkpoints": Checkpoints(tmp_path_factory.mktemp("steps")), "save_steps": 25, "progress": False}


@pytest.fixture(scope="module")
def distilled(saved_model, even_documents, collected, checkpoints):
    return distill(saved_model, *collected[:2], even_documents[:80], CONFIG, SETTINGS, **checkpoints)


def test_training_brings_the_model_nearer_to_the_full_one(saved_model, even_documents, collected, distilled):
    stats, answers, _ = collected
    plain, _ = score(plain_runner(saved_model), None, even_documents[:80], **READING)
    losses = {}
    for name, some in {"means": answers, "distilled": distilled.answers}.items():
        table = build_table(CONFIG, stats, some, top_k=2)
        var_model = VARModel(saved_model, CONFIG, table=table)
        scores, _ = score(var_runner(var_model), var_model.init(), even_documents[:80], **READING)
        losses[name] = scores.nll_per_token - plain.nll_per_token
    assert distilled.divergence[-15:].mean() < distilled.divergence[:15].mean()
    assert losses["distilled"] < losses["means"]


def test_training_leaves_the_deviations_and_what_no_trained_answer_stands_above(collected, distilled):
    for layer in range(2):
        before = shrunk(collected[1], layer, CONFIG.answer_shrinkage)
        after = shrunk(distilled.answers, layer, CONFIG.answer_shrinkage)
        np.testing.assert_array_equal(after.answers, distilled.answers.mean[layer])
        known = collected[1].count[layer] > 0  # the others only fill up
        np.testing.assert_allclose(after.deviation[known], before.deviation[known], rtol=1e-6)
        line = _lines(collected[1], layer, SETTINGS.min_count)
        alone = (line == line.max()).all(axis=1)
        np.testing.assert_array_equal(after.answers[alone], before.answers[alone])


def test_a_resumed_run_ends_as_if_it_had_never_stopped(saved_model, even_documents, collected, distilled, checkpoints):
    """As if killed after the last checkpoint."""
    again = distill(saved_model, *collected[:2], even_documents[:80], CONFIG, SETTINGS, **checkpoints)
    np.testing.assert_allclose(again.divergence, distilled.divergence, rtol=1e-4)
    np.testing.assert_allclose(again.answers.mean, distilled.answers.mean, rtol=1e-5, atol=1e-6)


def test_a_line_of_descent_names_the_trained_ones_among_an_answer_and_those_above(collected):
    answers = collected[1]
    line = _lines(answers, 1, min_count=8)
    trained = answers.count[1] >= 8
    parent, _ = lineage(answers.keys, answers.entry[1], len(trained))
    number = np.cumsum(trained) - 1
    for answer in range(len(trained)):
        expected, here = [], answer
        while here != NO_ANSWER:
            expected += [number[here]] if trained[here] else []
            here = parent[here]
        assert [one for one in line[answer] if one < trained.sum()] == expected


def test_the_first_gradient_step_moves_only_what_was_looked_up(saved_model, even_documents, collected):
    stats, answers, _ = collected
    settings = dataclasses.replace(SETTINGS, steps=1, min_count=1)
    found = distill(saved_model, stats, answers, even_documents[:1], CONFIG, settings, progress=False).answers
    moved = [
        np.any(found.mean[layer] != shrunk(answers, layer, CONFIG.answer_shrinkage).answers, axis=-1)
        for layer in range(2)
    ]
    assert all(0 < one.sum() < len(one) for one in moved)


def test_errors(saved_model, even_documents, collected, distilled):
    with pytest.raises(ValueError, match="distilled already"):
        distill(saved_model, collected[0], distilled.answers, even_documents, CONFIG, SETTINGS)
    few = dataclasses.replace(SETTINGS, min_count=10**9)
    with pytest.raises(ValueError, match=r"layer 0 has no answer of min_count=1000000000 occurrences"):
        distill(saved_model, *collected[:2], even_documents, CONFIG, few)
    with pytest.raises(ValueError, match=r"steps=0: expected at least 1; learning_rate=0: expected more than 0"):
        DistillConfig(steps=0, learning_rate=0)

"""Distilled answers: nothing to learn changes nothing, training lowers the divergence, a resumed run repeats itself."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from analysis.checkpoints import Checkpoints
from analysis.evaluate import distillation
from analysis.evaluate.distillation import DistillConfig, _lines, _unit, distill
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


@pytest.fixture(scope="module")
def affine_checkpoints(tmp_path_factory) -> dict:
    return {"checkpoints": Checkpoints(tmp_path_factory.mktemp("steps")), "save_steps": 25, "progress": False}


@pytest.fixture(scope="module")
def affine_distilled(saved_model, even_documents, collected, affine, affine_checkpoints):
    return distill(saved_model, collected.stats, affine, even_documents[:80], CONFIG, SETTINGS, **affine_checkpoints)


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


@pytest.fixture
def steps(monkeypatch) -> list:
    """The jitted steps of the runs of a test."""
    made, make = [], distillation._make_step
    monkeypatch.setattr(distillation, "_make_step", lambda *given: made.append(make(*given)) or made[-1])
    return made


def divergence(model, config, stats, answers, batch) -> tuple[float, float]:
    """Nats per token from the full model to that of a table of the answers, and experts per token, over a batch."""
    var_model = VARModel(model, config, build_table(config, stats, answers, top_k=2))
    out, _ = var_model(batch.ids, var_model.init(len(batch.ids)), attention_mask=batch.mask)
    teacher = model.network.forward(model.params, jnp.asarray(batch.ids), attention_mask=jnp.asarray(batch.mask))
    target, found = (jax.nn.log_softmax(one.logits, axis=-1) for one in (teacher, out))
    nats = jnp.sum(jnp.exp(target) * (target - found), axis=-1)[batch.mask]
    return float(nats.mean()), float((np.asarray(out.routing.experts)[:, batch.mask] < 4).sum(-1).mean())


def test_affine_answers_come_nearer_than_their_fitted_maps_and_trained_constant_ones(distilled, affine_distilled):
    assert (affine_distilled.divergence[:15] < distilled.divergence[:15]).all()
    last = affine_distilled.divergence[-15:].mean()
    assert last < 0.9 * affine_distilled.divergence[:15].mean()
    assert last < 0.9 * distilled.divergence[-15:].mean()


def test_maps_are_stored_as_tables_need_them(affine, affine_distilled):
    found, maps = affine_distilled.answers, affine_distilled.answers.maps
    for layer in range(2):
        np.testing.assert_allclose(maps.write[layer] @ maps.write[layer].T, np.eye(affine.maps.rank), atol=1e-5)
        before = shrunk(affine, layer, CONFIG.answer_shrinkage)
        np.testing.assert_array_equal(shrunk(found, layer, CONFIG.answer_shrinkage).inputs, before.inputs)
    for name in ("read", "mix", "write"):
        assert not np.allclose(getattr(maps, name), getattr(affine.maps, name), rtol=0.01)
    np.testing.assert_array_equal(maps.unexplained, affine.maps.unexplained)


def test_a_table_of_the_trained_answers_diverges_as_in_training(saved_model, even_documents, collected, affine, steps):
    """The last step changes next to nothing, because the learning rate has fallen to 0.1% of what it was.

    Under a tolerance, experts are skipped by the lengths of the trained deviations.
    """
    policy = LayerPolicy(tolerance=0.02, ngram_orders=(0, 1, 2), frequency_threshold=3, entropy_threshold=5.0)
    config = dataclasses.replace(CONFIG, default=policy, answer_dtype="float32")
    done = distill(saved_model, collected.stats, affine, even_documents[:80], config, SETTINGS, progress=False)
    assert steps[-1]._cache_size() == 1
    last = next(itertools.islice(distillation._endless(even_documents[:80], SETTINGS), SETTINGS.steps - 1, None))
    nats, experts = divergence(saved_model, config, collected.stats, done.answers, last)
    assert 0.2 < experts < 1.8
    assert nats == pytest.approx(done.divergence[-1], rel=2e-3)
    assert nats < 0.9 * divergence(saved_model, config, collected.stats, affine, last)[0]


@pytest.mark.parametrize("kind", ["constant", "affine"])
def test_a_resumed_run_ends_bit_for_bit_as_if_it_had_never_stopped(kind, saved_model, even_documents, request, steps):
    """As if killed after the last checkpoint. Both steps that are left run the same program."""
    stats, answers, _ = request.getfixturevalue("collected")
    names = ["distilled", "checkpoints"]
    if kind == "affine":
        answers, names = request.getfixturevalue("affine"), [f"affine_{name}" for name in names]
    whole, saved = map(request.getfixturevalue, names)
    again = distill(saved_model, stats, answers, even_documents[:80], CONFIG, SETTINGS, **saved)
    np.testing.assert_array_equal(again.divergence, whole.divergence)
    jax.tree.map(np.testing.assert_array_equal, again.answers, whole.answers)
    assert steps[-1]._cache_size() == 1


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


def test_corrections_are_relative_to_the_answers_of_a_layer(saved_model, even_documents, collected):
    """The first step of Adam moves every number by the learning rate, and an answer by as much for each correction."""
    stats, answers, _ = collected
    settings = dataclasses.replace(SETTINGS, steps=1)
    found = distill(saved_model, stats, answers, even_documents[:8], CONFIG, settings, progress=False).answers
    for layer in range(2):
        rows = shrunk(answers, layer, CONFIG.answer_shrinkage).answers
        unit = _unit(rows, answers.mass[layer])
        line = _lines(answers, layer, SETTINGS.min_count)
        alone = (line < line.max()).sum(axis=1) == 1
        moved = np.abs(found.mean[layer] - rows)[alone]
        moved = moved[moved > 0]
        assert np.median(moved) == pytest.approx(SETTINGS.learning_rate * unit, rel=0.01)


def test_a_unit_is_the_typical_entry_of_the_answers_that_weigh_much():
    rows = np.array([[3.0, -3.0], [100.0, 100.0], [3.0, 3.0]], np.float32)
    assert _unit(rows, np.array([2.0, 0.0, 5.0])) == pytest.approx(3)


def test_errors(saved_model, even_documents, collected, distilled):
    with pytest.raises(ValueError, match="distilled already"):
        distill(saved_model, collected[0], distilled.answers, even_documents, CONFIG, SETTINGS)
    few = dataclasses.replace(SETTINGS, min_count=10**9)
    with pytest.raises(ValueError, match=r"layer 0 has no answer of min_count=1000000000 occurrences"):
        distill(saved_model, *collected[:2], even_documents, CONFIG, few)
    with pytest.raises(ValueError, match=r"steps=0: expected at least 1; learning_rate=0: expected more than 0"):
        DistillConfig(steps=0, learning_rate=0)

import dataclasses

import numpy as np
import pytest

from analysis.evaluate.losses import Caching, plain_runner, score
from analysis.questions.generation_drift import (
    NOTHING,
    Drift,
    _agreement,
    _ended,
    _log_probability,
    _next_tokens,
    _section,
    drift,
)
from analysis.resampling import Estimate
from varjax.config import LayerPolicy, VARConfig
from varjax.model import VARModel
from varjax.table import build_table

SIZES = {"prompts": 12, "prompt_tokens": 6, "new_tokens": 10, "batch_size": 8, "samples": 50}


@pytest.fixture(scope="module")
def var_model(saved_model, collected):
    """Every known token runs one expert, and nothing replaces the other."""
    policy = LayerPolicy(
        experts_kept=0, use_answers=False, ngram_orders=(1,), frequency_threshold=3, entropy_threshold=9.0
    )
    config = VARConfig(cache_size=0, default=policy)
    return VARModel(saved_model, config, table=build_table(config, collected.stats, top_k=2))


def test_agreement_by_position_of_a_hand_made_example():
    plain = np.array([[1, 2, 3, 4], [1, 2, 9, NOTHING], [5, 6, 7, 8], [5, 6, 7, 8]])
    var = np.array([[1, 2, 3, 4], [1, 2, 9, NOTHING], [5, 0, 7, 0], [9, NOTHING, NOTHING, NOTHING]])
    taught = np.array([[1, 2, 3, 4], [1, 2, 9, 9], [5, 0, 7, 8], [9, 6, 7, 8]])
    found = _agreement(plain, var, taught, samples=20)
    assert found.free.value.tolist() == pytest.approx([3 / 4, 2 / 4, 3 / 4, 1 / 3])
    assert found.together.value.tolist() == pytest.approx([3 / 4, 2 / 4, 2 / 4, 1 / 3])
    assert found.single_step.value.tolist() == pytest.approx([3 / 4, 3 / 4, 1, 1])
    assert found.free_mean.value == pytest.approx(9 / 15)
    assert found.single_step_mean.value == pytest.approx(13 / 15)
    assert np.isnan(found.free.low).all()  # four prompts say too little of how prompts differ


def test_texts_end_with_their_first_end_id():
    text = np.array([[3, 7, 3, 7], [7, 0, 0, 0], [1, 2, 3, 4]])
    expected = [[3, 7, -1, -1, -1], [7, -1, -1, -1, -1], [1, 2, 3, 4, -1]]
    assert _ended(text, (7, 9), 5).tolist() == expected
    assert _ended(text, (), 4).tolist() == text.tolist()


def test_a_model_agrees_with_itself(saved_model, documents):
    found = drift(VARModel(saved_model, VARConfig(enable_var=False)), documents, **SIZES)
    assert found.prompts == 12
    for curve in (found.agreement.free, found.agreement.together, found.agreement.single_step):
        for values in (curve.value, curve.low, curve.high):
            np.testing.assert_array_equal(values, 1.0)
    assert dataclasses.astuple(found.difference) == (0.0, 0.0, 0.0)
    assert found.plain == found.var


def test_texts_part_where_a_single_step_does(var_model, documents):
    found = drift(var_model, documents, **SIZES)
    together, single = found.agreement.together.value, found.agreement.single_step.value
    assert together[0] == found.agreement.free.value[0] == single[0] < 1
    assert (np.diff(together) <= 0).all()
    assert (together <= np.minimum(single, found.agreement.free.value)).all()
    assert found.agreement.free_mean.value < found.agreement.single_step_mean.value < 1


def test_single_steps_that_agree_up_to_a_position_are_the_same_text(var_model, documents):
    model = var_model.model
    prompt = np.stack([document.ids[:6] for document in documents[:8]])
    plain = model.generate(prompt, 10)[0][:, 6:]
    var = var_model.generate(prompt, var_model.init(8), 10)[0][:, 6:]
    taught = _next_tokens(var_model, prompt, plain)
    np.testing.assert_array_equal(
        np.logical_and.accumulate(plain == taught, axis=1), np.logical_and.accumulate(plain == var, axis=1)
    )
    assert (plain != var).any() and (plain == taught).any()


def test_log_probability_is_the_loss_of_the_text(saved_model, documents):
    long = [document for document in documents if len(document.ids) >= 12]
    some = [dataclasses.replace(document, ids=document.ids[:12]) for document in long[:4]]
    whole = np.stack([document.ids for document in some])
    nll = score(plain_runner(saved_model), None, some, batch_size=4, max_length=12, progress=False)[0].nll
    np.testing.assert_allclose(-_log_probability(saved_model, whole[:, :1], whole[:, 1:]), nll, rtol=1e-5)
    cut = np.where(np.arange(11) < 5, whole[:, 1:], NOTHING)
    shorter = _log_probability(saved_model, whole[:, :1], whole[:, 1:6])
    np.testing.assert_allclose(_log_probability(saved_model, whole[:, :1], cut), shorter, rtol=1e-5)


def test_too_short_documents_are_refused(saved_model, documents):
    with pytest.raises(ValueError, match="no document has prompt_tokens"):
        drift(VARModel(saved_model, VARConfig(enable_var=False)), documents, prompt_tokens=300, new_tokens=300)


def test_a_text_goes_on_the_same_in_any_company(var_model, documents):
    """With a cached tier of its own: five prompts are as two and the other three, in batches that are filled up."""
    config = dataclasses.replace(
        var_model.config, cache_size=64, confidence_threshold=0.01, mass_threshold=0.1, context_window_size=2
    )
    nothing = dataclasses.replace(var_model.table, eligible=np.zeros_like(var_model.table.eligible))
    remembering = VARModel(var_model.model, config, table=nothing)
    sizes = SIZES | {"prompts": 5, "new_tokens": 16}
    some = [document for document in documents if len(document.ids) >= 22][:5]
    found, two, three = (drift(remembering, part, **sizes) for part in (some, some[:2], some[2:]))
    joined = (2 * two.agreement.free.value + 3 * three.agreement.free.value) / 5
    np.testing.assert_allclose(found.agreement.free.value, joined)
    joined = (2 * two.var.value + 3 * three.var.value) / 5
    assert found.var.value == pytest.approx(joined, abs=1e-5)
    shared = drift(remembering, some, caching=Caching(shared=True), **sizes)
    assert shared.var.value != pytest.approx(found.var.value, abs=1e-4)


def test_the_section_says_what_was_measured():
    rng = np.random.default_rng(0)
    plain = rng.integers(0, 9, (20, 5))
    plain[3, 2:] = NOTHING
    parted = np.where(rng.random(plain.shape) < 0.3, 9, plain)
    likely = [Estimate(value, value - 0.1, value + 0.1) for value in (-1.0, -1.1, -3.0, -0.1)]
    said = _section(Drift(20, 8, 5, _agreement(plain, parted, plain, samples=20), *likely))
    assert "single steps agree at 100.0%" in said.outcome and "-0.100 [-0.200, +0.000] nats per token" in said.outcome
    (figure,) = said.figures
    assert figure.name == "generation_drift" and figure.draw().axes

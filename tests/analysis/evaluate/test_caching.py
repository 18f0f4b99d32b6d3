"""How documents meet the cached tier: with one of their own, or with one for all; and how it ages."""

import dataclasses

import numpy as np
import pytest

from analysis.evaluate.losses import INDEPENDENT, Caching, score, token_losses, var_runner
from analysis.text.encoding import Encoded
from varjax import LayerPolicy, VARConfig, VARModel
from varjax.errors import InputError
from varjax.model import routed_forward
from varjax.step import TIERS, summary

CACHED = TIERS[1]
READING = {"max_length": 16, "progress": False}


@pytest.fixture(scope="module")
def remembering(small_var_model) -> VARModel:
    """Nothing in the table; whatever the router did once is repeated with one expert."""
    return with_ttl(small_var_model, 60.0)


def with_ttl(var_model: VARModel, seconds: float) -> VARModel:
    config = VARConfig(
        frequency_threshold=10**9,
        confidence_threshold=0.01,
        mass_threshold=0.1,
        context_window_size=2,
        cache_size=256,
        cache_ttl_seconds=seconds,
        default=LayerPolicy(experts_kept=2),
    )
    closed = dataclasses.replace(var_model.table, eligible=np.zeros_like(var_model.table.eligible))
    return VARModel(var_model.model, config, table=closed)


def text(ids, name: str) -> Encoded:
    return Encoded(np.asarray(ids, np.int32), name, "g", 1, 1)


@pytest.fixture(scope="module")
def texts() -> list[Encoded]:
    """Of one to four windows, full of repetitions. All windows have one shape, so that few programs are compiled."""
    rng = np.random.default_rng(0)
    return [text(rng.integers(10, 14, size), str(size)) for size in (60, 9, 41, 16, 48, 25, 64)]


def scored(var_model, documents, caching=INDEPENDENT, batch_size=4):
    run, start = var_runner(var_model, caching), caching.init(var_model, batch_size)
    found, state = score(run, start, documents, batch_size=batch_size, **READING)
    return found.nll, summary(state.counters, 2)


def test_a_document_costs_the_same_in_any_company(remembering, texts):
    together, shares = scored(remembering, texts)
    assert shares["tiers"][CACHED] > 0.1  # learned from earlier windows of the same document
    for batch_size in (1, 3):
        nll, others = scored(remembering, texts, batch_size=batch_size)
        np.testing.assert_allclose(nll, together, atol=1e-4)
        assert (others["tiers"], others["experts_per_token"]) == (shares["tiers"], shares["experts_per_token"])
    np.testing.assert_allclose(scored(remembering, texts[::-1])[0][::-1], together, atol=1e-4)
    alone = np.concatenate([scored(remembering, [one])[0] for one in texts])
    np.testing.assert_allclose(alone, together, atol=1e-4)

    shared, other = (scored(remembering, texts, Caching(shared=True), size)[0] for size in (4, 1))
    assert np.abs(shared - together).max() > 0.01 and np.abs(shared - other).max() > 0.01


def test_a_window_learns_from_those_before_it_only(remembering, texts):
    short = [dataclasses.replace(one, ids=one.ids[:16]) for one in texts]
    assert scored(remembering, short)[1]["tiers"][CACHED] == 0
    assert scored(remembering, [text([*short[0].ids] * 2, "twice")])[1]["tiers"][CACHED] > 0.3


@pytest.mark.parametrize("shared", [False, True])
def test_a_longer_time_to_live_remembers_more(small_var_model, shared):
    """A stretch of text, another one of 992 tokens, which takes 9.92 s, and the first one again."""
    first, between = np.arange(20, 36), np.tile(np.arange(40, 51), 100)[:992]
    parts = [first, between, first]
    documents = [text(one, str(index)) for index, one in enumerate(parts)] if shared else [text(np.hstack(parts), "a")]
    models = [with_ttl(small_var_model, seconds) for seconds in (10.0, 300.0)]
    (short, few), (long, many) = (scored(one, documents, Caching(shared), 1) for one in models)
    assert np.abs(short - long).max() > 1e-3
    # Only the last stretch tells them apart: all of its contexts are old enough to be forgotten, or remembered.
    hits = [round(one["tiers"][CACHED] * one["tokens"]) for one in (few, many)]
    assert hits[1] - hits[0] == 2 * 15

    before = routed_forward._cache_size()
    scored(with_ttl(small_var_model, 77.0), documents, Caching(shared, seconds_per_token=0.02), 1)
    assert routed_forward._cache_size() == before  # time is an argument


def test_the_greatest_age_that_a_decision_may_have():
    documents = [text(np.arange(size), str(size)) for size in (16, 33, 9)]
    assert Caching(seconds_per_token=0.5).span(documents, 16) == 2 * 16 * 0.5
    assert Caching(seconds_per_token=0.5).span(documents[::2], 16) == 0
    assert Caching(shared=True, seconds_per_token=0.5).span(documents, 16) == (16 + 33 + 9) * 0.5


def test_losses_by_token_are_those_of_the_documents(remembering, texts):
    reading = {"batch_size": 4, "max_length": 16}
    found = token_losses(remembering, texts, **reading)
    np.testing.assert_allclose(found.per_document(found.nll), scored(remembering, texts)[0], atol=1e-4)
    reversed_ = token_losses(remembering, texts[::-1], **reading)
    np.testing.assert_allclose(reversed_.per_document(reversed_.nll)[::-1], found.per_document(found.nll), atol=1e-4)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_a_time_that_does_not_pass_is_refused(seconds):
    with pytest.raises(InputError, match="seconds_per_token"):
        Caching(seconds_per_token=seconds)

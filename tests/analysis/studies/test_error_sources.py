import dataclasses
import math

import numpy as np
import pytest

from analysis.collect.answers import collect_answers
from analysis.collect.statistics import KeySettings, choose_keys, collect
from analysis.evaluate.caching import INDEPENDENT, Caching
from analysis.evaluate.quality import plain_runner, score, var_runner
from analysis.evaluate.token_losses import BY_CACHE, BY_ROUTER, differences, token_losses
from analysis.resampling import Estimate
from analysis.studies.error_sources import (
    _decile_names,
    _deciles,
    dropping,
    examine,
    groups,
    id_frequency,
    kinds,
    layers_alone,
    prepare,
)
from varjax.config import LayerPolicy, VARConfig
from varjax.model import VARModel, routed_forward
from varjax.table import build_table

READING = {"batch_size": 16, "max_length": 16}
POLICY = LayerPolicy(experts_kept=1, ngram_orders=(1, 2), frequency_threshold=3, entropy_threshold=9.0)
NOTHING = Estimate(0.0, 0.0, 0.0)


@pytest.fixture(scope="module")
def split(documents):
    """Beginnings, one window each: 120 for the statistics, 40 to ask about."""
    beginnings = [dataclasses.replace(document, ids=document.ids[:16]) for document in documents]
    return beginnings[:120], beginnings[120:]


@pytest.fixture(scope="module")
def files(saved_model, split):
    """Statistics and answers."""
    keys = choose_keys(saved_model, split[0], 16, KeySettings(orders=(1, 2), min_count=3))
    stats = collect(saved_model, split[0], keys, **READING, progress=False)
    return stats, collect_answers(saved_model, split[0], stats.keys, (0, 1), **READING, progress=False)


@pytest.fixture(scope="module")
def run_of(saved_model, split, files):
    """(default, layers) -> the tokens under a table that is built for this config."""

    def run(default, layers=()):
        config = VARConfig(cache_size=0, default=default, layers=layers)
        table = build_table(config, files[0], files[1], top_k=2, keep_shapes=True)
        return token_losses(VARModel(saved_model, config, table=table), split[1], **READING)

    return run


@pytest.fixture(scope="module")
def subject_of(saved_model, split, files):
    def make(caching=INDEPENDENT, **settings):
        config = VARConfig(**{"cache_size": 0, "default": POLICY} | settings)
        return prepare(saved_model, *files, config, split[1], **READING, samples=50, caching=caching)

    return make


@pytest.fixture(scope="module")
def subject(subject_of):
    return subject_of()


@pytest.fixture(scope="module")
def found(subject):
    return examine(subject, progress=False)


def parts(some):
    return sum(group.part.value for group in some)


def test_tokens_add_up_to_the_documents_of_the_quality_pass(saved_model, split, subject):
    some = split[1]
    plain, _ = score(plain_runner(saved_model), None, some, **READING, progress=False)
    np.testing.assert_allclose(subject.plain.per_document(subject.plain.nll), plain.nll, rtol=1e-12)
    np.testing.assert_array_equal(subject.plain.per_document(np.ones(len(subject.plain.nll))), plain.tokens)
    var_model = VARModel(saved_model, subject.config, table=subject.table)
    under_var, _ = score(var_runner(var_model), var_model.init(), some, **READING, progress=False)
    np.testing.assert_allclose(subject.policy.per_document(subject.policy.nll), under_var.nll, rtol=1e-12)


def test_with_everything_open_every_difference_is_zero(subject_of):
    found = examine(subject_of(default=None), progress=False)
    assert all(change.nats == NOTHING and change.experts == 2.0 for change in (*found.kinds, *found.dropping))
    assert found.layers.alone == () and found.layers.excess == NOTHING
    assert [group.name for group in found.groups.key] == ["the router"]
    every = (*found.groups.key, *found.groups.experts, *found.groups.frequency)
    assert all(group.change.value == 0 and group.part == NOTHING for group in every)


def test_each_kind_of_error_is_that_of_its_config(subject, run_of):
    sources = {"choice_from": ("table", "gate", "table"), "weights_from": ("gate", "table", "table")}
    for index, change in enumerate(kinds(subject)[:3]):
        own = {name: column[index] for name, column in sources.items()}
        run = run_of(dataclasses.replace(POLICY, experts_kept=2, use_answers=False, **own))
        assert change.experts == 2.0
        assert change.nats.value == pytest.approx(differences(subject.plain, run).mean())
        assert change.nats.value != 0


def test_the_policy_is_the_same_in_every_question(subject, found):
    policy = found.kinds[-1]
    others = (found.layers.joint, found.dropping[0], found.groups.whole)
    assert all(dataclasses.replace(other, name=policy.name) == policy for other in others)
    assert policy.experts < 2.0
    assert policy.perplexity.value == pytest.approx(math.expm1(policy.nats.value))
    assert found.perplexity == pytest.approx(math.exp(subject.plain.nll.mean()))


def test_intervals_hold_their_values(found):
    every = [change.nats for change in (*found.kinds, *found.layers.alone, *found.dropping)]
    assert all(one.low < one.value < one.high for one in every)


def test_one_layer_alone_is_the_config_that_plans_it_alone(subject, run_of, found):
    assert found.layers.layers == (0, 1)
    for layer, change in enumerate(found.layers.alone):
        run = run_of(None, {layer: POLICY})
        assert change.nats.value == pytest.approx(differences(subject.plain, run).mean())
        assert change.experts == pytest.approx(run.experts.mean() / 2)
    assert found.layers.total.value == pytest.approx(sum(change.nats.value for change in found.layers.alone))
    assert found.layers.excess.value == pytest.approx(found.layers.joint.nats.value - found.layers.total.value)


def test_a_single_planned_layer_is_all_there_is(subject_of):
    found = layers_alone(subject_of(default=None, layers={1: POLICY}))
    assert found.layers == (1,)
    assert found.alone[0].nats == found.joint.nats == found.total
    assert found.excess == NOTHING


def test_dropping_without_answers_is_a_policy_without_residual(subject_of, run_of):
    """Where all tokens are planned and every expert has an answer, both drop alike: the second slot."""
    everywhere = dataclasses.replace(POLICY, ngram_orders=(0,))
    subject = subject_of(default=everywhere)
    _, nothing, rescaled, *first = dropping(subject)
    for change, same, renormalize in zip((nothing, rescaled), first, (False, True), strict=True):
        run = run_of(dataclasses.replace(everywhere, use_answers=False, renormalize=renormalize))
        assert change.experts == 1.0
        assert change.nats.value == pytest.approx(differences(subject.plain, run).mean())
        assert same.experts == 1.0 and same.nats.value == pytest.approx(change.nats.value)
    assert nothing.nats != rescaled.nats


def test_groups_add_up_to_the_whole(found):
    whole = found.groups.whole.nats.value
    assert whole != 0
    for some in (found.groups.key, found.groups.experts, found.groups.frequency):
        assert len(some) > 1
        assert parts(some) == pytest.approx(whole)
        assert sum(group.tokens for group in some) == found.tokens
        for group in some:
            assert group.change.value * group.tokens == pytest.approx(group.part.value * found.tokens)


def test_tokens_are_grouped_by_what_answered(subject, subject_of):
    names = [group.name for group in groups(subject).key]
    assert names == ["the router", "order 1", "order 2"]
    rarely = dataclasses.replace(POLICY, ngram_orders=(1,), frequency_threshold=200)
    cached = subject_of(
        Caching(shared=True), cache_size=500, confidence_threshold=0.0, context_window_size=2, default=rarely
    )
    found = groups(cached)
    assert [group.name for group in found.key] == ["the router", "the cache", "order 1"]
    assert parts(found.key) == pytest.approx(found.whole.nats.value)
    assert BY_CACHE not in cached.policy.order  # the other questions are about the fast tier


def test_experts_are_those_of_all_layers(subject):
    answered = subject.policy.order != BY_ROUTER
    assert set(subject.plain.experts) == {4}
    assert (subject.policy.experts[~answered] == 4).all()
    assert (subject.policy.experts[answered] < 4).any()
    assert [group.name for group in groups(subject).experts] == ["2", "4"]


def test_deciles_are_tenths_of_the_ids_by_frequency():
    frequency = np.array([0, 50, 40, 30, 20, 10, 5, 4, 3, 2, 1])
    token_id = np.array([1, 1, 1, 10, 2, 3, 4, 5, 6, 7, 8, 9])
    deciles = _deciles(token_id, frequency)
    assert deciles.tolist() == [9, 9, 9, 0, 8, 7, 6, 5, 4, 3, 2, 1]
    assert _decile_names(token_id, deciles, frequency)[:2] == ["1 to 1", "2 to 2"]


def test_frequencies_are_counts_of_the_text_of_the_statistics(files, split):
    ids = np.concatenate([document.ids for document in split[0]])
    counted = np.bincount(ids, minlength=300)
    known = id_frequency(files[0], 300)
    assert (known > 0).sum() > 20
    np.testing.assert_array_equal(known[known > 0], counted[known > 0])


def test_other_tokens_cannot_be_compared(saved_model, split, subject):
    other = token_losses(VARModel(saved_model, VARConfig(enable_var=False)), split[0][:40], **READING)
    with pytest.raises(ValueError, match="different tokens"):
        differences(subject.plain, other)


def test_another_question_compiles_nothing(subject):
    before = routed_forward._cache_size()
    kinds(subject), layers_alone(subject), dropping(subject)
    assert routed_forward._cache_size() == before

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from analysis.collection.answers import collect_answers
from analysis.collection.statistics import KeySettings, choose_keys, collect
from analysis.comparison import Estimate
from analysis.error_sources import (
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
from analysis.quality import plain_runner, score, var_runner
from analysis.token_losses import BY_CACHE, BY_ROUTER, differences, token_losses
from varjax.config import LayerPolicy, VARConfig
from varjax.model import VARModel, routed_forward
from varjax.table import build

READING = {"batch_size": 4, "max_length": 16}
POLICY = LayerPolicy(kept=1, orders=(1, 2), frequency_threshold=3, entropy_threshold=9.0)
NOTHING = Estimate(0.0, 0.0, 0.0)


@pytest.fixture(scope="module")
def files(saved_model, documents):
    """Statistics and answers of 120 documents; the others are left to ask about."""
    settings = KeySettings(orders=(1, 2), min_count=3)
    keys = choose_keys(saved_model, documents[:120], 16, settings)
    stats = collect(saved_model, documents[:120], keys, **READING, progress=False)
    answers = collect_answers(saved_model, documents[:120], stats.keys, (0, 1), **READING, progress=False)
    return stats, answers


@pytest.fixture(scope="module")
def subject_of(saved_model, documents, files):
    def make(**settings):
        config = VARConfig(**{"cache_size": 0, "default": POLICY} | settings)
        return prepare(saved_model, *files, config, documents[120:], **READING, samples=50)

    return make


@pytest.fixture(scope="module")
def subject(subject_of):
    return subject_of()


@pytest.fixture(scope="module")
def found(subject):
    return examine(subject, progress=False)


def parts(some):
    return sum(group.part.value for group in some)


def test_tokens_add_up_to_the_documents_of_the_quality_pass(saved_model, documents, subject):
    some = documents[120:]
    plain, _ = score(plain_runner(saved_model), None, some, **READING, progress=False)
    np.testing.assert_allclose(subject.plain.per_document(subject.plain.nll), plain.nll, rtol=1e-12)
    np.testing.assert_array_equal(subject.plain.per_document(np.ones(len(subject.plain.nll))), plain.tokens)
    var_model = VARModel(saved_model, subject.config, table=subject.table)
    under_var, _ = score(var_runner(var_model), var_model.init(), some, **READING, progress=False)
    np.testing.assert_allclose(subject.policy.per_document(subject.policy.nll), under_var.nll, rtol=1e-12)


def test_a_table_of_fixed_shapes_plans_as_the_policys_own(saved_model, documents, files, subject):
    table = build(files[0], subject.config, saved_model.config.top_k, files[1])
    own = token_losses(VARModel(saved_model, subject.config, table=table), documents[120:], **READING)
    np.testing.assert_allclose(own.nll, subject.policy.nll, rtol=1e-5)
    np.testing.assert_array_equal(own.order, subject.policy.order)
    np.testing.assert_array_equal(own.experts, subject.policy.experts)


def test_with_everything_open_every_difference_is_zero(subject_of):
    found = examine(subject_of(default=None), progress=False)
    assert all(change.nats == NOTHING and change.experts == 2.0 for change in (*found.kinds, *found.dropping))
    assert found.layers.alone == () and found.layers.excess == NOTHING
    assert [group.name for group in found.groups.key] == ["the router"]
    every = (*found.groups.key, *found.groups.experts, *found.groups.frequency)
    assert all(group.change.value == 0 and group.part == NOTHING for group in every)


def test_each_kind_of_error_is_that_of_its_config(saved_model, documents, files, subject):
    sources = {"choice_from": ("table", "gate", "table"), "weights_from": ("gate", "table", "table")}
    for index, change in enumerate(kinds(subject)[:3]):
        own = {name: column[index] for name, column in sources.items()}
        policy = dataclasses.replace(POLICY, kept=2, residual=False, **own)
        config = VARConfig(cache_size=0, default=policy)
        var_model = VARModel(saved_model, config, table=build(files[0], config, 2, files[1]))
        run = token_losses(var_model, documents[120:], **READING)
        assert change.experts == 2.0
        assert change.nats.value == pytest.approx(differences(subject.plain, run).mean(), rel=1e-3)
        assert change.nats.value != 0


def test_the_policy_is_the_same_in_every_question(found):
    policy = found.kinds[-1]
    others = (found.layers.joint, found.dropping[0], found.groups.whole)
    assert all(dataclasses.replace(other, name=policy.name) == policy for other in others)
    assert policy.experts < 2.0
    assert policy.perplexity.value == pytest.approx(math.expm1(policy.nats.value))
    assert found.perplexity * (1 + policy.perplexity.value) > 0


def test_intervals_hold_their_values(found):
    every = [change.nats for change in (*found.kinds, *found.layers.alone, *found.dropping)]
    assert all(one.low < one.value < one.high for one in every)


def test_one_layer_alone_is_the_config_that_plans_it_alone(saved_model, documents, files, subject, found):
    assert found.layers.layers == (0, 1)
    for layer, change in enumerate(found.layers.alone):
        config = VARConfig(cache_size=0, default=None, layers={layer: POLICY})
        var_model = VARModel(saved_model, config, table=build(files[0], config, 2, files[1]))
        run = token_losses(var_model, documents[120:], **READING)
        assert change.nats.value == pytest.approx(differences(subject.plain, run).mean(), rel=1e-3)
        assert change.experts == pytest.approx(run.experts.mean() / 2)
    assert found.layers.total.value == pytest.approx(sum(change.nats.value for change in found.layers.alone))
    assert found.layers.excess.value == pytest.approx(found.layers.joint.nats.value - found.layers.total.value)


def test_a_single_planned_layer_is_all_there_is(subject_of):
    found = layers_alone(subject_of(default=None, layers={1: POLICY}))
    assert found.layers == (1,)
    assert found.alone[0].nats == found.joint.nats == found.total
    assert found.excess == NOTHING


def test_dropping_without_answers_is_a_policy_without_residual(saved_model, documents, files, subject):
    """At keys with an answer for every expert both drop alike: the second slot."""
    everywhere = dataclasses.replace(POLICY, orders=(0,), kept=1)
    made = dropping(prepare(saved_model, *files, VARConfig(cache_size=0, default=everywhere), documents[120:], **READING))
    for change, renormalise in zip(made[1:], (False, True), strict=True):
        policy = dataclasses.replace(everywhere, residual=False, renormalise=renormalise)
        config = VARConfig(cache_size=0, default=policy)
        var_model = VARModel(saved_model, config, table=build(files[0], config, 2))
        run = token_losses(var_model, documents[120:], **READING)
        assert change.experts == pytest.approx(1.0)
        assert change.nats.value == pytest.approx(differences(subject.plain, run).mean(), rel=1e-3)
    assert made[1].nats != made[2].nats


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
    rarely = dataclasses.replace(POLICY, orders=(1,), frequency_threshold=200)
    cached = subject_of(cache_size=500, confidence_threshold=0.0, context_window_size=2, default=rarely)
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


def test_frequencies_are_counts_of_the_text_of_the_statistics(files, documents):
    ids = np.concatenate([document.ids for document in documents[:120]])
    counted = np.bincount(ids, minlength=300)
    known = id_frequency(files[0], 300)
    assert (known > 0).sum() > 20
    np.testing.assert_array_equal(known[known > 0], counted[known > 0])


def test_other_tokens_cannot_be_compared(saved_model, documents, subject):
    other = token_losses(VARModel(saved_model, VARConfig(enable_var=False)), documents[:40], **READING)
    with pytest.raises(ValueError, match="different tokens"):
        differences(subject.plain, other)


def test_another_question_compiles_nothing(subject):
    before = routed_forward._cache_size()
    kinds(subject), layers_alone(subject), dropping(subject)
    assert routed_forward._cache_size() == before
    assert isinstance(subject.table.eligible, jnp.ndarray)

"""The sources of error: each is the difference of two runs, and parts add up to the whole."""

import dataclasses
import json
import math

import numpy as np
import pytest

from analysis.evaluate.losses import BY_CACHE, BY_ROUTER, Caching, plain_runner, score, token_losses, var_runner
from analysis.evaluate.points import Subject
from analysis.questions.error_sources import (
    Change,
    ErrorSources,
    Group,
    _dropping,
    _frequency_deciles,
    _groups,
    _id_frequency,
    _kinds,
    _layers_alone,
    _Runs,
    _sections,
    _silent,
    examine,
)
from analysis.report.report import Report, fields, text
from analysis.resampling import Estimate
from varjax.config import LayerPolicy, VARConfig
from varjax.model import VARModel, routed_forward
from varjax.routing import Dropped
from varjax.table import build_table

READING = {"batch_size": 20, "max_length": 16}
POLICY = LayerPolicy(experts_kept=1, ngram_orders=(1, 2), frequency_threshold=3, entropy_threshold=9.0)
NOTHING = Estimate(0.0, 0.0, 0.0)


@pytest.fixture(scope="module")
def run_of(saved_model, collected):
    """(default, layers) -> the tokens under a table that is built for this config."""

    def run(default, layers=()):
        config = VARConfig(cache_size=0, default=default, layers=layers)
        table = build_table(config, *collected[:2], top_k=2, keep_shapes=True)
        return token_losses(VARModel(saved_model, config, table=table), collected.held_out, **READING)

    return run


@pytest.fixture(scope="module")
def runs_of(saved_model, collected):
    def make(**settings) -> _Runs:
        caching = Caching(shared=settings.get("cache_size", 0) > 0)
        config = VARConfig(**{"cache_size": 0, "default": POLICY} | settings)
        settings = {"samples": 50, "progress": False, "caching": caching, **READING}
        return _Runs.of(Subject(saved_model, *collected[:2], config, collected.held_out, **settings))

    return make


@pytest.fixture(scope="module")
def runs(runs_of):
    return runs_of()


@pytest.fixture(scope="module")
def found(runs):
    return examine(runs.subject)


def parts(some):
    return sum(group.part.value for group in some)


def test_tokens_add_up_to_the_documents_of_the_quality_pass(saved_model, collected, runs):
    some = collected.held_out
    plain, _ = score(plain_runner(saved_model), None, some, **READING, progress=False)
    np.testing.assert_allclose(runs.plain.per_document(runs.plain.nll), plain.nll, rtol=1e-12)
    np.testing.assert_array_equal(runs.plain.per_document(np.ones(len(runs.plain.nll))), plain.tokens)
    var_model = VARModel(saved_model, runs.subject.config, table=runs.table)
    under_var, _ = score(var_runner(var_model), var_model.init(), some, **READING, progress=False)
    np.testing.assert_allclose(runs.policy.per_document(runs.policy.nll), under_var.nll, rtol=1e-12)


def test_with_everything_open_every_difference_is_zero(runs_of):
    found = examine(runs_of(default=None).subject)
    assert all(change.nats == NOTHING and change.experts == 2.0 for change in (*found.kinds, *found.dropping))
    assert found.layers == () and found.excess == NOTHING
    assert [group.name for group in found.groups["what answered"]] == ["the router"]
    every = [group for some in found.groups.values() for group in some]
    assert all(group.change.value == 0 and group.part == NOTHING for group in every)


def test_each_kind_of_error_is_that_of_its_config(runs, found, run_of):
    sources = {"choice_from": ("table", "gate", "table"), "weights_from": ("gate", "table", "table")}
    for index, change in enumerate(found.kinds[:3]):
        own = {name: column[index] for name, column in sources.items()}
        run = run_of(dataclasses.replace(POLICY, experts_kept=2, use_answers=False, **own))
        assert change.experts == 2.0
        assert change.nats.value == pytest.approx(run.added_to(runs.plain).mean())
        assert change.nats.value != 0


def test_the_policy_is_the_same_in_every_part(runs, found):
    policy = found.kinds[-1]
    others = (found.joint, found.dropping[0], found.whole)
    assert all(dataclasses.replace(other, name=policy.name) == policy for other in others)
    assert policy.experts < 2.0
    assert policy.perplexity.value == pytest.approx(math.expm1(policy.nats.value))
    assert found.perplexity == pytest.approx(math.exp(runs.plain.nll.mean()))


def test_intervals_hold_their_values(found):
    every = [change.nats for change in (*found.kinds, *found.layers, *found.dropping)]
    assert all(one.low < one.value < one.high for one in every)


def test_one_layer_alone_is_the_config_that_plans_it_alone(runs, run_of, found):
    assert [change.name for change in found.layers] == ["layer 0 alone", "layer 1 alone"]
    for layer, change in enumerate(found.layers):
        run = run_of(None, {layer: POLICY})
        assert change.nats.value == pytest.approx(run.added_to(runs.plain).mean())
        assert change.experts == pytest.approx(run.experts.mean() / 2)
    assert found.total.value == pytest.approx(sum(change.nats.value for change in found.layers))
    assert found.excess.value == pytest.approx(found.joint.nats.value - found.total.value)


def test_a_single_planned_layer_is_all_there_is(runs_of):
    found = _layers_alone(runs_of(default=None, layers={1: POLICY}))
    (alone,) = found["layers"]
    assert alone.nats == found["joint"].nats == found["total"]
    assert found["excess"] == NOTHING


def test_dropping_without_answers_is_a_policy_without_answers(runs_of, run_of):
    """Where all tokens are planned and every expert has an answer, both drop alike: the second slot."""
    everywhere = dataclasses.replace(POLICY, ngram_orders=(0,))
    runs = runs_of(default=everywhere)
    _, nothing, rescaled, *first = _dropping(runs)["dropping"]
    for change, same, renormalize in zip((nothing, rescaled), first, (False, True), strict=True):
        run = run_of(dataclasses.replace(everywhere, use_answers=False, renormalize=renormalize))
        assert change.experts == 1.0
        assert change.nats.value == pytest.approx(run.added_to(runs.plain).mean())
        assert same.experts == 1.0 and same.nats.value == pytest.approx(change.nats.value)
    assert nothing.nats != rescaled.nats


def test_silent_answers_let_the_same_be_dropped_and_add_nothing(saved_model, affine_collected):
    """Affine ones, under a tolerance: what they expect to miss is the same, and no map speaks for them."""
    policy = dataclasses.replace(POLICY, experts_kept=None, tolerance=0.3)
    config = VARConfig(cache_size=0, default=policy)
    table = build_table(config, *affine_collected[:2], top_k=2, keep_shapes=True)
    quiet = dataclasses.replace(table, answers=tuple(map(_silent, table.answers)))
    ids = np.stack([one.ids for one in affine_collected.held_out[:4]])
    outputs = []
    for one in (table, quiet):
        var_model = VARModel(saved_model, config, one)
        outputs.append(var_model(ids, var_model.init(4))[0])
    first, second = (np.asarray(out.routing.experts[0]) for out in outputs)
    np.testing.assert_array_equal(first, second)  # the first layer's inputs are the same
    assert 0 < (first == 4).sum() < first.size
    assert np.abs(outputs[0].logits - outputs[1].logits).max() > 1e-3
    moved = np.random.default_rng(0).normal(size=(5, 12)).astype(np.float32)
    dropped = Dropped(np.zeros((5, 2), np.int32), np.ones((5, 2), np.float32), moved)
    assert np.any(table.answers[0].total(dropped)) and not np.any(quiet.answers[0].total(dropped))


def test_groups_add_up_to_the_whole(found):
    whole = found.whole.nats.value
    assert whole != 0
    for some in found.groups.values():
        assert len(some) > 1
        assert parts(some) == pytest.approx(whole)
        assert sum(group.tokens for group in some) == found.tokens
        for group in some:
            assert group.change.value * group.tokens == pytest.approx(group.part.value * found.tokens)


def test_tokens_are_grouped_by_what_answered(found, runs_of):
    assert [group.name for group in found.groups["what answered"]] == ["the router", "order 1", "order 2"]
    rarely = dataclasses.replace(POLICY, ngram_orders=(1,), frequency_threshold=100)
    cached = runs_of(cache_size=500, confidence_threshold=0.0, context_window_size=2, default=rarely)
    grouped = _groups(cached)
    by_key = grouped["groups"]["what answered"]
    assert [group.name for group in by_key] == ["the router", "the cache", "order 1"]
    assert parts(by_key) == pytest.approx(grouped["whole"].nats.value)
    assert BY_CACHE not in cached.policy.order  # the other parts are about the fast tier


def test_experts_are_those_of_all_layers(runs, found):
    answered = runs.policy.order != BY_ROUTER
    assert set(runs.plain.experts) == {4}
    assert (runs.policy.experts[~answered] == 4).all()
    assert (runs.policy.experts[answered] < 4).any()
    assert [group.name for group in found.groups["experts that ran"]] == ["2", "3", "4"]


def test_deciles_are_tenths_of_the_ids_by_frequency():
    frequency = np.array([0, 50, 40, 30, 20, 10, 5, 4, 3, 2, 1])
    token_id = np.array([1, 1, 1, 10, 2, 3, 4, 5, 6, 7, 8, 9])
    deciles, names = _frequency_deciles(token_id, frequency)
    assert deciles.tolist() == [9, 9, 9, 0, 8, 7, 6, 5, 4, 3, 2, 1]
    assert names[:2] == ["1 to 1", "2 to 2"]


def test_frequencies_are_counts_of_the_text_of_the_statistics(collected, even_documents):
    ids = np.concatenate([document.ids for document in even_documents[:-40]])
    counted = np.bincount(ids, minlength=300)
    known = _id_frequency(collected.stats, 300)
    assert (known > 0).sum() > 20
    np.testing.assert_array_equal(known[known > 0], counted[known > 0])


def test_other_tokens_cannot_be_compared(saved_model, even_documents, runs):
    other = token_losses(VARModel(saved_model, VARConfig(enable_var=False)), even_documents[:40], **READING)
    with pytest.raises(ValueError, match="different tokens"):
        other.added_to(runs.plain)


def test_another_part_compiles_nothing(runs):
    before = routed_forward._cache_size()
    _kinds(runs), _layers_alone(runs), _dropping(runs)
    assert routed_forward._cache_size() == before


def test_the_sections_say_what_was_measured():
    def change(name, nats, experts=2.0):
        return Change(name, Estimate(nats, nats - 0.001, nats + 0.001), experts)

    policy, unknown = change("the policy", 0.01, 1.25), Estimate(0.02, math.nan, math.nan)  # too few documents
    two = (Group("the router", 60, unknown, unknown), Group("order 1", 40, policy.nats, policy.nats))
    found = ErrorSources(
        documents=12,
        tokens=100,
        perplexity=20.0,
        kinds=(*(change(name, 0.02) for name in "abc"), policy),
        dropping=(policy, change("d", 0.5)),
        layers=(change("layer 0 alone", 0.002), change("layer 3 alone", 0.005)),
        joint=policy,
        total=Estimate(0.007, 0.006, 0.008),
        excess=Estimate(0.003, 0.001, 0.005),
        whole=policy,
        groups=dict.fromkeys(("what answered", "experts that ran", "occurrences of the id"), two),
    )
    report = Report("title", (), (), _sections(found))
    said = " ".join(text(report).split())
    assert "+2.02% if the table chooses" in said and "+1.01% under the policy at 1.25 experts" in said
    assert (
        "add up to +0.00700 nats per token, together they cost +0.01000; excess +0.00300 [+0.00100, +0.00500]" in said
    )
    assert "the largest part, +0.02000, where the longest key that answered was: the router (60% of the tokens)" in said
    json.dumps(fields(report)["sections"]["error_groups"]["outcome"])
    figures = [figure for section in report.sections for figure in section.figures]
    assert [figure.name for figure in figures] == ["error_kinds", "error_layers", "error_groups"]
    assert all(figure.draw().axes for figure in figures)

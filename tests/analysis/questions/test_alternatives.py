"""The families do what their names say, the comparison at equal loss is right, and a killed study goes on."""

import dataclasses
from functools import cache
from itertools import pairwise

import jax
import numpy as np
import pytest

from analysis.evaluate import points
from analysis.evaluate.losses import score, var_runner
from analysis.evaluate.points import Subject, score_point
from analysis.questions.alternatives import (
    QUESTION,
    RATIOS,
    SCALES,
    VAR,
    _evaluate,
    _families,
    _fewest_experts,
    _section,
    _table_of,
    shuffled_answers,
)
from analysis.resampling import Estimate, document_counts
from varjax.config import LayerPolicy, VARConfig
from varjax.model import VARModel, routed_forward
from varjax.routing import NO_ANSWER
from varjax.shrinkage import shrunk
from varjax.step import summary
from varjax.table import build_table, with_policies

READING = {"batch_size": 20, "max_length": 16}
LAYERS = 2


def tolerance(answers, layer: int) -> float:
    """What 40% of the occurrences stay under: an answer's deviation times its expert's usual weight."""
    count, mass, deviation = answers.count[layer], answers.mass[layer], shrunk(answers, layer, 1.0).deviation
    if answers.maps is not None:
        deviation = deviation * np.sqrt(answers.maps.unexplained[layer, answers.experts(layer)])
    error = np.sqrt(mass / np.maximum(count, 1)) * deviation
    return float(np.quantile(np.repeat(error, count), 0.4))


def of(saved_model, collected) -> Subject:
    """A policy that drops some and keeps some, in both layers."""
    policies = {
        layer: LayerPolicy(
            experts_kept=None,
            tolerance=tolerance(collected.answers, layer),
            ngram_orders=(1, 2),
            frequency_threshold=5,
            entropy_threshold=2.0,
        )
        for layer in range(LAYERS)
    }
    config = VARConfig(default=None, layers=policies, cache_size=0)
    return Subject(saved_model, *collected[:2], config, collected.held_out, samples=200, progress=False, **READING)


@pytest.fixture(scope="module")
def subject(saved_model, collected) -> Subject:
    return of(saved_model, collected)


@pytest.fixture(scope="module")
def affine_subject(saved_model, affine_collected) -> Subject:
    return of(saved_model, affine_collected)


@pytest.fixture(scope="module")
def table(subject):
    return build_table(subject.config, subject.stats, subject.answers, top_k=2, keep_shapes=True)


@pytest.fixture(scope="module")
def family(subject):
    """`family(name)`."""
    return {one.name: one for one in _families(subject)}.__getitem__


@pytest.fixture(scope="module")
def run(subject, table, family):
    """`run(name, number)`: a family's point on the documents: its losses and the summary of its counters."""

    @cache
    def scored(name: str, number: int):
        _, config = family(name).points[number]
        changed = _table_of(subject, table, family(name), config)
        var_model = VARModel(subject.model, config, table=changed, clock=lambda: 0.0)
        found, state = score(var_runner(var_model), var_model.init(), subject.documents, progress=False, **READING)
        return found.nll, summary(state.counters, 2)

    return scored


@pytest.fixture(scope="module")
def gate(subject):
    """float [N, 2]: the first layer's two best gate probabilities at every token; no policy changes them."""
    probs = subject.model(np.stack([one.ids for one in subject.documents])).router_probs[0]
    return -np.sort(-np.asarray(probs).reshape(-1, probs.shape[-1]), axis=-1)[:, :2]


def test_top_m_runs_exactly_m_experts_for_every_token(run, family):
    for name, numbers in (("top-m for all, renormalized", [1]), ("top-m for all, own weights", [1, 0])):
        assert [dial for dial, _ in family(name).points] == numbers
        for number, experts in enumerate(numbers):
            _, counted = run(name, number)
            assert counted["experts_per_token"] == experts and counted["tiers"]["fast"] == 1
    assert (run("top-m for all, renormalized", 0)[0] != run("top-m for all, own weights", 0)[0]).any()


def test_m_experts_and_answers_run_m_experts_at_known_keys(subject, run, family):
    """But for experts that have no answer at the key, which run."""
    for number, experts in enumerate([1, 0]):
        assert family("m experts and answers").points[number][0] == experts
        _, counted = run("m experts and answers", number)
        assert counted["tiers"] == run(VAR, 0)[1]["tiers"]
        fewest = experts + (2 - experts) * counted["tiers"]["learned"]
        assert fewest <= counted["experts_per_token"] < fewest + 0.5


def test_rules_of_others_rescale_where_the_model_does(subject):
    config = dataclasses.replace(subject.model.config, normalize_top_k=False)
    raw = dataclasses.replace(subject, model=dataclasses.replace(subject.model, config=config))
    for one, other in zip(_families(subject), _families(raw), strict=True):
        if one.name in ("weight ratio", "top-p", "VAR without answers", "cache only"):
            assert all(config.policy(0).renormalize for _, config in one.points)
            assert not any(config.policy(0).renormalize for _, config in other.points)
        else:
            assert one == other


def test_the_weight_ratio_drops_who_weighs_less(run, gate):
    for number, ratio in enumerate(RATIOS):
        expected = 1 + np.mean(gate[:, 1] >= ratio * gate[:, 0])
        assert run("weight ratio", number)[1]["layers"][0]["experts_per_token"] == pytest.approx(expected, abs=2e-3)


def test_a_ratio_near_zero_and_a_mass_of_one_are_the_plain_model(subject, table, family):
    for name, field, value in (("weight ratio", "gate_ratio", 1e-9), ("top-p", "gate_mass", 1.0)):
        _, config = family(name).points[0]
        timid = dataclasses.replace(config, default=dataclasses.replace(config.default, **{field: value}))
        found = score_point(subject, timid, _table_of(subject, table, family(name), timid))
        assert found.experts_per_token == 2 and found.open_share == 0
        np.testing.assert_allclose(found.nll, score_point(subject).nll, rtol=1e-6)


def test_top_p_keeps_the_fewest_experts_that_reach_the_probability(run, family, gate):
    for number, (mass, _) in enumerate(family("top-p").points):
        expected = 1 + np.mean(gate[:, 0] < mass)
        assert run("top-p", number)[1]["layers"][0]["experts_per_token"] == pytest.approx(expected, abs=2e-3)


def test_one_mean_per_expert_answers_every_token_with_what_the_expert_says_on_average(subject, table, family, run):
    means = family("one mean per expert, by ratio")
    changed = _table_of(subject, table, means, means.points[-1][1])
    eligible = np.asarray(changed.eligible)
    assert eligible[:, -1].all() and not eligible[:, :-1].any()  # the row of order 0 is the last
    for layer, known in enumerate(changed.answers):
        rows = np.asarray(known.answers)[np.asarray(known.entry)[-1]]
        there = subject.answers.entry[layer, 0]
        np.testing.assert_allclose(rows, subject.answers.mean[layer, there], rtol=1e-5, atol=1e-7)
    assert run(means.name, -1)[1]["experts_per_token"] == 1
    np.testing.assert_allclose(  # the ratio drops the same slots whether or not something stands in
        run(means.name, 2)[1]["layers"][0]["experts_per_token"],
        run("weight ratio", 2)[1]["layers"][0]["experts_per_token"],
    )
    assert run("one mean per expert, by tolerance", 0)[1]["tiers"]["fast"] == 1


def test_var_at_scale_one_is_the_given_policy(subject, run):
    var_model = VARModel(
        subject.model, subject.config, table=build_table(subject.config, subject.stats, subject.answers, top_k=2)
    )
    given, _ = score(var_runner(var_model), var_model.init(), subject.documents, progress=False, **READING)
    nll, counted = run(VAR, SCALES.index(1.0))
    np.testing.assert_allclose(nll, given.nll, rtol=1e-6)
    assert 0.5 < counted["experts_per_token"] < 1.5 and 0 < counted["tiers"]["learned"] < 0.5  # some of everything


def test_without_answers_the_same_tokens_are_planned_and_nothing_stands_in(subject, table, family, run):
    _, config = family("VAR without answers").points[3]
    changed = _table_of(subject, table, family("VAR without answers"), config)
    np.testing.assert_array_equal(changed.eligible, table.eligible)
    assert not np.asarray(changed.rules.use_answers).any() and np.asarray(changed.rules.renormalize).all()
    assert run("VAR without answers", 3)[1]["tiers"] == run(VAR, 3)[1]["tiers"]


def test_without_answers_a_key_that_nothing_answers_stays_with_the_router(subject):
    """As under the given policy, though dropping experts would need no answer there."""
    unknown = subject.answers.entry.copy()
    unknown[:, 1::2] = NO_ANSWER
    fewer = dataclasses.replace(subject, answers=dataclasses.replace(subject.answers, entry=unknown))
    table = build_table(fewer.config, fewer.stats, fewer.answers, top_k=2, keep_shapes=True)
    null = next(one for one in _families(fewer) if one.name == "VAR without answers")
    np.testing.assert_array_equal(_table_of(fewer, table, null, null.points[0][1]).eligible, table.eligible)
    admitted = with_policies(table, null.points[0][1], fewer.stats, fewer.answers).eligible
    assert np.asarray(table.eligible).sum() < np.asarray(admitted).sum()


def test_token_ids_only_looks_at_no_longer_context(subject, table, family):
    alone = family("token ids only")
    changed = _table_of(subject, table, alone, alone.points[0][1])
    orders = np.append(subject.stats.row_orders, 0)
    eligible = np.asarray(changed.eligible)
    assert eligible[:, orders == 1].any() and not eligible[:, orders != 1].any()
    assert np.asarray(table.eligible)[:, orders == 2].any()


def test_cache_only_knows_nothing_beforehand_and_remembers_more_at_a_lower_threshold(family, run):
    tiers = [run("cache only", number)[1]["tiers"] for number in range(len(family("cache only").points))]
    cached = [one["cached"] for one in tiers]
    assert all(one["fast"] == 0 for one in tiers)
    assert cached == sorted(cached) and cached[-1] > 0.1
    last = len(tiers) - 1  # one expert is half of the weight of two
    assert run("cache only", last)[1]["experts_per_token"] == pytest.approx(2 - cached[-1])


def test_no_family_but_the_cache_remembers_anything(subject):
    given = dataclasses.replace(subject, config=dataclasses.replace(subject.config, cache_size=64, cache_layers=(0,)))
    for one in _families(given):
        sizes = {config.cache_size for _, config in one.points}
        assert sizes == ({64} if one.name == "cache only" else {0})


def test_shuffled_answers_stand_in_for_the_same_slots(subject, table, family, run):
    null = family("shuffled answers")
    changed = _table_of(subject, table, null, null.points[-1][1])
    assert null.points[-1][0] == 1
    for ours, theirs in zip(table.answers, changed.answers, strict=True):
        np.testing.assert_array_equal(ours.entry, theirs.entry)
        np.testing.assert_array_equal(ours.deviation, theirs.deviation)
        assert (np.asarray(ours.answers) != np.asarray(theirs.answers)).any()
        np.testing.assert_array_equal(np.sort(ours.answers, axis=0), np.sort(theirs.answers, axis=0))
    (mine, counted), (nll, its) = run(VAR, SCALES.index(1.0)), run(null.name, -1)
    assert its["tiers"] == counted["tiers"]
    assert its["layers"][0]["experts_per_token"] == counted["layers"][0]["experts_per_token"]
    assert (nll != mine).mean() > 0.9


def test_shuffled_affine_answers_let_the_same_be_dropped_in_the_first_layer(affine_subject):
    """Maps and centers stay, so the expected errors do too; what is said is wrong."""
    table = affine_subject.build()
    changed = shuffled_answers(table, np.random.default_rng(0))
    for ours, theirs in zip(table.answers, changed.answers, strict=True):
        jax.tree.map(np.testing.assert_array_equal, ours.affine, theirs.affine)
        assert (np.asarray(ours.answers) != np.asarray(theirs.answers)).any()
    ids = np.stack([one.ids for one in affine_subject.documents[:4]])
    outputs = []
    for one in (table, changed):
        var_model = VARModel(affine_subject.model, affine_subject.config, one)
        outputs.append(var_model(ids, var_model.init(4))[0])
    np.testing.assert_array_equal(outputs[0].routing.experts[0], outputs[1].routing.experts[0])
    assert (np.asarray(outputs[0].routing.experts) == 4).any()
    assert np.abs(outputs[0].logits - outputs[1].logits).max() > 1e-3


def test_where_answers_are_affine_the_means_of_others_stay_constant(subject, affine_subject):
    """And an affine answer of order 0 is an alternative of its own."""
    ours, theirs = ({one.name: one for one in _families(each)} for each in (affine_subject, subject))
    assert set(ours) - set(theirs) == {"one affine answer per expert"}
    table = affine_subject.build()
    alone = ours["one affine answer per expert"]
    changed = _table_of(affine_subject, table, alone, alone.points[0][1])
    assert np.asarray(changed.eligible).sum(axis=1).tolist() == [1, 1] and changed.answers[0].affine is not None
    means, constant = ours["one mean per expert, by ratio"], theirs["one mean per expert, by ratio"]
    for bound in (None, 1):  # which holds for VAR's table alone
        config = dataclasses.replace(means.points[-1][1], answers_per_layer=bound)
        small = _table_of(affine_subject, table, means, config)
        assert small.index.keys.shape[0] == 1 and all(known.affine is None for known in small.answers)
        found = score_point(affine_subject, config, small, means.change)
        own = _table_of(subject, subject.build(), constant, constant.points[-1][1])
        expected = score_point(subject, constant.points[-1][1], own)
        np.testing.assert_allclose(found.nll, expected.nll, rtol=1e-5)
        assert found.experts_per_token == expected.experts_per_token == 1


def test_one_tolerance_is_that_of_all_layers(subject, table, family):
    uniform = family("one tolerance for all layers")
    for dial, config in uniform.points:
        tolerances = np.asarray(_table_of(subject, table, uniform, config).rules.tolerance)
        np.testing.assert_allclose(tolerances, dial, rtol=1e-6)
    given = [subject.config.policy(layer).tolerance for layer in range(LAYERS)]
    assert min(given) < max(given)
    assert any(dial == pytest.approx(np.sqrt(np.prod(given))) for dial, _ in uniform.points)


def test_no_family_but_the_cache_compiles_anything(subject, table):
    wanted = _families(subject)
    few = dataclasses.replace(subject, documents=subject.documents[:4])
    score_point(few, subject.config, table)
    compiled = routed_forward._cache_size()
    for one in wanted:
        if one.name != "cache only":
            config = one.points[-1][1]
            changed = _table_of(subject, table, one, config)
            assert jax.tree.structure(changed) == jax.tree.structure(table)
            score_point(few, config, changed)
    assert routed_forward._cache_size() == compiled


def test_a_policy_without_a_dial_is_refused(subject):
    for policy in (LayerPolicy(experts_kept=1), dataclasses.replace(subject.config.policy(0), experts_kept=1), None):
        config = VARConfig(default=policy, entropy_threshold=2.0)
        with pytest.raises(ValueError, match=r"governed by a tolerance.*--search_policy"):
            _families(dataclasses.replace(subject, config=config))
    with pytest.raises(ValueError, match="enable_var=False"):
        dataclasses.replace(subject, config=VARConfig(enable_var=False))


# --- experts at equal loss -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("curve", "most", "expected"),
    [
        ([(2, 0), (1, 0.04)], 0.01, 1.75),  # a quarter of the way
        ([(2, 0), (1.5, 0.01), (1, 0.03)], 0.02, 1.25),
        ([(2, 0), (1.5, 0.01)], 0.02, 1.5),  # it never spends as much: its end
        ([(1, 0.03)], 0.02, np.inf),  # it never gets there
        ([(1, 0.03)], 0.03, 1),
        ([(2, 0), (1.6, 0.03), (1.2, 0.01), (1, 0.05)], 0.02, 1.15),  # the last crossing of three
        ([(2, 0), (1, 0.04)], -0.01, np.inf),
    ],
)
def test_experts_at_equal_loss_on_curves_drawn_by_hand(curve, most, expected):
    experts, loss = np.array(curve, float).T
    assert _fewest_experts(experts, loss, np.array(most)) == pytest.approx(expected)


def test_experts_at_equal_loss_equal_a_walk_along_the_curve():
    rng = np.random.default_rng(0)
    experts, loss, most = np.sort(rng.uniform(1, 2, 6))[::-1], rng.normal(size=(6, 50)), rng.normal(size=50)
    share = np.linspace(0, 1, 20_001)
    for draw, found in enumerate(_fewest_experts(experts, loss, most)):
        walked = [np.interp(share, [0, 1], pair) for pair in pairwise(experts)]
        on_the_way = [np.interp(share, [0, 1], pair) for pair in pairwise(loss[:, draw])]
        fewest = min((np.array(walked)[np.array(on_the_way) <= most[draw]]), default=np.inf)
        assert found == pytest.approx(fewest, abs=1e-4)


# --- the whole -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kept(subject, tmp_path_factory):
    """The subject with a folder, and its result."""
    kept = dataclasses.replace(subject, folder=tmp_path_factory.mktemp("losses"))
    return kept, _evaluate(kept)


def test_a_point_stands_in_the_result_as_it_was_scored(subject, run, kept):
    _, found = kept
    nll, counted = run("weight ratio", 4)
    point = next(curve for curve in found.curves if curve.name == "weight ratio").points[4]
    plain, tokens = score_point(subject).nll, score_point(subject).tokens
    assert point.experts_per_token == counted["experts_per_token"]
    assert point.degradation.value == pytest.approx(np.expm1((nll - plain).sum() / tokens.sum()), rel=1e-5)
    rng = np.random.default_rng(1)  # another generator, drawn one by one
    chosen = rng.integers(0, len(nll), (4000, len(nll)))
    draws = np.expm1((nll - plain)[chosen].sum(1) / tokens[chosen].sum(1))
    width = point.degradation.high - point.degradation.low
    assert [point.degradation.low, point.degradation.high] == pytest.approx(
        np.quantile(draws, [0.025, 0.975]), abs=0.15 * width
    )
    assert found.var.degradation == found.curves[0].points[SCALES.index(1.0)].degradation
    assert found.curves[0].at_equal_loss.value <= found.var.experts_per_token


def test_resumed_gives_the_same_without_scoring_again(kept, monkeypatch):
    subject, found = kept
    some = sorted(subject.folder.iterdir())
    some[5].unlink()  # as if killed before it was written
    calls = []
    monkeypatch.setattr(points, "score", lambda *a, **k: calls.append(1) or score(*a, **k))
    assert _evaluate(subject) == found
    assert len(calls) == 1 and sorted(subject.folder.iterdir()) == some


def test_another_request_is_not_read_back(kept, monkeypatch):
    subject, _ = kept

    def refuse(*_, **__):
        raise AssertionError("scored")

    monkeypatch.setattr(points, "score", refuse)
    score_point(subject)
    halved = dataclasses.replace(subject.answers, mean=subject.answers.mean / 2)
    for change in ({"max_length": 12}, {"documents": subject.documents[1:]}, {"answers": halved}):
        with pytest.raises(AssertionError, match="scored"):
            score_point(dataclasses.replace(subject, **change))


def test_draws_are_of_whole_documents():
    counts = document_counts(7, 100, seed=3)
    assert counts.shape == (100, 7) and (counts.sum(axis=1) == 7).all() and (counts == counts.round()).all()
    assert counts.mean() == 1 and 0.5 < counts.var() < 1.2  # multinomial: 1 - 1/7


# --- what is said ----------------------------------------------------------------------------------------------------


def pretended(found, **at):
    """The result with other experts at equal loss: name -> (value, low, high) or None."""
    curves = [
        dataclasses.replace(one, at_equal_loss=at[one.name] and Estimate(*at[one.name])) if one.name in at else one
        for one in found.curves
    ]
    return dataclasses.replace(found, curves=tuple(curves))


def test_where_var_loses_is_said_first(kept):
    _, found = kept
    names = [curve.name for curve in found.curves]
    ours = found.var.experts_per_token
    better = (ours - 0.2, ours - 0.3, ours - 0.1)
    lost = pretended(found, **(dict.fromkeys(names[1:]) | {"top-p": better}))
    said = _section(lost)
    assert said.verdict == "FAIL" and "loses" in said.outcome and "top-p" in said.outcome
    assert said.words[0].startswith("VAR loses to top-p") and "tie" not in said.words[0]
    close = _section(pretended(lost, **{"top-p": (ours - 0.01, ours - 0.1, np.inf)}))
    assert "does not rule out a tie" in close.words[0] and "never" in close.words[0]

    won = _section(pretended(found, **(dict.fromkeys(names[1:]) | {"weight ratio": (ours + 0.1, ours, 2.0)})))
    assert won.verdict == "PASS" and "weight ratio" in won.outcome and "not distinguishable" not in str(won)
    tied = _section(pretended(found, **(dict.fromkeys(names[1:]) | {"weight ratio": (ours + 0.1, ours - 0.1, 2.0)})))
    assert tied.verdict == "PASS" and "not distinguishable from weight ratio" in tied.outcome
    assert "not distinguishable from weight ratio" in tied.words[0]
    assert _section(pretended(found, **dict.fromkeys(names[1:]))).verdict == "PASS"


def test_the_study_shows_the_section_and_its_figure(kept):
    """A panel for every alternative."""
    subject, found = kept
    answered = QUESTION.answer(subject)
    assert answered.result == found and answered.sections == (_section(found),)
    drawn = answered.sections[0].figures[0].draw()
    titles = [axis.get_title() for axis in drawn.axes if axis.get_visible()]
    assert titles == [curve.name for curve in found.curves[1:]]
    assert f"{found.documents:,} documents" in drawn.get_suptitle()

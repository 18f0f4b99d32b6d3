"""What the sections about a trace say: sizes next to verdicts, orders at equal tokens, and what was not measured."""

from dataclasses import replace

import numpy as np
import pytest

from analysis.questions import nulls
from analysis.questions.data import RoutingData, TraceSettings, trace_source
from analysis.questions.registry import ROUTING_QUESTIONS
from analysis.report.figures import subplots
from analysis.resampling import Measure
from tests.synthetic_traces import make_trace, zipf_ids

SETTINGS = TraceSettings(orders=(1, 2), min_count=5, permutations=19, samples=20)
NAMES = ("predictability", "choice_entropy", "repetition", "load", "co_activation")


def small_trace(**fields):
    """60 documents; in layer 0 the id names its first choice, in layer 1 nothing does."""
    rng = np.random.default_rng(0)
    ids = zipf_ids(rng, 3000, 30)
    experts = rng.random((3000, 2, 6)).argsort(axis=-1)[..., :2]
    experts[:, 0] = np.stack([ids % 6, (ids + 1) % 6], axis=-1)
    return make_trace(experts, 6, token_id=ids, **fields)


def answers(trace):
    """The sections of the questions about a trace."""
    data = RoutingData(trace_source(small_trace()), trace, settings=SETTINGS)
    found = [question.answer(data).sections for question in ROUTING_QUESTIONS if question.name in NAMES]
    return {section.name: section for sections in found for section in sections}


@pytest.fixture(scope="module")
def sections():
    return answers(small_trace())


def test_predictability_says_how_large_and_compares_orders_at_equal_tokens(sections):
    section = sections["predictability"]
    assert section.verdict == "FAIL"
    first, second, longest = section.outcome.split("; ")
    assert first.startswith("held-out agreement, mean over layers: order 1: 0.") and "(null 0." in first
    assert first.endswith("% of tokens, above the band in 1 of 2 layers") and "there" not in first
    assert second.startswith("order 2: 0.") and "% of tokens (order 1 there: 0." in second
    assert longest.startswith("longest known key: 0.")
    assert "not a published one" in " ".join(section.words)
    coverage, agreement = section.tables[:2]
    assert [row[0] for row in coverage.rows] == ["order 1", "order 2", "longest known key"]
    assert coverage.rows[0][1:] == coverage.rows[2][1:]
    assert [column.name for column in agreement.columns][-2:] == ["order 1 there", "verdict"]
    assert [row[-2] for row in agreement.rows] == [row[1] for row in agreement.rows]  # order 1 next to itself
    assert [row[-1] for row in agreement.rows] == ["PASS", "FAIL"]


def test_entropy_leads_with_the_held_out_figure(sections):
    section = sections["choice_entropy"]
    assert section.outcome.startswith("explained by the ids on held-out documents") and "in sample" in section.outcome
    titles = [table.title for table in section.tables]
    assert "coverage [share] of the cross entropy: held-out tokens, keys of the build documents" in titles
    assert titles.index("explained_held_out [share], order 1") < titles.index("explained [share], order 1")


def test_pairs_are_those_of_other_documents(sections):
    section = sections["co_activation"]
    assert section.verdict == "reported" and "on the held-out ones" in section.outcome
    assert all(row[4] == pytest.approx(row[2] / row[3]) for row in section.tables[0].rows)


def test_unranked_experts_still_have_load_recall_and_co_activation(sections):
    found = answers(replace(small_trace(), ranked=False))
    assert "held-out recall" in found["predictability"].outcome
    assert "agreement: not measured, because the experts are not ranked" in " ".join(found["predictability"].words)
    for name in ("choice_entropy", "repetition"):
        assert found[name].verdict == "not testable" and "not ranked" in found[name].outcome
    for name in ("load", "co_activation"):
        assert found[name] == sections[name]


def test_one_document_has_load_but_no_held_out_pairs():
    found = answers(small_trace(length=3000))
    assert found["co_activation"].verdict == found["predictability"].verdict == "not testable"
    assert found["co_activation"].outcome.startswith("not measured: all documents are on one side")
    assert found["load"].verdict == "reported"


def test_a_figure_without_an_interval_is_still_judged():
    value, nan = np.array([[0.9, 0.2, np.nan]]), np.full((1, 3), np.nan)
    band = np.array([[0.5, 0.5, np.nan]])
    one = Measure("m", "share", value, nan, nan, band, band, band, band)
    assert [row[-1] for row in nulls.tables(one, ["row"], judge=True)[0].rows] == ["PASS", "FAIL", "not testable"]
    assert nulls.layers_above(one, 0) == "above the band in 1 of 3 layers (1 not testable)"
    assert "no permutations" in nulls.layers_above(replace(one, null=None, null_high=None), 0)


def test_a_measure_outside_its_own_interval_is_drawn():
    _, axis = subplots()
    one = np.full((1, 3), 0.5)
    missing = np.array([[0.5, np.nan, 0.4]])
    nulls.plot(axis, Measure("m", "share", missing, one + 0.1, one + 0.2, one, one - 0.1, one + 0.1, one), 0)

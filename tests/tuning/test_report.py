"""The report of a search says first what was found, or that nothing was, and never more than the points do."""

import json
import re

import pytest

from analysis.report.files import write_report
from analysis.report.report import Section, fields, text
from tuning.report import SHOWN, draw, examine, report

LIMIT = 0.01


@pytest.fixture
def said(searches, space):
    def of(name, **more):
        return report(examine(searches[name], space, LIMIT), **more)

    return of


def test_what_was_found_comes_first(said, searches):
    section = said("many").sections[0]
    feasible = [one for one in searches["many"] if one.outcome.within(LIMIT)]
    fastest = max(feasible, key=lambda one: one.outcome.speedup)
    assert section.verdict == "reported"
    assert section.outcome.startswith(
        f"{len(feasible)} of 40 trials are within the limit of +1.00%; the fastest, by the measurements that chose it, "
        "is trial"
    )
    assert f"trial {fastest.number}: predicted speed-up {fastest.outcome.speedup:.2f}x" in section.outcome
    results, values = section.tables
    assert len(results.rows) == min(SHOWN, len(feasible)) and results.rows[0][0] == fastest.number
    assert {row[0]: row[2] for row in values.rows} == fastest.values
    assert "looks better than it is" in " ".join(section.words)


def test_if_nothing_was_found_that_comes_first(said):
    section = said("none feasible").sections[0]
    assert section.verdict == "FAIL"
    assert section.outcome.startswith("none of 25 trials is within the limit of +1.00%; the least bad is trial 0: ")
    assert [row[0] for row in section.tables[0].rows] == [0, 1, 2, 3, 4]
    assert "Nothing here may be used" in section.words[0]


def test_a_search_in_which_all_was_given_up_says_so(said):
    best, history, front, parameters = said("all given up").sections
    assert best.verdict == "FAIL" and best.outcome.endswith("given up")
    assert history.outcome == "25 trials: 0 scored in full, 0 of them within the limit, 25 given up"
    assert (front.verdict, front.outcome, front.tables) == ("not measured", "no trial was scored in full", ())
    assert "For degradation there are 0 trials; under 20 nothing is said." in parameters.words


@pytest.mark.parametrize("name", ["none", "one"])
def test_few_points_make_a_report_too(said, name):
    verdicts = [one.verdict for one in said(name).sections]
    expected = {"none": ["not measured"] * 3, "one": ["reported"] * 3}[name]
    assert verdicts == [*expected, "not testable"]
    text(said(name)), fields(said(name))


def test_parameters_are_reported_with_chance_beside_them(said):
    section = said("many").sections[-1]
    assert section.verdict == "reported" and re.search(r"chance,? up to \d+%", section.outcome)
    (table,) = section.tables
    assert [row[0] for row in table.rows] == [
        *("loss_budget", "frequency_threshold", "context_window_size", "cached_tier")
    ]
    assert all(len(row) == len(table.columns) for row in table.rows)


def test_where_nothing_varied_that_is_said(said):
    section = said("all the same").sections[-1]
    assert section.verdict == "not testable" and "all results or all parameters are the same" in section.words[0]
    assert any("only one value was tried: loss_budget, frequency" in one for one in section.words)


def test_trials_without_a_cached_tier_are_named(make_point, space):
    points = [make_point(number, 1.5 - number / 10, cached_tier=number != 1) for number in range(3)]
    words = report(examine(points, space, LIMIT)).sections[0].words
    assert "Without a cached tier, so that its settings mean nothing: trial 1." in words


def test_measured_phases_stand_in_the_table_and_predictions_are_called_so(make_point, space):
    measured = report(examine([make_point(0, phase="decode")], space, LIMIT))
    assert {"decode", "decode low", "decode high"} <= {one.name for one in measured.sections[0].tables[0].columns}
    assert ("speed-ups", "measured") in measured.facts and "predicted" not in text(measured)
    predicted = report(examine([make_point(0)], space, LIMIT))
    assert ("speed-ups", "predicted by active assignments, not measured") in predicted.facts
    assert "predicted" not in {one.name for one in predicted.sections[0].tables[0].columns}


def test_names_of_columns_are_unique_as_json_needs_them(said):
    for section in said("many").sections:
        for table in section.tables:
            names = [one.name for one in table.columns]
            assert len(set(names)) == len(names)


def test_further_sections_follow_the_first_and_facts_stand_in_front(said):
    checked = Section("validation", "Does it hold?", "PASS", "it does")
    whole = said("many", facts=(("model", "tiny"),), further=(checked,))
    assert [one.name for one in whole.sections] == ["best", "validation", "history", "front", "parameters"]
    assert whole.facts[0] == ("model", "tiny")


def test_the_report_is_written_with_every_figure_that_it_names(searches, space, tmp_path):
    found = examine(searches["many"], space, LIMIT)
    drawn, whole = draw(found), report(found)
    assert {note.name for section in whole.sections for note in section.figures} == set(drawn)
    write_report(whole, tmp_path / "out", "tuning", figures=drawn, beside={"provenance": {"seed": 1}})
    saved = json.loads((tmp_path / "out" / "tuning.json").read_text())
    assert saved["provenance"] == {"seed": 1} and set(saved["sections"]) == {"best", "history", "front", "parameters"}
    assert (tmp_path / "out" / "tuning.html").read_text().count("data:image/png;base64,") == len(drawn)
    assert (tmp_path / "out" / "tuning.txt").read_text() == text(whole)


def test_a_best_point_at_the_end_of_a_range_is_said_unless_it_means_nothing(make_point, space):
    at_ends = {"loss_budget": 0.03, "frequency_threshold": 50, "context_window_size": 2}
    for cached, named in (
        (True, "loss_budget (highest), context_window_size (lowest)"),
        (False, "loss_budget (highest)"),
    ):
        points = [make_point(0, **at_ends, cached_tier=cached)]
        said = " ".join(report(examine(points, space, 0.01)).sections[0].words)
        assert f"beyond which there may be better: {named}." in said
    inside = report(examine([make_point(0, loss_budget=0.01, context_window_size=3)], space, 0.01))
    assert "end of a range" not in " ".join(inside.sections[0].words)

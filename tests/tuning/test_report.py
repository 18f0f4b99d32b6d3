"""A search is reported and drawn for none, few and many points, and nothing is said that its points do not show."""

import dataclasses
import json
import re

import numpy as np
import pytest
from matplotlib.text import Text
from scipy.stats import spearmanr

from analysis.report.files import write_report
from analysis.report.output import DIRECTORY, Output
from analysis.report.report import fields, text
from tuning import report as module
from tuning.points import best
from tuning.report import FEWEST, SHOWN, TARGETS, report

LIMIT = 0.01
SEARCHES = ("none", "one", "many", "none feasible", "all given up", "all the same")


def effects(points, space, **draws):
    """One for each target."""
    return [module._effects(points, space, target, **draws) for target in TARGETS]


@pytest.fixture(scope="module")
def said(searches, space):
    """The report of a search, by its name."""
    return {name: report(searches[name], space, LIMIT) for name in SEARCHES}


# --- words and tables ------------------------------------------------------------------------------------------------


def test_what_was_found_comes_first(said, searches):
    section = said["many"].sections[0]
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
    section = said["none feasible"].sections[0]
    assert section.verdict == "FAIL"
    assert section.outcome.startswith("none of 25 trials is within the limit of +1.00%; the least bad is trial 0: ")
    assert [row[0] for row in section.tables[0].rows] == [0, 1, 2, 3, 4]
    assert "Nothing here may be used" in section.words[0]


def test_a_search_in_which_all_was_given_up_says_so(said):
    best, history, front, parameters = said["all given up"].sections
    assert best.verdict == "FAIL" and best.outcome.endswith("given up")
    assert history.outcome == "25 trials: 0 scored in full, 0 of them within the limit, 25 given up"
    assert (front.verdict, front.outcome, front.tables) == ("not measured", "no trial was scored in full", ())
    assert "For degradation there are 0 trials; under 20 nothing is said." in parameters.words


@pytest.mark.parametrize("name", ["none", "one"])
def test_few_points_make_a_report_too(said, name):
    verdicts = [one.verdict for one in said[name].sections]
    expected = {"none": ["not measured"] * 3, "one": ["reported"] * 3}[name]
    assert verdicts == [*expected, "not testable"]
    text(said[name]), fields(said[name])


def test_parameters_are_reported_next_to_chance(said):
    section = said["many"].sections[-1]
    assert section.verdict == "reported" and re.search(r"chance,? up to \d+%", section.outcome)
    (table,) = section.tables
    names = ["loss_budget", "frequency_threshold", "context_window_size", "cached_tier"]
    assert [row[0] for row in table.rows] == names
    assert all(len(row) == len(table.columns) for row in table.rows)


def test_where_nothing_varied_that_is_said(said):
    section = said["all the same"].sections[-1]
    assert section.verdict == "not testable" and "all results or all parameters are the same" in section.words[0]
    assert any("only one value was tried: loss_budget, frequency" in one for one in section.words)


def test_trials_without_a_cached_tier_are_named(make_point, space):
    points = [make_point(number, 1.5 - number / 10, cached_tier=number != 1) for number in range(3)]
    words = report(points, space, LIMIT).sections[0].words
    assert "Without a cached tier, so that its settings mean nothing: trial 1." in words


def test_measured_phases_are_in_the_table_and_predictions_are_called_so(make_point, space):
    measured = report([make_point(0, phase="decode")], space, LIMIT, [("model", "tiny")])
    assert {"decode", "decode low", "decode high"} <= {one.name for one in measured.sections[0].tables[0].columns}
    assert measured.facts == (("model", "tiny"), ("speed-ups", "measured")) and "predicted" not in text(measured)
    predicted = report([make_point(0)], space, LIMIT)
    assert ("speed-ups", "predicted from active assignments, not measured") in predicted.facts
    assert "predicted" not in {one.name for one in predicted.sections[0].tables[0].columns}


def test_names_of_columns_are_unique_as_json_needs_them(said):
    for section in said["many"].sections:
        for table in section.tables:
            names = [one.name for one in table.columns]
            assert len(set(names)) == len(names)


def test_a_best_point_at_the_end_of_a_range_is_said_unless_it_means_nothing(make_point, space):
    at_ends = {"loss_budget": 0.03, "frequency_threshold": 50, "context_window_size": 2}
    for cached, named in (
        (True, "loss_budget (highest), context_window_size (lowest)"),
        (False, "loss_budget (highest)"),
    ):
        points = [make_point(0, **at_ends, cached_tier=cached)]
        said = " ".join(report(points, space, 0.01).sections[0].words)
        assert f"beyond which there may be better: {named}." in said
    inside = report([make_point(0, loss_budget=0.01, context_window_size=3)], space, 0.01)
    assert "end of a range" not in " ".join(inside.sections[0].words)


def test_no_pair_shows_a_point_of_the_front_beaten_or_another_one_unbeaten(make_point):
    rng = np.random.default_rng(0)  # coarse results: there are ties in either and in both
    points = [
        make_point(number, 1 + rng.integers(0, 8) / 10, rng.integers(-2, 12) / 500, hopeless=bool(rng.integers(5) == 0))
        for number in range(120)
    ]

    def beaten(one, other):
        a, b = one.outcome, other.outcome
        no_worse = b.speedup >= a.speedup and b.degradation <= a.degradation
        return no_worse and (b.speedup, b.degradation) != (a.speedup, a.degradation)

    whole = [one for one in points if not one.outcome.hopeless]
    results = {
        (one.outcome.speedup, one.outcome.degradation)
        for one in whole
        if not any(beaten(one, other) for other in whole)
    }
    front = [(one.outcome.speedup, one.outcome.degradation) for one in module._pareto(points)]
    assert front == sorted(results)
    assert module._pareto([make_point(0, 9.0, -1.0, hopeless=True)]) == []


# --- importance and correlations -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def decided(make_point):
    """The window alone decides the speed-up, the occurrences alone and downwards the degradation."""
    points = [make_point(number) for number in range(120)]
    return [
        make_point(
            one.number,
            1 + one.values["context_window_size"] / 10,
            0.02 - one.values["frequency_threshold"] / 10_000,
            hopeless=one.number % 4 == 0,
            **one.values,
        )
        for one in points
    ]


@pytest.fixture(scope="module")
def noise(make_point):
    rng = np.random.default_rng(1)
    return [make_point(number, 1 + rng.uniform(), rng.uniform() / 50) for number in range(120)]


def test_what_decides_gets_the_importance_and_a_correlation_of_one(decided, space):
    speedup, degradation = effects(decided, space)
    assert (speedup.target, degradation.target) == ("speed-up", "degradation")
    assert (speedup.points, degradation.points) == (120, 90)  # without those that were given up
    assert speedup.shares["context_window_size"] > 0.8 > speedup.by_chance
    assert degradation.shares["frequency_threshold"] > 0.8 > degradation.by_chance
    for one in (speedup, degradation):
        assert set(one.shares) == {parameter.name for parameter in space}
        assert sum(one.shares.values()) == pytest.approx(1)
    assert dataclasses.astuple(speedup.correlations["context_window_size"]) == pytest.approx((1, 1, 1))
    assert dataclasses.astuple(degradation.correlations["frequency_threshold"]) == pytest.approx((-1, -1, -1))


def test_what_decides_either_or_gets_the_importance_too(make_point, space):
    points = [make_point(number) for number in range(80)]
    points = [make_point(one.number, 1.1 + 0.2 * one.values["cached_tier"], **one.values) for one in points]
    speedup, _ = effects(points, space, samples=10)
    assert speedup.shares["cached_tier"] == max(speedup.shares.values()) > speedup.by_chance


def test_noise_stays_within_what_chance_gives_and_its_correlations_are_those_of_scipy(noise, space):
    found = effects(noise, space, samples=200)
    assert all(max(one.shares.values()) < one.by_chance < 1 for one in found)
    for one in space:
        values = [float(point.values[one.name]) for point in noise]
        expected = spearmanr(values, [point.outcome.speedup for point in noise]).statistic
        correlation = found[0].correlations[one.name]
        assert correlation.value == pytest.approx(expected) and correlation.low < correlation.value < correlation.high


def test_effects_repeat_with_their_seed(noise, space):
    first, again, other = (effects(noise[:40], space, shuffles=5, samples=10, seed=seed) for seed in (3, 3, 4))
    assert first == again and first[0].by_chance != other[0].by_chance


def test_intervals_cover_the_truth(make_point, space):
    """Of normal variables with correlation r, Spearman's is 6/pi arcsin(r/2)."""
    (one,) = [parameter for parameter in space if parameter.name == "loss_budget"]
    truth = 6 / np.pi * np.arcsin(0.6 / 2)
    rng = np.random.default_rng(5)
    covered = 0
    for _ in range(60):
        x = rng.normal(size=60)
        y = 0.6 * x + 0.8 * rng.normal(size=60)
        points = [make_point(number, loss_budget=float(x[number])) for number in range(60)]
        found = module._correlation(points, one, y, 300, 0)
        covered += found.low <= truth <= found.high
    assert 51 <= covered < 60  # 95 % of 60 is 57


def test_too_few_points_say_nothing(decided, space):
    speedup, degradation = effects(decided[: FEWEST - 1], space)
    assert not speedup.shares and not degradation.shares and np.isnan(speedup.by_chance)
    assert not speedup.correlations and not degradation.correlations
    speedup, degradation = effects(decided[:FEWEST], space, samples=10)  # a quarter of them was given up
    assert speedup.shares and not degradation.shares


def test_a_parameter_that_never_varied_is_left_out(decided, space):
    same = [dataclasses.replace(one, values={**one.values, "cached_tier": True}) for one in decided]
    names = {one.name for one in space} - {"cached_tier"}
    speedup, _ = effects(same, space, shuffles=1, samples=10)
    assert set(speedup.shares) == set(speedup.correlations) == names


def test_results_that_are_mostly_the_same_have_no_best_quarter(make_point, space):
    points = [make_point(number, 1.5 if number < 5 else 1.2) for number in range(40)]
    speedup, degradation = effects(points, space, samples=10)
    assert not speedup.shares and not degradation.shares
    assert speedup.correlations and not degradation.correlations


def test_no_search_is_too_poor_to_be_asked(searches, space):
    for name, points in searches.items():
        found = effects(points, space, shuffles=2, samples=10)
        said = [one.shares for one in found] + [one.correlations for one in found]
        assert sum(map(bool, said)) == {"many": 4, "none feasible": 4}.get(name, 0), name


# --- figures ---------------------------------------------------------------------------------------------------------


def words(figure) -> str:
    return " ".join(one.get_text() for one in figure.findobj(Text))


def marks(axis) -> dict[str, np.ndarray]:
    """The places [N, 2] of the dots, by label."""
    return {one.get_label(): np.asarray(one.get_offsets()) for one in axis.collections if len(one.get_offsets())}


def lines(axis) -> dict[str, np.ndarray]:
    return {one.get_label(): np.asarray(one.get_xydata()) for one in axis.lines}


@pytest.mark.parametrize("name", SEARCHES)
def test_every_search_can_be_drawn(said, name):
    drawn = {one.name: one.draw() for section in said[name].sections for one in section.figures}
    assert drawn.keys() == {f"tuning_{kind}" for kind in ("history", "front", "parameters", "slices")}
    for figure_name, figure in drawn.items():
        if name == "none":
            assert "no trial" in words(figure) or "too few trials" in words(figure), figure_name
        figure.canvas.draw()


def test_the_report_is_written_with_every_figure_that_it_names(said, tmp_path):
    write_report(said["many"], Output.of(tmp_path / "out", "tuning", DIRECTORY), extra={"provenance": {"seed": 1}})
    saved = json.loads((tmp_path / "out" / "tuning.json").read_text())
    assert saved["provenance"] == {"seed": 1} and set(saved["sections"]) == {"best", "history", "front", "parameters"}
    assert (tmp_path / "out" / "tuning.html").read_text().count("data:image/png;base64,") == 4
    assert (tmp_path / "out" / "tuning.txt").read_text() == text(said["many"])


@pytest.mark.parametrize("limit", [0.0, 0.01])
def test_every_trial_is_one_mark_of_its_kind(searches, limit):
    """Optuna's own figures fail this."""
    points = searches["many"]
    axis = module._draw_front(points, limit).axes[0]
    kinds = {
        "given up": [one for one in points if one.outcome.hopeless],
        "within the limit": [one for one in points if one.outcome.within(limit)],
    }
    kinds["beyond the limit"] = [one for one in points if one not in kinds["given up"] + kinds["within the limit"]]
    found = marks(axis)
    for name, group in kinds.items():
        expected = [(100 * one.outcome.degradation, one.outcome.speedup) for one in group]
        np.testing.assert_allclose(found.get(name, np.zeros((0, 2))), np.reshape(expected, (-1, 2)))
    assert len(kinds["given up"]) == 8


def test_dots_within_the_limit_are_filled_and_those_beyond_are_hollow(searches):
    axis = module._draw_history(searches["many"], LIMIT).axes[0]
    faces = {one.get_label(): one.get_facecolor()[0, 0] for one in axis.collections}
    assert faces["within the limit"] == 0 and faces["beyond the limit"] == 1


def test_the_line_of_the_history_is_the_best_so_far(searches):
    points = searches["many"]
    line = lines(module._draw_history(points[::-1], LIMIT).axes[0])["best within the limit"]
    for number, speedup in line:
        (first,) = best([one for one in points if one.number <= number], LIMIT, 1)
        assert speedup == first.outcome.speedup
    assert line[-1, 0] == points[-1].number
    assert not best([one for one in points if one.number < line[0, 0]], LIMIT, 1)


def test_the_front_is_drawn_with_upper_limits_and_the_limit(searches):
    points = searches["many"]
    axis = module._draw_front(points, LIMIT).axes[0]
    front = [(100 * one.outcome.degradation, one.outcome.speedup) for one in module._pareto(points)]
    np.testing.assert_allclose(lines(axis)["Pareto front"], front)
    assert any(np.all(xy[:, 0] == 1.0) for xy in lines(axis).values())
    ends = [segment for one in axis.collections if hasattr(one, "get_segments") for segment in one.get_segments()]
    expected = [100 * one.outcome.upper for one in points if not one.outcome.hopeless]
    assert [segment[1][0] for segment in ends] == pytest.approx(expected)


def test_bars_and_dots_are_the_numbers(searches, space):
    found = effects(searches["many"], space, samples=100)
    drawn = module._draw_effects(found)
    widths = sorted(one.get_width() for one in drawn.axes[0].patches)
    assert widths == pytest.approx(sorted(share for one in found for share in one.shares.values()))
    for axis, one in zip(drawn.axes[1:], found, strict=True):
        dots = {float(line.get_xdata()[0]) for line in axis.lines if line.get_marker() == "o"}
        assert dots == {estimate.value for estimate in one.correlations.values()}
    assert "degradation, 32 trials" in words(drawn)


def test_a_slice_has_the_scale_of_its_parameter(searches, space):
    drawn = module._draw_slices(searches["many"], space, LIMIT)
    axes = dict(zip((one.name for one in space), drawn.axes, strict=False))
    assert axes["frequency_threshold"].get_xscale() == "log" and axes["context_window_size"].get_xscale() == "linear"
    assert [one.get_text() for one in axes["cached_tier"].get_xticklabels()] == ["no", "yes"]
    for axis in axes.values():
        assert sum(map(len, marks(axis).values())) == len(searches["many"])
    assert "occurrences" in words(drawn)


def test_predicted_speed_ups_are_called_so(make_point):
    assert "predicted speed-up" in words(module._draw_history([make_point(0)], LIMIT))
    assert "predicted" not in words(module._draw_history([make_point(0, phase="decode")], LIMIT))

"""Figures of a search are drawn for none, few and many points, and show each of them once."""

import numpy as np
import pytest
from matplotlib.text import Text

from analysis.report.figures import save
from tuning import figures
from tuning.importance import importances, sensitivities
from tuning.points import best, pareto
from tuning.report import draw, examine

LIMIT = 0.01
SEARCHES = ("none", "one", "many", "none feasible", "all given up", "all the same")


def words(figure) -> str:
    return " ".join(one.get_text() for one in figure.findobj(Text))


def marks(axis) -> dict[str, np.ndarray]:
    """The places [N, 2] of the dots, by label."""
    return {one.get_label(): np.asarray(one.get_offsets()) for one in axis.collections if len(one.get_offsets())}


def lines(axis) -> dict[str, np.ndarray]:
    return {one.get_label(): np.asarray(one.get_xydata()) for one in axis.lines}


@pytest.mark.parametrize("name", SEARCHES)
def test_every_search_can_be_drawn_and_written(searches, space, name, tmp_path):
    drawn = draw(examine(searches[name], space, LIMIT))
    assert len(drawn) == 5
    for figure_name, figure in drawn.items():
        if name == "none":
            assert "no trial" in words(figure) or "too few trials" in words(figure), figure_name
        save(figure, tmp_path, figure_name)
    assert len(list(tmp_path.iterdir())) == 10


@pytest.mark.parametrize("limit", [0.0, 0.01])
def test_every_trial_is_one_mark_of_its_kind(searches, limit):
    points = searches["many"]
    axis = figures.front(points, limit).axes[0]
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
    axis = figures.history(searches["many"], LIMIT).axes[0]
    faces = {one.get_label(): one.get_facecolor()[0, 0] for one in axis.collections}
    assert faces["within the limit"] == 0 and faces["beyond the limit"] == 1


def test_the_line_of_the_history_is_the_best_so_far(searches):
    points = searches["many"]
    line = lines(figures.history(points[::-1], LIMIT).axes[0])["best within the limit"]
    for number, speedup in line:
        (first,) = best([one for one in points if one.number <= number], LIMIT, 1)
        assert speedup == first.outcome.speedup
    assert line[-1, 0] == points[-1].number
    assert not best([one for one in points if one.number < line[0, 0]], LIMIT, 1)


def test_the_front_is_drawn_with_upper_limits_and_the_limit(searches):
    points = searches["many"]
    axis = figures.front(points, LIMIT).axes[0]
    front = [(100 * one.outcome.degradation, one.outcome.speedup) for one in pareto(points)]
    np.testing.assert_allclose(lines(axis)["Pareto front"], front)
    assert any(np.all(xy[:, 0] == 1.0) for xy in lines(axis).values())
    ends = [segment for one in axis.collections if hasattr(one, "get_segments") for segment in one.get_segments()]
    expected = [100 * one.outcome.upper for one in points if not one.outcome.hopeless]
    assert [segment[1][0] for segment in ends] == pytest.approx(expected)


def test_bars_and_dots_are_the_numbers(searches, space):
    shares = importances(searches["many"], space)
    axis = figures.importance(shares).axes[0]
    widths = sorted(one.get_width() for one in axis.patches)
    assert widths == pytest.approx(sorted(share for one in shares for share in one.shares.values()))
    found = sensitivities(searches["many"], space, samples=100)
    drawn = figures.sensitivity(found)
    for axis, one in zip(drawn.axes, found, strict=True):
        dots = axis.lines[0].get_xdata()
        assert list(dots) == [estimate.value for estimate in one.correlations.values()]
    assert "degradation, 32 trials" in words(drawn)


def test_a_slice_has_the_scale_of_its_parameter(searches, space):
    drawn = figures.slices(searches["many"], space, LIMIT)
    axes = dict(zip((one.name for one in space), drawn.axes, strict=False))
    assert axes["frequency_threshold"].get_xscale() == "log" and axes["context_window_size"].get_xscale() == "linear"
    assert [one.get_text() for one in axes["cached_tier"].get_xticklabels()] == ["no", "yes"]
    for axis in axes.values():
        assert sum(map(len, marks(axis).values())) == len(searches["many"])
    assert "occurrences" in words(drawn)


def test_predicted_speed_ups_are_called_so(make_point):
    assert "predicted speed-up" in words(figures.history([make_point(0)], LIMIT))
    assert "predicted" not in words(figures.history([make_point(0, phase="decode")], LIMIT))

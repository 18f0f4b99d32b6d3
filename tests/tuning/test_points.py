"""The best points and the least bad ones are those that comparing every pair would find, and their files say so."""

import dataclasses
import json

import numpy as np
import pytest

from tuning.points import best, least_bad, read_chosen, write_chosen
from varjax import checksums
from varjax.config import VARConfig
from varjax.tablefiles import TableFiles

LIMIT = 0.01
FILES = TableFiles("stats.parquet", "answers.safetensors")


def config(number):
    return VARConfig(frequency_threshold=number)


@pytest.fixture(scope="module", params=range(4))
def points(make_point, request):
    """Coarse results, so that there are ties in either and in both."""
    rng = np.random.default_rng(request.param)
    return [
        make_point(number, 1 + rng.integers(0, 8) / 10, rng.integers(-2, 12) / 500, hopeless=bool(rng.integers(5) == 0))
        for number in range(30)
    ]


def test_within_the_limit_takes_the_upper_limit_and_all_documents(make_point):
    outcome = make_point(0, degradation=0.008).outcome
    assert outcome.within(outcome.upper) and not outcome.within(0.009)
    assert not dataclasses.replace(outcome, hopeless=True).within(1.0)
    assert not dataclasses.replace(outcome, upper=float("inf")).within(1.0)
    assert not dataclasses.replace(outcome, upper=float("nan")).within(1.0)


def test_the_best_are_the_fastest_feasible(points):
    feasible = [one for one in points if one.outcome.upper <= LIMIT and not one.outcome.hopeless]
    found = best(points, LIMIT, 5)
    assert len(found) == min(5, len(feasible)) > 0
    for one in found:
        others = [other for other in feasible if other not in found]
        assert one in feasible and all(other.outcome.speedup <= one.outcome.speedup for other in others)
    speedups = [one.outcome.speedup for one in found]
    assert speedups == sorted(speedups, reverse=True)
    assert best(points, -1.0, 5) == [] and best([], LIMIT, 5) == []


def test_of_equal_speed_ups_the_earlier_trial_comes_first(make_point):
    late, early = make_point(7), make_point(3)
    assert best([late, early], LIMIT, 2) == [early, late]


def test_the_least_bad_have_the_lowest_upper_limit_and_were_not_given_up(points):
    found = least_bad(points, 40)
    assert sorted(one.number for one in found) == list(range(30))
    given_up = [one.outcome.hopeless for one in found]
    assert given_up == sorted(given_up)
    uppers = [one.outcome.upper for one in found if not one.outcome.hopeless]
    assert uppers == sorted(uppers) and len(least_bad(points, 3)) == 3


def test_equal_configs_come_once(make_point):
    points = [
        make_point(number, 1.1 + number / 100, 0.001 * (3 - number), config=config(1 + number % 2))
        for number in range(4)
    ]
    assert [one.number for one in best(points, LIMIT, 9)] == [3, 2]
    assert [one.number for one in least_bad(points, 9)] == [3, 2]


def test_the_fastest_is_handed_on_and_the_few_are_in_the_order_of_testing(make_point, tmp_path):
    points = [make_point(i, 1 + i / 10, 0.007 - i / 1000, config=config(10 + i)) for i in range(4)]
    points.append(make_point(9, 3.0, 0.05, config=config(99)))  # beyond the limit
    write_chosen(tmp_path, points, LIMIT, FILES, {})
    assert VARConfig.load(tmp_path / "best_config.json") == config(13)
    assert "by the measurements that chose" in json.loads((tmp_path / "best_configs.json").read_text())["measured"]
    candidates, files = read_chosen(tmp_path / "best_configs.json")
    assert files == FILES
    assert list(candidates) == ["trial 3", "trial 2", "trial 1", "trial 0"]  # the surest first
    assert candidates["trial 1"] == config(11)
    assert read_chosen(tmp_path / "best_config.json") == ({"best_config": config(13)}, FILES)


def test_where_none_is_feasible_nothing_is_called_best(make_point, tmp_path):
    feasible, bad = make_point(0, config=config(10)), make_point(1, 1.5, 0.02, config=config(11))
    write_chosen(tmp_path, [feasible], LIMIT, FILES, {})
    write_chosen(tmp_path, [bad], LIMIT, FILES, {})
    assert {path.name for path in tmp_path.iterdir()} == {"least_bad_config.json", "least_bad_configs.json"}
    write_chosen(tmp_path, [feasible, bad], LIMIT, FILES, {})
    assert {path.name for path in tmp_path.iterdir()} == {"best_config.json", "best_configs.json"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "expected a JSON object"),
        ('{"configs": []}', "has no field 'checksum', so it was damaged or is of an older version; search again"),
        ({"configs": [{"config": {}}]}, "lacks 'name'"),
        ({"configs": [{"name": "a", "config": {"frequenzy_threshold": 1}}]}, "did you mean"),
    ],
)
def test_what_is_no_configuration_is_said(tmp_path, content, message):
    if isinstance(content, dict):
        checksums.write_json(tmp_path / "file.json", content)
    else:
        (tmp_path / "file.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_chosen(tmp_path / "file.json")

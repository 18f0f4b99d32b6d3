import json

import pytest

from tuning.chosen import read, write
from varjax import checksums
from varjax.config import VARConfig

LIMIT = 0.01


def config(number):
    return VARConfig(frequency_threshold=number).to_json()


def test_the_fastest_is_handed_on_and_the_few_are_in_the_order_of_testing(make_point, tmp_path):
    points = [make_point(i, 1 + i / 10, 0.007 - i / 1000, config=config(10 + i)) for i in range(4)]
    points.append(make_point(9, 3.0, 0.05, config=config(99)))  # beyond the limit
    assert write(tmp_path, points, LIMIT, {})
    assert VARConfig.load(tmp_path / "best_config.json") == VARConfig(frequency_threshold=13)
    assert "by the very measurements that chose" in json.loads((tmp_path / "best_configs.json").read_text())["measured"]
    candidates = read(tmp_path / "best_configs.json")
    assert list(candidates) == ["trial 3", "trial 2", "trial 1", "trial 0"]  # the surest first
    assert candidates["trial 1"] == VARConfig(frequency_threshold=11)
    assert read(tmp_path / "best_config.json") == {"best_config": VARConfig(frequency_threshold=13)}


def test_where_none_is_feasible_nothing_is_called_best(make_point, tmp_path):
    feasible, bad = make_point(0, config=config(10)), make_point(1, 1.5, 0.02, config=config(11))
    write(tmp_path, [feasible], LIMIT, {})
    assert not write(tmp_path, [bad], LIMIT, {})
    assert {path.name for path in tmp_path.iterdir()} == {"least_bad_config.json", "least_bad_configs.json"}
    write(tmp_path, [feasible, bad], LIMIT, {})
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
        read(tmp_path / "file.json")

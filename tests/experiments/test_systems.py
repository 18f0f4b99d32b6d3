"""`05_systems_analysis.py` as a user runs it."""

import json

import pytest

from profiling import components, points
from profiling.points import Task
from varjax import VARConfig

UNSEEN = [(2, 8), (2, 1, 8), (4, 1, 12)]


@pytest.fixture
def few_calls(monkeypatch):
    shapes = [(1, 8), (2, 8), (2, 16), (4, 12), (1, 1, 8), (2, 1, 8), (4, 1, 12)]
    few = [Task(*shape, calibrates=True) for shape in shapes] + [Task(*shape, policy="one") for shape in UNSEEN]
    few += [Task(3, 12, policy="none", calibrates=True), Task(2, 12, policy="answers, one", calibrates=True)]
    monkeypatch.setattr(points, "tasks", lambda quick: few)
    monkeypatch.setattr(components, "TURN", 0.001)


def test_without_a_policy_the_plain_model_is_analyzed(script, common, few_calls, tmp_path, monkeypatch, capsys):
    """With a policy: `tests/test_commands_of_record.py`."""
    monkeypatch.chdir(tmp_path)  # where there is no results/
    words = (*common, "--split", "all", "--num_samples", 40, "--quick", "--trace", "--output", "run.1")
    script("05_systems_analysis.py", *words)
    printed = capsys.readouterr().out
    assert "no config is named, and none of results/phase3/best_config.json" in printed
    assert "[4/4] bottlenecks" in printed and "Where the time of a call goes" in printed
    output = tmp_path / "run.1"  # a dot does not make it a file
    found = json.loads((output / "systems.json").read_text())
    assert "none, the plain model: 2.00 of 2 experts per token" in found["facts"]["policy"]
    assert {one["side"] for one in found["results"]["components"] + found["results"]["costs"]} == {"plain"}
    assert len(found["results"]["performance"]["unseen"]["each"]) == len(UNSEEN)
    assert [(one["speedup"], one["tiers"]) for one in found["results"]["evidence"]] == [(None, None)] * 2
    named = {one["name"] for one in found["results"]["bottlenecks"]}
    assert named <= {"dispatch-bound", "memory-bound", "poor scaling"}  # nothing about VAR
    assert len(list(output.glob("traces/plugins/profile/*/*.xplane.pb"))) == 2  # both phases


def test_what_cannot_be_analyzed_is_said(script, common, tmp_path):
    VARConfig().save(tmp_path / "config.json")
    with pytest.raises(SystemExit, match="it names no routing statistics; give --routing_stats"):
        script("05_systems_analysis.py", *common, "--split", "all", "--var_config", tmp_path / "config.json")

"""`05_systems_analysis.py` as a user runs it."""

import json

import pytest

from profiling import components, points
from profiling.points import Task
from varjax import VARConfig
from varjax.config import LayerPolicy
from varjax.tablefiles import TableFiles


@pytest.fixture
def policy(statistics, tmp_path):
    path = tmp_path / "policy.json"
    layer = LayerPolicy(experts_kept=1, ngram_orders=(1, 2), frequency_threshold=3, entropy_threshold=5.0)
    VARConfig(default=layer, cache_size=0).save(path, TableFiles.find(statistics))
    return path


UNSEEN = [(2, 8), (2, 1, 8), (4, 1, 12)]


@pytest.fixture
def few_calls(monkeypatch):
    shapes = [(1, 8), (2, 8), (2, 16), (4, 12), (1, 1, 8), (2, 1, 8), (4, 1, 12)]
    few = [Task(*shape, calibrates=True) for shape in shapes] + [Task(*shape, policy="one") for shape in UNSEEN]
    few += [Task(3, 12, policy="none", calibrates=True), Task(2, 12, policy="answers, one", calibrates=True)]
    monkeypatch.setattr(points, "tasks", lambda quick: few)
    monkeypatch.setattr(components, "TURN", 0.001)


def test_a_policy_is_analyzed_and_its_traces_are_kept(script, common, policy, few_calls, tmp_path, capsys):
    output = tmp_path / "systems"
    script(
        "05_systems_analysis.py",
        *(*common, "--split", "all", "--num_samples", 40, "--var_config", policy, "--quick", "--trace"),
        *("--output", output),
    )
    printed = capsys.readouterr().out
    assert "[4/4] bottlenecks" in printed and "Where the time of a call goes" in printed
    found = json.loads((output / "systems.json").read_text())
    assert {one["side"] for one in found["results"]["components"]} == {"plain", "VAR"}
    assert len(found["results"]["performance"]["unseen"]["each"]) == len(UNSEEN)
    assert {one["phase"] for one in found["results"]["evidence"]} == {"prefill", "decode"}
    written = {path.name for path in output.iterdir()}
    assert {"systems.html", "systems.txt", "roofline.png", "components.pdf", "traces"} <= written
    assert len(list(output.glob("traces/plugins/profile/*/*.xplane.pb"))) == 4  # both sides of both phases


def test_without_a_policy_the_plain_model_is_analyzed(script, common, few_calls, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # where there is no results/
    script("05_systems_analysis.py", *common, "--split", "all", "--num_samples", 40, "--quick", "--output", "run.1")
    printed = capsys.readouterr().out
    assert "no config is named, and none of results/phase3/best_config.json" in printed
    found = json.loads((tmp_path / "run.1" / "systems.json").read_text())  # a dot does not make it a file
    assert "none, the plain model: 2.00 of 2 experts per token" in found["facts"]["policy"]
    assert {one["side"] for one in found["results"]["components"] + found["results"]["costs"]} == {"plain"}
    assert [(one["speedup"], one["tiers"]) for one in found["results"]["evidence"]] == [(None, None)] * 2
    named = {one["name"] for one in found["results"]["bottlenecks"]}
    assert named <= {"dispatch-bound", "memory-bound", "poor scaling"}  # nothing about VAR


def test_what_cannot_be_analyzed_is_said(script, common, tmp_path):
    VARConfig().save(tmp_path / "config.json")
    with pytest.raises(SystemExit, match="it names no routing statistics; give --routing_stats"):
        script("05_systems_analysis.py", *common, "--split", "all", "--var_config", tmp_path / "config.json")

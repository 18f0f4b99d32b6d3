"""`03_hyperparameter_optimization.py` as a user runs it."""

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import optuna
import pytest

from analysis.evaluate.losses import Caching
from analysis.evaluate.prices import Prices
from tuning import objective, study
from tuning.space import grid
from varjax import VARConfig
from varjax.tablefiles import TableFiles

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "03_hyperparameter_optimization.py"
# The tiny corpus is of frequent words and the tiny model's gate is never sure.
RANGES = ("--range", "frequency_threshold=2:20", "entropy_threshold=0.5:1.5", "cache_size=4:8", "loss_budget=0.001:0.1")


@pytest.fixture(scope="module")
def asked(common, statistics):
    return (*common, "--routing_stats", statistics, *RANGES)


SEARCH = ("--method", "tpe", "--n_calls", 2, "--limit", 0.2, "--speed", "model", "--seed", 7)


@pytest.fixture(scope="module")
def searched(script, asked, tmp_path_factory):
    """The output of a search."""
    output = tmp_path_factory.mktemp("searched")
    script(SCRIPT, *asked, *SEARCH, "--output", output)
    return output


def points_in(folder):
    return json.loads((folder / "tuning.json").read_text())["points"]


def test_a_search_writes_what_it_found_and_the_same_seed_finds_the_same(script, asked, searched, tmp_path, capsys):
    found = json.loads((searched / "tuning.json").read_text())
    assert len(found["points"]) == 2 and found["provenance"]["data"]["split"] == "tune"
    written = {path.name for path in searched.iterdir()}
    assert {"study.db", "tuning.html", "tuning.txt", "tuning_front.png", "best_config.json"} <= written
    script(SCRIPT, *asked, *SEARCH, "--output", searched)  # everything is there: nothing is searched again
    printed = capsys.readouterr().out
    assert "What did the search find?" in printed and "predicted speed-up" in printed
    script(SCRIPT, *asked, *SEARCH, "--output", tmp_path / "again")
    assert points_in(searched) == points_in(tmp_path / "again") == found["points"]


def test_what_a_search_found_is_validated_and_evaluated(script, asked, searched, tmp_path, capsys, monkeypatch):
    ratio = {"value": 1.1, "low": 1.0, "high": 1.2}  # tests/test_commands_of_record.py takes the time
    monkeypatch.setattr(objective, "measure", lambda *_, **__: {"speedup": {"prefill": ratio, "decode": ratio}})
    validation = ("--validate", searched / "best_configs.json", "--validate_repeats", 2, "--limit", 0.2)
    script(SCRIPT, *asked, *validation, "--output", tmp_path / "validated")
    assert "Does it hold on documents that the search never saw?" in capsys.readouterr().out
    said = json.loads((tmp_path / "validated" / "validation.json").read_text())["validation"]
    presets = [one["name"] for one in said["presets"]]
    assert presets == ["preset conservative", "preset balanced", "preset aggressive"]
    assert said["chosen"]["name"] in [one["name"] for one in said["candidates"]]
    assert {len(one["repeats"]) for one in (said["chosen"], *said["presets"])} == {2}

    best = ("--mode", "var", "--var_config", searched / "best_config.json", "--no_throughput")
    script("02_evaluate_var.py", *asked[:8], *best, "--output", tmp_path / "e.json")
    assert json.loads((tmp_path / "e.json").read_text())["tokens"] > 0


def test_the_space_and_its_points_look_at_the_same_orders(monkeypatch):
    """Phase 1 may collect answers of fewer orders than statistics."""
    module = importlib.import_module("experiments.03_hyperparameter_optimization")
    document = SimpleNamespace(ids=np.zeros(2000, np.int32))
    stats, answers = SimpleNamespace(ngram_orders=(1, 2, 3), num_experts=8), SimpleNamespace(useful_orders=(2, 3))
    subject = SimpleNamespace(stats=stats, answers=answers, config=VARConfig(), digest="", documents=[document])
    vars(subject).update(caching=Caching(), max_length=16, stride=None, table_sha256="")
    monkeypatch.setattr(module, "_subject", lambda *_: (subject, TableFiles("s.parquet"), {}))
    prices = Prices((0,), np.ones(1), np.linspace(0.001, 1, 100)[None], np.ones(1))
    monkeypatch.setattr(module.Objective, "prices", prices)
    monkeypatch.setattr(module.Objective, "evaluate", lambda _, config: config)
    judged = {"speed": "model", "phases": ["prefill"], "repeats": 1, "confidence": 0.9, "limit": 0.1}
    asked = {"num_samples": 1, "ranges": [], "parameters": None, "method": "tpe", "seed": 0}
    judge = module._Setting.of(argparse.Namespace(**judged, **asked)).objective
    shortest = judge.attempt(optuna.trial.FixedTrial(grid(judge.space, 2)[0]))
    assert [layer.ngram_orders for layer in dict(shortest.outcome.layers).values()] == [(2,)]


def test_an_empty_feasible_set_writes_the_least_bad_and_says_so(script, asked, tmp_path, capsys):
    """What costs something on this model is the cached tier; its documents are too short for one of their own."""
    search = (*asked, "--method", "random", "--n_calls", 2, "--speed", "model", "--limit", 1e-9, "--shared_cache")
    with pytest.raises(SystemExit) as stop:
        script(SCRIPT, *search, "--parameters", "loss_budget", "--output", tmp_path / "out")
    assert str(stop.value).startswith("error: none of 2 trials is within +0.00%") and "--limit" in str(stop.value)
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert "least_bad_configs.json" in written and "best_config.json" not in written
    assert "none of 2 trials is within" in (tmp_path / "out" / "tuning.txt").read_text()


def test_two_workers_share_a_grid(asked, tmp_path):
    """Started as a program: a worker begins by importing it."""
    parameters = ("--method", "grid", "--grid_points", 2, "--parameters", "frequency_threshold", "loss_budget")
    command = (sys.executable, ROOT / "experiments" / SCRIPT, *asked, *parameters, "--workers", 2, "--speed", "model")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [*map(str, command), "--limit", "0.2", "--output", str(tmp_path / "out")],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads((tmp_path / "out" / "tuning.json").read_text())["points"]
    assert len({json.dumps(point["values"]) for point in found}) == len(found) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--range", "los_budget=0:1"), "no parameter is called 'los_budget'; did you mean 'loss_budget'?"),
        (("--parameters", "zzz"), "no parameter is called 'zzz'"),
        (("--storage", "nodb://host"), "--storage nodb://host"),
        (("--method", "grid", "--n_calls", 5), "more than --n_calls 5"),
        (("--n_calls", 0), "--n_calls 0: expected at least 1"),
        (("--validate", "no_such_file.json"), "no_such_file.json"),
        (("--routing_stats", "no_such_file.parquet"), "no_such_file.parquet"),
    ],
)
def test_bad_input_ends_in_one_message(script, asked, tmp_path, arguments, message):
    with pytest.raises(SystemExit) as stop:
        script(SCRIPT, *asked, "--output", tmp_path / "out", *arguments)
    assert str(stop.value).startswith("error: ") and message in str(stop.value)
    assert not list((tmp_path / "out").glob("*config*")) if (tmp_path / "out").exists() else True


def test_bayesian_search_without_torch_stops_before_any_work(script, asked, tmp_path, monkeypatch):
    monkeypatch.setattr(study.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"varjax\[gp\]"):
        script(SCRIPT, *asked, "--method", "bayesian", "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_statistics_that_are_not_named_are_those_of_the_configs(tmp_path, monkeypatch, capsys):
    name_files = importlib.import_module("experiments.03_hyperparameter_optimization")._name_files
    monkeypatch.chdir(tmp_path)
    here, there = TableFiles("here.parquet"), TableFiles("there.parquet")
    VARConfig().save("config.json", there)

    def named(saved: TableFiles | None = None, var_config: str | None = None, given: Path | None = None) -> Path:
        args = argparse.Namespace(routing_stats=given, answers=None, var_config=var_config)
        name_files(args, saved)
        return args.routing_stats

    assert named(here) == Path("here.parquet") and named(here, given=Path("mine")) == Path("mine")
    assert named(there, "config.json") == named(None, "config.json") == Path("there.parquet")
    with pytest.raises(ValueError, match=r"different statistics or answers \(here\.parquet, there\.parquet\)"):
        named(here, "config.json")
    with pytest.raises(ValueError, match="no routing statistics are named"):
        named()
    Path("results/phase1").mkdir(parents=True)
    Path("results/phase1/routing_stats.parquet").touch()
    assert named() == Path("results/phase1/routing_stats.parquet")
    assert "since none is named" in capsys.readouterr().out

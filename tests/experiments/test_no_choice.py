"""Models whose router chooses nothing, through all phases: one expert per layer, and as many experts as are run.

The reports of the first one all fail at first. The same commands then make them without measuring anything again.
"""

import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import pytest

import analysis.collect.run
import analysis.evaluate.losses
import analysis.evaluate.policy_search
import analysis.evaluate.report
import analysis.report.files
import analysis.traces.recording
import tuning.objective
import tuning.report
from models import MoEConfig
from models.parameters import init_params
from models.weights import save_params
from profiling import bottlenecks, ceilings, components, performance_model, points, xla
from profiling.points import Task
from tests.running import run_python

SHAPES = ((1, 8), (2, 8), (2, 16), (4, 12), (1, 1, 8), (2, 1, 8), (4, 1, 12))
TASKS = [Task(*shape, calibrates=True) for shape in SHAPES] + [Task(2, 1, 8, policy="one")]
TASKS += [Task(3, 12, policy="none", calibrates=True), Task(2, 12, policy="answers, one", calibrates=True)]
Place = tuple[Any, str]  # of a function: its module or class, and its name


def fails(*_: Any, **__: Any) -> Any:
    raise ZeroDivisionError("float division by zero")


def save_model(folder: Path, experts: int, top_k: int, tokenizer: Path) -> Path:
    shape = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 16, "num_layers": 2}
    heads = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
    config = MoEConfig(**shape, **heads, num_experts=experts, top_k=top_k, initializer_range=0.3)
    save_params(folder, init_params(config, jax.random.key(0)), config)
    for path in tokenizer.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


class Phases:
    """The commands of phases 1 to 5 on one model, and the folder that they write to."""

    def __init__(self, script: Any, model: Path, corpus: Path, output: Path, reports_fail: bool):
        self.common = ("--model", model, "--dataset", corpus, "--max_length", 32, "--batch_size", 8)
        self.script, self.output, self.reports_fail = script, output, reports_fail
        self.failures: list[str] = []  # what was said where a report failed

    def run(self, name: str, arguments: Sequence[object], report: Place, measured: Sequence[Place]) -> None:
        """Run a script; first with a `report` that fails, if asked for, and then without what `measured`."""
        with pytest.MonkeyPatch.context() as patch:
            if self.reports_fail:
                with pytest.MonkeyPatch.context() as failing:
                    failing.setattr(*report, fails)
                    with pytest.raises(ZeroDivisionError) as error:
                        self.script(name, *self.common, *arguments)
                self.failures.append(" ".join(error.value.__notes__))
                for place in measured:
                    patch.setattr(*place, fails)
            self.script(name, *self.common, *arguments)

    def first(self) -> None:
        """Run phase 1 and test the hypotheses."""
        output = self.output
        measured = [(analysis.collect.run, name) for name in ("choose_keys", "collect", "collect_answers")]
        small = ("--num_samples", 60, "--orders", 1, 2, "--min_count", 3, "--output", output)
        summary = (analysis.report.files, "text")
        self.run("01_routing_analysis.py", small, summary, [*measured, (analysis.traces.recording, "record")])
        few = ("--permutations", 19, "--samples", 20, "--orders", 1, 2)
        run_python(["-m", "analysis.hypothesis_validation", *map(str, ("--input", output, "--output", output, *few))])

    def second_and_third(self) -> None:
        """Evaluate, compare, certify and search."""
        output, stats = self.output, self.output / "routing_stats.parquet"
        report = (analysis.evaluate.report, "report")
        measured = [(analysis.evaluate.losses, "score"), (analysis.evaluate.policy_search, "search")]
        sides = [output / "baseline.json", output / "var.json"]
        scored = ("--split", "calibrate", "--num_samples", 24, "--no_throughput")
        self.run("02_evaluate_var.py", (*scored, "--mode", "baseline", "--output", sides[0]), report, measured)
        policy = ("--mode", "var", "--routing_stats", stats, "--search_policy", "--tune_samples", 8, "--budget", 0.02)
        self.run("02_evaluate_var.py", (*scored, *policy, "--output", sides[1]), report, measured)
        self.script("02_evaluate_var.py", "--compare", *sides, "--output", output / "comparison.json")
        self.script("02_evaluate_var.py", "--certify", *sides, "--output", output / "certificate.json")

        search = ("--routing_stats", stats, "--n_calls", 2, "--limit", 0.2, "--speed", "model", "--num_samples", 8)
        report, measured = (tuning.report, "report"), [(tuning.objective, "score")]
        self.run("03_hyperparameter_optimization.py", (*search, "--output", output / "tuned"), report, measured)


@pytest.fixture(scope="module")
def one_expert(script, model_directory, even_corpus, tmp_path_factory) -> Phases:
    """Phases 1 to 3 of a model with one expert per layer, of which every report fails once."""
    folder = tmp_path_factory.mktemp("one_expert")
    model = save_model(folder / "model", 1, 1, model_directory)
    phases = Phases(script, model, even_corpus, folder / "results", reports_fail=True)
    phases.first()
    phases.second_and_third()
    return phases


@pytest.fixture(scope="module")
def all_experts(script, model_directory, even_corpus, tmp_path_factory) -> Phases:
    """Phase 1 of a model that runs its two experts for every token."""
    folder = tmp_path_factory.mktemp("all_experts")
    model = save_model(folder / "model", 2, 2, model_directory)
    phases = Phases(script, model, even_corpus, folder / "results", reports_fail=False)
    phases.first()
    return phases


def verdicts(phases: Phases, name: str) -> dict[str, str]:
    sections = json.loads((phases.output / name).read_text())["sections"]
    return {name: one["verdict"] for name, one in sections.items()}


def test_questions_about_routing_say_that_there_is_none(one_expert):
    found = verdicts(one_expert, "hypotheses.json")
    assert found.pop("zipf") == "reported" and set(found.values()) == {"not testable"} and len(found) == 10
    for name in ("hypotheses.txt", "routing_summary.txt"):
        said = (one_expert.output / name).read_text()
        assert "every layer has one expert, which every token runs: there is no routing in this model" in said
        assert "nan" not in said


def test_questions_about_the_selection_say_that_there_is_none(all_experts):
    found = verdicts(all_experts, "hypotheses.json")
    not_testable = {name for name, verdict in found.items() if verdict == "not testable"}
    assert {"load", "co_activation"} <= not_testable and "predictability" not in not_testable
    said = (all_experts.output / "hypotheses.txt").read_text()
    assert "every token runs all 2 experts of a layer: the router selects none" in said
    assert "recall" not in said and "agreement" in said  # the first choice is one


@pytest.mark.parametrize("model", ["one_expert", pytest.param("all_experts", marks=pytest.mark.slow)])
def test_answers_take_the_place_of_experts(model, request):
    phases = request.getfixturevalue(model)
    if model == "all_experts":
        phases.second_and_third()
    plain, var = (json.loads((phases.output / f"{name}.json").read_text()) for name in ("baseline", "var"))
    assert 0 <= var["experts_per_token"] < plain["experts_per_token"]
    assert (var["tiers"]["fast"] > 0.5 and var["mispredictions"] == 0) or model == "all_experts"
    assert verdicts(phases, "comparison.json")["side_by_side"] == "reported"
    assert verdicts(phases, "certificate.json")["certificate"] in ("PASS", "FAIL")
    assert len(json.loads((phases.output / "tuned" / "tuning.json").read_text())["points"]) == 2
    assert (phases.output / "tuned" / "best_config.json").is_file()


def test_reports_that_fail_cost_nothing_but_the_report(one_expert):
    """The second run of each command could not measure anything."""
    assert len(one_expert.failures) == 4
    results = ("routing_stats.parquet", "baseline.json", "var.json", "tuning.json")
    for said, name in zip(one_expert.failures, results, strict=True):
        assert f"{name}; only their report was not made" in said
    assert not list(one_expert.output.glob("*_steps")) and not (one_expert.output / "routing_checkpoints").exists()


@pytest.mark.slow
def test_phase_five_describes_one_expert(one_expert):
    measured = [(components, "measure_sides"), (performance_model, "study"), (bottlenecks, "gather")]
    measured += [(xla, "costs"), (xla, "memory")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(points, "tasks", lambda quick: TASKS)
        patch.setattr(components, "TURN", 0.001)
        patch.setattr(ceilings, "measure", partial(ceilings.measure, repeats=2))
        few = ("--quick", "--split", "all", "--num_samples", 20, "--output", one_expert.output / "systems.json")
        policy = ("--var_config", one_expert.output / "var.var_config.json")
        one_expert.run("05_systems_analysis.py", (*few, *policy), (components, "section"), measured)
    assert "systems.json; only their report was not made" in one_expert.failures.pop()
    found = json.loads((one_expert.output / "systems.json").read_text())
    assert "of 1 experts per token" in found["facts"]["policy"]
    assert found["results"]["bottlenecks"] is not None and len(found["results"]["costs"]) == 4

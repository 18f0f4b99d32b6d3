"""Models whose router chooses nothing, through all phases: one expert per layer, and as many experts as are run."""

import shutil
from pathlib import Path

import jax
import pytest

from models import MoEConfig
from models.parameters import init_params
from models.weights import save_params
from profiling import components, points
from profiling.points import Task
from tests.running import run_python

SHAPES = ((1, 8), (2, 8), (2, 16), (4, 12), (1, 1, 8), (2, 1, 8), (4, 1, 12))
TASKS = [Task(*shape, calibrates=True) for shape in SHAPES] + [Task(2, 1, 8, policy="one")]
TASKS += [Task(3, 12, policy="none", calibrates=True), Task(2, 12, policy="answers, one", calibrates=True)]


@pytest.fixture(scope="module", params=[(1, 1), (2, 2)], ids=["one expert", "all experts"])
def phases(request, script, model_directory, even_corpus, tmp_path_factory) -> Path:
    """The outputs of phases 1 and 2 of a tiny model with E and K experts."""
    experts, top_k = request.param
    folder = tmp_path_factory.mktemp("no_choice")
    model, output = folder / "model", folder / "results"
    shape = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 16, "num_layers": 2}
    heads = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
    config = MoEConfig(**shape, **heads, num_experts=experts, top_k=top_k, initializer_range=0.3)
    save_params(model, init_params(config, jax.random.key(0)), config)
    for path in model_directory.glob("tokenizer*"):
        shutil.copy(path, model)
    common = ("--model", model, "--dataset", even_corpus, "--max_length", 32, "--batch_size", 8)
    script("01_routing_analysis.py", *common, "--output", output, "--min_count", 3)
    few = ("--permutations", 19, "--samples", 20)
    run_python(["-m", "analysis.hypothesis_validation", *map(str, ("--input", output, "--output", output, *few))])
    evaluate = (*common, "--no_throughput", "--split", "calibrate")
    stats = output / "routing_stats.parquet"
    script("02_evaluate_var.py", *evaluate, "--mode", "baseline", "--output", output / "baseline.json")
    searching = ("--mode", "var", "--routing_stats", stats, "--search_policy", "--tune_samples", 10, "--budget", 0.02)
    script("02_evaluate_var.py", *evaluate, *searching, "--output", output / "var.json")
    sides = (output / "baseline.json", output / "var.json")
    script("02_evaluate_var.py", "--compare", *sides, "--output", output / "comparison.json")
    script("02_evaluate_var.py", "--certify", *sides, "--output", output / "certificate.json")
    search = ("--routing_stats", stats, "--n_calls", 2, "--limit", 0.2, "--speed", "model", "--num_samples", 10)
    script("03_hyperparameter_optimization.py", *common, *search, "--output", output / "tuned")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(points, "tasks", lambda quick: TASKS)
        patch.setattr(components, "TURN", 0.001)
        policy = ("--var_config", output / "var.var_config.json", "--quick", "--split", "all", "--num_samples", 20)
        script("05_systems_analysis.py", *common, *policy, "--output", output / "systems.json")
    return output


def test_all(phases):
    print((phases / "hypotheses.txt").read_text())
    print((phases / "routing_summary.txt").read_text())

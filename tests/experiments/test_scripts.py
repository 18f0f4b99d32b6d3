"""The phase scripts as a user runs them: in order, on a tiny model, and with what users get wrong."""

import argparse
import dataclasses
import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from analysis.command import run
from experiments.arguments import asked_config
from models.parameters import init_params
from models.weights import save_params
from tests.analysis.evaluate.test_comparison import write_result
from tuning.objective import upper_limit
from varjax import VARConfig, answersfile
from varjax.checksums import read_json
from varjax.routing import top_k
from varjax.tablefiles import TableFiles, answers_next_to, saved_files

SCRIPTS = Path(__file__).resolve().parents[2] / "experiments"


@pytest.fixture(scope="module")
def many_experts(model_directory, saved_model, tmp_path_factory) -> Path:
    """Four experts of six for a token, unlike Mixtral's two, and a layer without experts between two with some."""
    folder = tmp_path_factory.mktemp("many_experts")
    other = {"query_key_norm": "head", "normalize_top_k": False, "dense_layers": (1,), "dense_size": 20}
    config = dataclasses.replace(saved_model.config, family="qwen3_moe", num_experts=6, top_k=4, **other)
    save_params(folder, init_params(config, jax.random.key(0)), config)
    for path in model_directory.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


def test_phases_one_and_two(script, many_experts, even_corpus, tmp_path, capsys):
    """The other tests of scripts run on a Mixtral."""
    common = ("--model", many_experts, "--dataset", even_corpus, "--max_length", 32, "--batch_size", 4)
    script("01_routing_analysis.py", *common, "--output", tmp_path, "--min_count", 3, "--answer_rank", 4)
    assert answersfile.read(tmp_path / "routing_stats.answers.safetensors")[0].maps.rank == 4
    stats = tmp_path / "routing_stats.parquet"
    written = {path.name for path in tmp_path.iterdir()}
    assert {"routing_stats.parquet", "routing_stats.answers.safetensors", "frequency_entropy.pdf"} <= written
    assert "routing_trace.parquet" in written and "routing_checkpoints" not in written

    evaluate = (*common, "--split", "all", "--repeats", 2)
    script("02_evaluate_var.py", *evaluate, "--mode", "baseline", "--output", tmp_path / "baseline.json")
    script(
        "02_evaluate_var.py",
        *(*evaluate, "--mode", "var", "--routing_stats", stats, "--search_policy", "--nearness"),
        *("--output", tmp_path / "var.json"),
    )
    baseline, var = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("baseline", "var"))
    assert sum(var["tiers"].values()) == pytest.approx(1)
    assert 0 <= var["experts_per_token"] < baseline["experts_per_token"] == 4
    assert len(var["layers"]) == 2
    assert var["nearness"]["divergence"]["value"] > 0 and var["nearness"]["tokens"] == var["tokens"]
    assert var["tokens"] == baseline["tokens"]
    for phase in ("prefill", "decode"):
        assert var["throughput"][f"{phase}_tokens_per_second"] > 0
    assert var["provenance"]["model"]["fingerprint"] == baseline["provenance"]["model"]["fingerprint"]
    assert saved_files(tmp_path / "var.var_config.json").routing_stats == str(stats)

    capsys.readouterr()
    script(
        "02_evaluate_var.py",
        *("--compare", tmp_path / "baseline.json", tmp_path / "var.json", "--output", tmp_path / "comparison.json"),
    )
    assert "Perplexity degradation" in capsys.readouterr().out
    assert json.loads((tmp_path / "comparison.json").read_text())["documents"] == baseline["documents"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--mode", "baseline", "--model", "no/such/directory"), "neither a directory nor a hub id"),
        (("--mode", "baseline", "--dataset", "no_such_file.txt"), "no_such_file.txt"),
        (("--mode", "var", "--routing_stats", "no_such_file.parquet"), "no_such_file.parquet"),
        (("--compare", "no_such_a.json", "no_such_b.json"), "no_such_a.json does not exist"),
    ],
)
def test_bad_input_ends_in_one_message(script, model_directory, corpus_file, tmp_path, arguments, message):
    defaults = ("--model", model_directory, "--dataset", corpus_file, "--output", tmp_path / "out.json")
    with pytest.raises(SystemExit) as stop:
        script("02_evaluate_var.py", *defaults, *arguments)
    assert message in str(stop.value) and str(stop.value).startswith("error: ")
    assert not list(tmp_path.iterdir())  # nothing half written


def test_the_limit_is_that_of_a_certificate_too(script, tmp_path):
    nll, made = np.full(100, 300.0), {"model": {"fingerprint": "m"}, "config_sha256": "c", "data": {"split": "test"}}
    sides = [write_result(tmp_path, name, nll + 2 * (name == "var"), provenance=made) for name in ("baseline", "var")]
    for limit, verdict in ((0.01, "FAIL"), (0.05, "PASS")):
        script("02_evaluate_var.py", "--certify", *sides, "--limit", limit, "--output", tmp_path / "c.json")
        found = read_json(tmp_path / "c.json", "certify again")
        assert math.expm1(found["certificate"]["limit"]) == pytest.approx(limit)
        assert found["sections"]["certificate"]["verdict"] == verdict
    with pytest.raises(SystemExit):
        script("02_evaluate_var.py", "--certify", *sides, "--limit", -1)


def test_only_what_is_refused_is_said_in_short():
    with pytest.raises(SystemExit, match="error: no preset is called 'bold'"):
        run(lambda: VARConfig.preset("bold"))
    with pytest.raises(ValueError, match="could not be broadcast together"):  # NumPy's
        run(lambda: upper_limit(np.ones(2), np.ones(3), 0.95))
    with pytest.raises(ValueError, match="k argument to top_k must be no larger"):  # JAX's
        run(lambda: top_k(jnp.zeros((2, 3)), 5))


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("moved", [True, False])
def test_answers_are_asked_for_with_and_without_a_config_and_statistics(statistics, tmp_path, saved, moved):
    config, answers = tmp_path / "config.json", shutil.copy(answers_next_to(statistics), tmp_path / "own.safetensors")
    VARConfig(cache_size=7).save(config, TableFiles("elsewhere.parquet" if moved else str(statistics), "gone"))
    named = {"var_config": config if saved else None, "routing_stats": statistics if moved or not saved else None}
    asked, files = asked_config(argparse.Namespace(**named, answers=answers), cache_size=5)
    assert asked == VARConfig(cache_size=7 if saved else 5)
    assert files == TableFiles(str(statistics), str(answers))
    if saved:
        by_itself = argparse.Namespace(**named, answers=None)
        if moved:  # the answers that the config names are not there either: those next to the statistics
            assert asked_config(by_itself)[1].answers == str(answers_next_to(statistics))
        else:
            with pytest.raises(FileNotFoundError, match=r"config\.json: it names gone, which is not there"):
                asked_config(by_itself)


@pytest.mark.parametrize("name", sorted(path.name for path in SCRIPTS.glob("[0-9]*.py")))
def test_help(script, name, capsys):
    with pytest.raises(SystemExit) as stop:
        script(name, "--help")
    assert stop.value.code == 0
    assert "--output" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--mode", "var", "--questions", "alternatives"), "--questions is for --mode study"),
        (("--mode", "study", "--questions", "throughput", "--no_throughput"), "contradict each other"),
        (("--mode", "study", "--prompts", 0), "--prompts 0: expected at least 1"),
        (("--mode", "baseline", "--search_policy"), "--mode baseline is the plain model; --search_policy"),
    ],
)
def test_options_that_contradict_each_other_are_refused(script, capsys, words, said):
    with pytest.raises(SystemExit):
        script("02_evaluate_var.py", *words)
    assert said in capsys.readouterr().err

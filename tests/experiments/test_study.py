"""`02_evaluate_var.py --mode study` as a user runs it."""

import json

import pytest

from varjax import VARConfig
from varjax.config import LayerPolicy


@pytest.fixture
def common(model_directory, corpus_file):
    return ("--model", model_directory, "--dataset", corpus_file, "--max_length", 16, "--batch_size", 4)


def test_a_study_of_a_policy(script, common, tmp_path, capsys):
    reading = (*common, "--split", "all", "--num_samples", 60)
    script("01_routing_analysis.py", *reading, "--output", tmp_path, "--min_count", 3, "--trace_tokens", 0)
    policy = LayerPolicy(kept=None, tolerance=0.2, orders=(1, 2), frequency_threshold=4, entropy_threshold=2.0)
    VARConfig(default=policy, cache_size=0).save(tmp_path / "policy.json")
    command = ("02_evaluate_var.py", *common, "--split", "all", "--num_samples", 20, "--mode", "study")
    command += ("--routing_stats", tmp_path / "routing_stats.parquet", "--var_config", tmp_path / "policy.json")
    capsys.readouterr()
    script(*command, "--output", tmp_path / "study")
    printed = capsys.readouterr().out
    saved = json.loads((tmp_path / "study" / "study.json").read_text())
    assert set(saved["results"]) == {"alternatives", "table_size"} == set(saved["sections"])
    for section in saved["sections"].values():
        assert section["title"] in printed and section["outcome"] in printed
        assert all((tmp_path / "study" / f"{name}.pdf").is_file() for name in section["figures"])
    assert saved["provenance"]["config"]["layers"] == [] and saved["provenance"]["data"]
    assert "data:image/png" in (tmp_path / "study" / "study.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--routing_stats", "s.parquet"), "--mode study needs --routing_stats, and --var_config or --search_policy"),
        (("--routing_stats", "s.parquet", "--var_config", "c.json", "--output", "a.json"), "writes a folder"),
    ],
)
def test_what_a_study_lacks_is_said(script, common, capsys, arguments, message):
    with pytest.raises(SystemExit):
        script("02_evaluate_var.py", *common, "--mode", "study", *arguments)
    assert message in capsys.readouterr().err

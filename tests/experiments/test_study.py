"""`02_evaluate_var.py --mode study` as a user runs it."""

import json

import pytest

from analysis.questions import registry
from analysis.questions.question import Finding, Question
from analysis.report.report import Section
from varjax import VARConfig
from varjax.config import LayerPolicy


def test_a_study_asks_about_the_policy_and_the_documents_that_were_given(
    script, common, statistics, tmp_path, capsys, monkeypatch
):
    asked = []

    def ask(subject) -> Finding:
        asked.append(subject)
        return Finding((Section("asked", "What is asked", "reported", "it depends"),))

    questions = (Question("asked", "What is asked", ask), Question("left_out", "What is not asked", ask))
    monkeypatch.setattr(registry, "STUDY_QUESTIONS", questions)
    policy = LayerPolicy(
        experts_kept=None, tolerance=0.2, ngram_orders=(1, 2), frequency_threshold=4, entropy_threshold=2.0
    )
    VARConfig(default=policy, cache_size=0).save(tmp_path / "policy.json")
    command = (
        "02_evaluate_var.py",
        *common,
        *("--mode", "study", "--split", "all", "--num_samples", 20),
        *("--questions", "asked", "throughput", "--no_throughput"),
    )
    command += ("--routing_stats", statistics, "--var_config", tmp_path / "policy.json")
    script(*command, "--output", tmp_path / "study")
    printed = capsys.readouterr().out
    (subject,) = asked
    assert len(subject.documents) == 20 and (subject.batch_size, subject.max_length) == (4, 32)
    assert subject.config.policy(1).tolerance == 0.2 and subject.answers.layers == (0, 1)
    assert subject.folder == tmp_path / "study" / "losses"
    assert "What is asked" in printed and "it depends" in printed
    saved = json.loads((tmp_path / "study" / "study.json").read_text())
    assert saved["provenance"]["table"]["routing_stats"] == str(statistics) and saved["provenance"]["data"]
    assert (tmp_path / "study" / "study.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--routing_stats", "s.parquet"), "--mode study needs a policy: give --var_config or --search_policy"),
        (("--routing_stats", "s.parquet", "--var_config", "c.json", "--output", "a.json"), "give a directory"),
    ],
)
def test_what_a_study_lacks_is_said(script, common, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)  # where there is no results/
    with pytest.raises(SystemExit) as stop:
        script("02_evaluate_var.py", *common, "--mode", "study", *arguments)
    assert str(stop.value).startswith("error: ") and message in str(stop.value)

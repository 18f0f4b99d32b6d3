"""The frontier benchmark, from files to its table, and resumed."""

import json

import pytest

from analysis.collect.answers import collect_answers
from analysis.collect.maps import with_maps
from analysis.collect.statistics import KeySettings, choose_keys, collect
from benchmarks import frontier
from varjax import VARConfig, answersfile, statsfile

READING = {"batch_size": 20, "max_length": 16, "progress": False}


@pytest.fixture(scope="module")
def files(saved_model, even_documents, tmp_path_factory):
    """Statistics, and affine answers."""
    folder = tmp_path_factory.mktemp("files")
    known, others = even_documents[:-40], even_documents[-40:-20]
    stats = collect(saved_model, known, choose_keys(saved_model, known, 16, KeySettings((1,), min_count=3)), **READING)
    statsfile.write(folder / "stats.parquet", stats, {"fingerprint": saved_model.fingerprint, "top_k": 2})
    constant = collect_answers(saved_model, known, stats.keys, range(2), inputs=True, **READING)
    affine = with_maps(saved_model, constant, known, others, 4, 1.0, **READING)
    meta = {"statistics": statsfile.identity(folder / "stats.parquet"), "fingerprint": saved_model.fingerprint}
    answersfile.write(folder / "affine.safetensors", affine, meta)
    return folder


@pytest.mark.slow
def test_the_frontier_on_two_texts(files, model_directory, tmp_path, monkeypatch, capsys):
    text = tmp_path / "own.txt"
    text.write_text("The array is sorted.\n<|endofdoc|>\nReturn the sorted array of values.\n")
    asked = ["--model", str(model_directory), "--routing_stats", str(files / "stats.parquet"), "--answers"]
    asked += [
        str(files / "affine.safetensors"),
        "--budgets",
        "0.02",
        "--tune_samples",
        "3",
        "--num_samples",
        "2",
        "--texts",
        f"own={text}",
    ]
    asked += ["--max_length", "32", "--output", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr(frontier, "_report", None)  # a fault in the report
        with pytest.raises(TypeError):
            frontier.main(asked)
    for name in ("nearness", "search"):
        monkeypatch.setattr(frontier, name, lambda *_, **__: pytest.fail("it was measured already"))
    frontier.main(asked)
    assert VARConfig.load(tmp_path / "out" / "affine-0.02.var_config.json").policy(0) is not None
    rows = json.loads((tmp_path / "out" / "frontier.json").read_text())["rows"]
    assert [(row["answers"], row["text"]) for row in rows] == [("affine", "test"), ("affine", "own")]
    assert all(0 <= row["saved"] <= 1 and row["divergence"] >= 0 and 0 <= row["agreement"] <= 1 for row in rows)
    assert "work saved" in capsys.readouterr().out


def test_a_text_needs_a_name_of_its_own(files, model_directory, tmp_path, capsys):
    asked = ["--model", str(model_directory), "--routing_stats", str(files / "stats.parquet")]
    asked += ["--answers", str(files / "affine.safetensors"), "--output", str(tmp_path / "out"), "--texts", "test=x"]
    asked += ["--tune_samples", "1", "--num_samples", "1"]
    with pytest.raises(SystemExit) as stop:
        frontier.main(asked)
    assert "--texts test=x: expected NAME=DATASET" in str(stop.value)


def test_files_of_answers_need_names_of_their_own(tmp_path, capsys):
    paths = [str(tmp_path / folder / "routing_stats.answers.safetensors") for folder in "ab"]
    asked = ["--model", "reference", "--routing_stats", "s.parquet", "--answers", *paths]
    with pytest.raises(SystemExit):
        frontier.main(asked)
    assert "two files have the same name" in capsys.readouterr().err

"""The calculator's answers, and what it says to wrong questions."""

import dataclasses
import json
import re
import sys

import pytest

from models.config import config_to_hf
from profiling import calculator
from profiling.calculator import _estimate, _needed_memory, _where_it_vanishes
from profiling.costs import Workload
from profiling.published import HARDWARE, PUBLISHED

MIXTRAL_8X7B = PUBLISHED["mixtral-8x7b"]


def run(monkeypatch, capsys, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["calculator", *arguments])
    calculator.main()
    return capsys.readouterr().out


def refused(monkeypatch, capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, capsys, *arguments)
    return f"{stop.value} {capsys.readouterr().err}"


def test_mixtral_on_an_h200_as_measured(monkeypatch, capsys):
    said = run(monkeypatch, capsys, "--model", "mixtral-8x7b", "--hardware", "h200-measured", "--experts", "1.0")
    assert "46.7 billion parameters" in said and "(measured: " in said
    assert re.search(r"decode, batch 1, 1,024 keys +168 +299 +1\.78x", said)
    assert re.search(r"^ +8 +404 +544 +1\.35x +7\.20 / 5\.25 +94 GB$", said, re.MULTILINE)
    assert re.search(r"^ +512 .*does not fit$", said, re.MULTILINE)
    assert "Decoding gains less than 5% at batch 32 to 512" in said
    assert "This is a ceiling, not a forecast:" in said


def test_a_model_is_a_directory_a_file_or_a_name(monkeypatch, capsys, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config_to_hf(dataclasses.replace(MIXTRAL_8X7B, num_layers=16), "bfloat16")))
    rest = ("--hardware", "H100", "--experts", "0.5", "--batch", "4")
    answers = [run(monkeypatch, capsys, "--model", str(model), *rest) for model in (tmp_path, path)]
    assert [answer.split(": ", 1)[1] for answer in answers] == [answers[0].split(": ", 1)[1]] * 2
    assert "23.5 billion" in answers[0]
    assert "0.0126 billion" in run(monkeypatch, capsys, "--model", "reference", *rest)


def test_an_accelerator_that_is_not_in_the_table_can_be_described(monkeypatch, capsys):
    known = HARDWARE["l40s"]
    described = ("--tflops", "362.05", "--bandwidth", "0.864", "--memory", "48", "--dtype", "bfloat16")
    model = ("--model", "reference", "--experts", "1")
    by_name = run(monkeypatch, capsys, *model, "--hardware", "l40s")
    by_figures = run(monkeypatch, capsys, *model, *described)
    assert by_name.replace(known.source, "the command line").replace(known.name, "as given") == by_figures


def test_maps_of_answers_are_taken_off_the_gain(monkeypatch, capsys):
    given = ("--model", "mixtral-8x7b", "--hardware", "h200", "--experts", "1.0")
    said = {rank: run(monkeypatch, capsys, *given, "--answer_rank", rank) for rank in ("0", "64", "4096")}
    assert said["0"] == run(monkeypatch, capsys, *given)
    assert "looks up the rest, with maps of rank 64" in said["64"] and "maps" not in said["0"]
    workload = Workload(1, 1, 1023, itemsize=2)
    gains = [_estimate(MIXTRAL_8X7B, HARDWARE["h200"], workload, 1.0, answer_rank=rank) for rank in (0, 64, 4096)]
    assert gains[0].plain == gains[1].plain == gains[2].plain
    assert 0.97 * gains[0].speedup < gains[1].speedup < gains[0].speedup
    assert gains[2].speedup < 0.9 * gains[0].speedup
    assert "answer_rank=4097: expected 0 to this model's hidden size, 4096" in refused(
        monkeypatch, capsys, *given, "--answer_rank", "4097"
    )


def test_wrong_questions_are_told_the_fix(monkeypatch, capsys, tmp_path):
    mixtral, h200 = ("--model", "mixtral-8x7b"), ("--hardware", "h200")
    assert "this model runs 2 per token; give 0 to 2" in refused(monkeypatch, capsys, *mixtral, *h200, "--experts", "3")
    assert "choose one of a100" in refused(monkeypatch, capsys, *mixtral, "--hardware", "h300", "--experts", "1")
    partly = refused(monkeypatch, capsys, *mixtral, "--tflops", "9", "--dtype", "float32", "--experts", "1")
    assert "or also --bandwidth and --memory" in partly
    both = refused(monkeypatch, capsys, *mixtral, *h200, "--dtype", "float32", "--experts", "1")
    assert "leave these out, or --hardware" in both
    nowhere = refused(monkeypatch, capsys, "--model", str(tmp_path), *h200, "--experts", "1")
    assert "config.json; give a directory" in nowhere
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    strange = refused(monkeypatch, capsys, "--model", str(tmp_path), *h200, "--experts", "1")
    assert "only checkpoints of 'mixtral', 'olmoe', 'qwen3_moe' are supported" in strange
    given = ("--bandwidth", "fast", "--experts", "1")
    assert "fast: expected a positive number" in refused(monkeypatch, capsys, *mixtral, *given)
    assert "0: expected a positive integer" in refused(
        monkeypatch, capsys, *mixtral, *h200, "--experts", "1", "--batch", "0"
    )


def test_help_says_what_it_is(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["calculator", "--help"])
    with pytest.raises(SystemExit) as stop:
        calculator.main()
    said = capsys.readouterr().out
    assert stop.value.code == 0 and "a ceiling, not a forecast" in said and "--bandwidth" in said


def test_where_the_gain_vanishes_follows_from_the_batch_sizes():
    hardware = HARDWARE["h200"]

    def said(*cases: tuple[int, float]) -> str:
        """Of batch sizes and experts per token."""
        shapes = [(Workload(batch, 1, 1023, itemsize=2), experts) for batch, experts in cases]
        return _where_it_vanishes([_estimate(MIXTRAL_8X7B, hardware, *shape) for shape in shapes], 8)

    assert said((1, 1.0), (2, 1.0)) == "Decoding gains at least 5% at every batch size up to 2."
    assert said((1, 2.0), (64, 2.0)).endswith("at batch 1 to 64: with this mix there is nothing to gain.")
    assert said((1, 1.95), (8, 1.0)) == "Decoding gains less than 5% at batch 1."
    many = said((1, 1.0), (64, 1.0))
    assert many.startswith("Decoding gains less than 5% at batch 64: that many tokens use nearly every expert")
    assert "arithmetic" not in many
    assert said((1, 1.0), (64, 1.0), (4096, 1.0)) == many + (
        "\nAt larger batches arithmetic is the limit, which does fall with the experts that run."
    )


def test_memory_is_that_of_parameters_and_keys_and_values():
    alone = _needed_memory(MIXTRAL_8X7B, Workload(1, 1, itemsize=2))
    assert alone == 2 * 46_702_792_704 + 131_072  # 32 layers, 8 heads of 128 numbers, keys and values
    assert _needed_memory(MIXTRAL_8X7B, Workload(3, 2, 8, itemsize=2)) == 2 * 46_702_792_704 + 30 * 131_072

import math

import numpy as np
import pandas as pd
import pytest

from analysis.evaluate.comparison import ResultError, degradation, read_result, report
from analysis.evaluate.losses import LossesError
from analysis.resampling import ratio_estimate
from varjax import checksums

SPEED = {
    "prefill_tokens_per_second": 1300.0,
    "prefill": {"batch": 8, "plain_tokens_per_second": 1010.0},
    "speedup": {"prefill": {"value": 1.3, "low": 1.2, "high": 1.4}},
}


def write_result(folder, name, nll, tokens=100, **fields):
    documents = pd.DataFrame({"id": [f"d{i}" for i in range(len(nll))], "group": "g", "nll": nll, "tokens": tokens})
    table = folder / f"{name}.documents.parquet"
    documents.to_parquet(table)
    perplexity = math.exp(np.sum(nll) / (tokens * len(nll)))
    path = folder / f"{name}.json"
    base = {"mode": name, "perplexity": perplexity, "documents_file": table.name}
    base["documents_sha256"] = checksums.digest_of_file(table)
    checksums.write_json(path, base | fields)
    return path


@pytest.fixture
def pair(tmp_path):
    rng = np.random.default_rng(0)
    nll = rng.normal(300, 60, 50)
    busy = {"prefill_tokens_per_second": 2000.0, "prefill": {"batch": 8}, "speedup": {}}  # on another day
    base = write_result(tmp_path, "baseline", nll, experts_per_token=2.0, throughput=busy)
    other = write_result(
        tmp_path,
        "var",
        nll + rng.normal(0.5, 0.5, 50),
        experts_per_token=1.1,
        tiers={"fast": 0.8, "cached": 0.0, "learned": 0.2},
        throughput=SPEED,
    )
    return base, other


def test_degradation_is_the_change_of_perplexity_and_pairing_narrows_it(pair):
    base, other = map(read_result, pair)
    change = degradation(base, other)
    assert change.value == pytest.approx(other.fields["perplexity"] / base.fields["perplexity"] - 1)
    assert change.low < change.value < change.high
    assert change.high - change.low < 0.005  # documents differ by tens of per cent, their differences hardly


def test_bootstrap_covers_the_truth():
    rng = np.random.default_rng(1)
    covered = 0
    for seed in range(200):
        tokens = rng.integers(50, 400, 60)
        estimate = ratio_estimate(tokens * rng.normal(0.01, 0.02, 60), tokens, 300, seed)
        covered += estimate.low <= 0.01 <= estimate.high
    assert covered >= 178  # 95 % nominal; three standard errors below 94 %, which 60 documents give


def test_report_says_pass_fail_and_not_measured(pair):
    said, saved = report(*map(read_result, pair))
    verdicts = {row["name"]: row["passed"] for row in saved["criteria"]}
    assert verdicts == {
        "perplexity degradation": True,
        "speed-up, prefill": True,
        "speed-up, decode": None,
        "learned tier": False,
    }
    assert [section.verdict for section in said.sections] == ["reported", "PASS", "PASS", "not measured", "FAIL"]
    assert "at 1.10 of 2.00 experts" in said.sections[0].outcome
    assert [section.outcome for section in said.sections[2:]] == [">= 1.2x: 1.30x", ">= 1.2x: –", "< 15%: 20.00%"]


def row_of(said, name):
    return next((row for row in said.sections[0].tables[0].rows if row[0].startswith(name)), None)


def test_speeds_are_those_that_were_measured_together(pair, tmp_path):
    base, other = map(read_result, pair)
    said, _ = report(base, other)
    # Not the 2,000 tokens/s of the base's own run, of which 1,300 would be a slow-down.
    assert row_of(said, "prefill") == ("prefill, tokens/s", "1,010", "1,300", "1.30x", "1.20x", "1.40x")
    assert row_of(said, "decode") is None  # nobody timed it

    older = {**SPEED, "prefill": {"batch": 8}}  # without the plain model's rate in the same rounds
    nll = other.losses.nll
    said, _ = report(base, read_result(write_result(tmp_path, "older", nll, throughput=older)))
    assert row_of(said, "prefill") == ("prefill, tokens/s", "–", "–", "1.30x", "1.20x", "1.40x")


def test_a_speed_up_over_the_plain_model_is_not_one_over_another_base(pair, tmp_path):
    _, other = map(read_result, pair)
    base = read_result(write_result(tmp_path, "fewer experts", other.losses.nll, throughput=SPEED))
    said, saved = report(base, other)
    assert row_of(said, "prefill") is None and saved["criteria"] == [] and len(said.sections) == 1
    assert any("The base is not the plain model" in note for note in said.notes)


def test_the_change_of_every_document_is_drawn(pair):
    base, other = map(read_result, pair)
    (shown,) = report(base, other)[0].sections[0].figures
    changes, mean = shown.draw().axes[0].lines[:2]
    values = changes.get_ydata()
    assert len(values) == 50 and (np.diff(values) >= 0).all()
    assert math.expm1(mean.get_ydata()[0]) == pytest.approx(degradation(base, other).value)


def test_what_cannot_be_paired_is_refused(pair, tmp_path):
    base = read_result(pair[0])
    fewer = read_result(write_result(tmp_path, "fewer", [300.0] * 20))
    with pytest.raises(LossesError, match="shares 20 of its 20 documents with the 50 of"):
        degradation(base, fewer)
    longer = read_result(write_result(tmp_path, "longer", [300.0] * 50, tokens=200))
    with pytest.raises(LossesError, match="other tokens than"):
        degradation(base, longer)
    for fields in ({"stride": 64}, {"prefix_id": 1}, {"provenance": {"model": {"dtype": "bfloat16"}}}):
        other = read_result(write_result(tmp_path, "other", [300.0] * 50, **fields))
        with pytest.raises(ResultError, match=r"other\.json has another .*; evaluate both alike"):
            report(base, other)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "does not exist"), ("{", "not valid JSON"), ("{}", "no field 'checksum'")],
)
def test_broken_results_are_named(tmp_path, content, message):
    path = tmp_path / "result.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ResultError, match=message) as error:
        read_result(path)
    assert str(path) in str(error.value)


def test_what_is_not_a_result_is_named(tmp_path):
    checksums.write_json(tmp_path / "other.json", {"mode": "var"})
    with pytest.raises(ResultError, match=r"other\.json has no field 'perplexity'"):
        read_result(tmp_path / "other.json")


def test_losses_of_another_evaluation_are_refused(pair):
    """Two evaluations with one name: a run wrote its losses and was killed before its result."""
    losses = pair[0].with_name("baseline.documents.parquet")
    losses.write_bytes(pair[1].with_name("var.documents.parquet").read_bytes())
    with pytest.raises(ResultError, match=r"baseline\.documents\.parquet is damaged, or belongs to another evaluation"):
        read_result(pair[0])


def test_losses_must_lie_beside_their_result(pair):
    (pair[0].parent / "baseline.documents.parquet").unlink()
    with pytest.raises(ResultError, match="keep the two files together"):
        read_result(pair[0])

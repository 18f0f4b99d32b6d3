"""The report of an evaluation says what its result file holds, and no more."""

import numpy as np
import pytest

from analysis.evaluate.losses import Scores
from analysis.evaluate.report import report
from analysis.report.report import text

NLL, TOKENS = np.array([30.0, 70.0]), np.array([10, 20])
SCORES = Scores(("x", "y"), ("a", "b"), NLL, TOKENS, TOKENS, TOKENS, max_length=16, stride=16)
SPEED = {"repeats": 3, "prefill": {"batch": 4}, "decode": {"batch": 1}}
SPEED |= {"prefill_tokens_per_second": 2000.0, "decode_tokens_per_second": 100.0}
LAYER = {"tiers": {"fast": 0.5, "cached": 0.2, "learned": 0.3}, "mispredictions": 0.1, "experts_per_token": 1.5}


def test_the_plain_model_has_neither_tiers_nor_a_speed_up():
    result = {"mode": "baseline", **SCORES.summary(), "throughput": {**SPEED, "speedup": {}}}
    said = report(result, SCORES)
    assert [section.name for section in said.sections] == ["quality", "throughput"]
    words = text(said)
    assert "perplexity 28.032 per token" in words and "speed-up" not in words.lower() and "2,000" in words
    assert "20.086" in words and "33.115" in words  # by group
    assert not any(section.figures for section in said.sections)


@pytest.mark.parametrize(
    ("mode", "split", "warned"),
    [
        *(("var", split, True) for split in ("tune", "build", None)),
        *(("var", split, False) for split in ("test", "calibrate")),
        ("baseline", "tune", False),
    ],
)
def test_documents_that_may_have_chosen_the_policy_are_said_to_flatter_it(mode, split, warned):
    result = {"mode": mode, **SCORES.summary(), "provenance": {"data": {"split": split}}}
    words = text(report(result, SCORES))
    assert ("These documents flatter VAR" in words) == warned


def test_under_var_layers_are_told_and_drawn():
    ratio = {"value": 1.25, "low": 1.2, "high": 1.3}
    result = {"mode": "var", **SCORES.summary(), **LAYER, "layers": [LAYER, LAYER]}
    result["throughput"] = {**SPEED, "speedup": {"prefill": ratio, "decode": ratio}}
    result["throughput"]["prefill"] = {"batch": 4, "plain_tokens_per_second": 1590.0}
    said = report(result, SCORES)
    assert [section.name for section in said.sections] == ["quality", "routing", "throughput"]
    assert "1.50 experts per token and layer; fast 50.0%, cached 20.0%, learned 30.0%" in text(said)
    assert "prefill 1.25x, decode 1.25x the plain model's speed" in text(said)
    (table,) = said.sections[2].tables
    assert table.rows[0] == ("prefill", 4, 2000.0, 1590.0, 1.25, 1.2, 1.3)  # of the same rounds
    assert table.rows[1][3] is None  # of an older run, which did not keep it
    (figure,) = (figure for section in said.sections for figure in section.figures)
    assert figure.name == "layers" and len(figure.draw().axes) == 2

"""Two measurements of one call, and what is said of them."""

import dataclasses

import numpy as np
import pytest

from profiling import components_section
from profiling.calls import prepare
from profiling.components import Breakdown, measure_components, measure_sides
from profiling.costs import COMPONENTS
from profiling.scopes import OTHER
from varjax import VARConfig, VARModel


@pytest.fixture(scope="module")
def texts(documents):
    return np.stack([one.ids[:16] for one in documents if len(one.ids) >= 16][:2])


def breakdown(**changes):
    by_trace = dict.fromkeys((*COMPONENTS, OTHER), 0.0) | {"experts": 6e-3, "head": 2e-3, "gate": 1e-4, OTHER: 1e-3}
    ablated = {"experts": 5e-3, "head": 0.9e-3, "gate": -1e-4}
    fields = {"side": "plain", "phase": "decode", "batch": 1, "length": 1, "total": 9e-3, "traced": 1e-2}
    fields |= {"recording": 9e-4, "idle": 1e-3, "whole": 1e-2, "by_trace": by_trace, "by_ablation": ablated}
    return Breakdown(**(fields | changes))


def test_disagreement_is_a_factor_apart_and_not_small():
    found = breakdown()
    assert found.disagreements() == ["head"]  # the gate's is a hundredth of the call
    assert found.disagreements(factor=3) == []
    assert found.disagreements(factor=1.1, small=0) == ["experts", "head", "gate"]


def test_what_is_explained():
    found = breakdown()
    assert found.explained == pytest.approx(9.1 / 9)
    assert found.attributed == pytest.approx(8.1 / 9)
    assert found.saved == pytest.approx(0.58)
    assert breakdown(whole=None, by_ablation={}).saved is None


def test_the_section_names_what_fails_and_what_differs():
    near, far = breakdown(), breakdown(side="VAR", total=5e-3)
    section = components_section.section([near])
    assert section.verdict == "PASS" and "head (2 against 0.9 ms)" in section.words[0]
    section = components_section.section([near, far])
    assert section.verdict == "FAIL" and "decode VAR at batch 1" in section.outcome
    alone = dataclasses.replace(near, whole=None, by_ablation={})
    assert "no second measurement" in components_section.section([alone]).words[0]


def test_both_sides_and_phases_are_measured(small_var_model, texts, tmp_path):
    found = measure_sides(
        small_var_model, {"prefill": texts, "decode": texts[:1]}, folder=tmp_path, turns=2, max_calls=2, ablate=False
    )
    assert [(one.phase, one.side, one.batch, one.length) for one in found] == [
        ("prefill", "plain", 2, 16),
        ("prefill", "VAR", 2, 16),
        ("decode", "plain", 1, 1),
        ("decode", "VAR", 1, 1),
    ]
    for one in found:
        assert set(one.by_trace) == {*COMPONENTS, OTHER}
        np.testing.assert_allclose(sum(one.by_trace.values()), one.traced - one.recording)
        assert (one.by_trace["commit"] > 0) == (one.side == "VAR")
    assert len(list((tmp_path / "plugins" / "profile").iterdir())) == 4
    section = components_section.section(found)
    assert len(section.tables) == 5
    assert components_section.figure(found) is not None


def test_a_component_is_left_out_of_the_plain_model_too(saved_model, texts, tmp_path):

    plain = VARModel(saved_model, VARConfig(enable_var=False))
    found = measure_components(plain, texts, "decode", folder=tmp_path, turns=1, max_calls=1, recording=0.0)
    assert set(found.by_ablation) == set(COMPONENTS) - {"plan", "answers", "commit"}
    assert found.whole > 0 and found.recording == 0


def test_unknown_phases_and_short_texts_are_refused(small_var_model, texts):
    with pytest.raises(ValueError, match="phase='both': expected one of prefill, decode"):
        prepare(small_var_model, texts, "both")
    with pytest.raises(ValueError, match="decoding needs 2"):
        prepare(small_var_model, texts[:, :1], "decode")

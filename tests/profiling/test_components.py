"""Components sum to the call, and the report says where they do not."""

import numpy as np
import pytest

from profiling import components
from profiling.calls import prepare
from profiling.components import OTHER, Breakdown, measure_sides, section
from profiling.costs import COMPONENTS


@pytest.fixture(scope="module")
def texts(documents):
    return np.stack([one.ids[:16] for one in documents if len(one.ids) >= 16][:2])


def breakdown(**changes):
    by_trace = dict.fromkeys((*COMPONENTS, OTHER), 0.0) | {"experts": 6e-3, "head": 2e-3, "gate": 1e-4, OTHER: 1e-3}
    fields = {"side": "plain", "phase": "decode", "batch": 1, "length": 1, "total": 9e-3, "traced": 1e-2}
    fields |= {"recording": 9e-4, "idle": 1e-3, "by_trace": by_trace}
    return Breakdown(**(fields | changes))


def test_what_is_explained():
    found = breakdown()
    assert found.explained == pytest.approx(9.1 / 9)
    assert found.attributed == pytest.approx(8.1 / 9)


def test_the_section_names_the_largest_difference():
    near, far = breakdown(), breakdown(side="VAR", total=5e-3)
    assert section([near]).verdict == "PASS"
    said = section([near, far])
    assert said.verdict == "FAIL" and "decode VAR at batch 1" in said.outcome


def test_both_sides_and_phases_are_measured(small_var_model, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(components, "TURN", 0.001)
    found = measure_sides(
        small_var_model, {"prefill": texts, "decode": texts[:1]}, folder=tmp_path, turns=2, max_calls=2
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
    said = section(found)
    assert len(said.tables) == 5 and said.figures[0].draw() is not None


def test_unknown_phases_and_short_texts_are_refused(small_var_model, texts):
    with pytest.raises(ValueError, match="phase='both': expected one of prefill, decode"):
        prepare(small_var_model, texts, "both")
    with pytest.raises(ValueError, match="decoding needs at least 2"):
        prepare(small_var_model, texts[:, :1], "decode")

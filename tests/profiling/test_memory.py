import pytest

from profiling.memory import Peak, prefill_peaks, section


def test_the_prediction_is_near_what_xla_lays_out(small_var_model):
    """A model so small that its activations are most of it; they are what the prediction overstates."""
    found = prefill_peaks(small_var_model, [(1, 32), (8, 64), (8, 64)])
    assert [(one.side, one.batch, one.length) for one in found] == [
        *(("plain", 1, 32), ("VAR", 1, 32), ("plain", 8, 64), ("VAR", 8, 64))
    ]
    assert [one.relative for one in found] == pytest.approx([0.0] * 4, abs=0.25)
    assert found[2].allocated > 1.5 * found[0].allocated  # activations count, not only parameters


def test_the_section_names_the_farthest():
    said = section([Peak("plain", 1, 32, 1.1e6, 1_000_000), Peak("VAR", 8, 64, 0.8e6, 1_000_000)])
    assert "-20.0%, VAR, 8 x 64" in said.outcome
    assert section([]).verdict == "not measured"

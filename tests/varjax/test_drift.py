"""Drift on made-up observations: quiet where nothing changes, soon where something does, the same however it comes."""

import numpy as np
import pytest

from varjax import bounds, drift
from varjax.config import VARConfig
from varjax.drift import ALPHA, LOOK, Calibration, Stream, watched

CONFIG = VARConfig(layers={1: None}, cache_layers=(2,))
STREAMS = watched(CONFIG, 3)
TEXTS = 120  # of a calibration


def texts(rng: np.random.Generator, number: int, **shifts: float) -> np.ndarray:
    """float64 [number, M]: streams that depend on each other, a tenth of the values missing; signals may be shifted."""
    common = rng.beta(4, 12, number)[:, None]
    values = 0.7 * common + 0.3 * rng.beta(2, 6, (number, len(STREAMS)))
    values += np.array([shifts.get(stream.signal, 0.0) for stream in STREAMS])
    return np.where(rng.random(values.shape) < 0.1, np.nan, np.clip(values, 0, 1))


def calibrated(rng: np.random.Generator, number: int = TEXTS) -> Calibration:
    return drift.calibrate(texts(rng, number), STREAMS, fingerprint="f", config_sha256="c", share=0.05)


def test_streams_follow_from_the_config():
    tiers = [(stream.layer, stream.tier) for stream in STREAMS if stream.signal == "error"]
    assert tiers == [(None, None), (0, "fast"), (2, "fast"), (2, "cached")]
    assert [stream.layer for stream in STREAMS if stream.signal == "open"] == [None, 0, 2]
    assert watched(VARConfig(default=None), 2) == STREAMS[:3]


def test_quiet_in_all_but_a_few_runs_where_nothing_changes():
    """Calibration drawn anew in each; the bound is 5 %, and what is declared is far rarer still."""
    rng = np.random.default_rng(0)
    runs = [drift.watch(drift.begin(calibrated(rng)), texts(rng, 3 * TEXTS)) for _ in range(60)]
    assert sum(bool(run.drifts) for run in runs) <= 3
    assert all(run.turn == 4 for run in runs)


@pytest.mark.parametrize("shifts", [{"error": 0.2}, {"agreement": -0.15}, {"open": 0.15}, {"open": -0.15}])
def test_a_shift_of_any_signal_is_noticed_as_such(shifts):
    rng = np.random.default_rng(1)
    monitor = drift.watch(drift.begin(calibrated(rng)), texts(rng, TEXTS, **shifts))
    assert {found.stream.signal for found in monitor.drifts} == set(shifts)
    (shift,) = shifts.values()
    for found in monitor.drifts:
        assert np.sign(found.observed - found.calibrated) == np.sign(shift)
        assert np.sign(found.observed_bound - found.calibrated_bound) == np.sign(shift)
    assert len({found.stream for found in monitor.drifts}) == len(monitor.drifts)


def test_what_gets_better_is_no_drift():
    rng = np.random.default_rng(2)
    monitor = drift.watch(drift.begin(calibrated(rng)), texts(rng, TEXTS, error=-0.2, agreement=0.2))
    assert not monitor.drifts


def test_a_change_after_a_long_quiet_run_is_noticed_within_one_calibration_and_a_half():
    rng = np.random.default_rng(3)
    monitor = drift.watch(drift.begin(calibrated(rng)), texts(rng, 20 * TEXTS))
    assert not monitor.drifts
    monitor = drift.watch(monitor, texts(rng, 3 * TEXTS // 2, error=0.2))
    assert {found.stream.signal for found in monitor.drifts} == {"error"}


def test_how_texts_are_handed_over_does_not_matter():
    rng = np.random.default_rng(4)
    calibration, coming = calibrated(rng), texts(rng, 2 * TEXTS + 3, error=0.2)
    whole = drift.watch(drift.begin(calibration), coming)
    parts = drift.begin(calibration)
    for part in np.split(coming, [1, 2, 40, 41, 100]):
        parts = drift.watch(parts, part)
    assert drift.report(parts) == drift.report(whole)
    assert whole.drifts and whole.texts == (len(coming) // LOOK) * LOOK and len(whole.waiting) == len(coming) % LOOK


def test_the_error_is_spent_once():
    """Over streams, sides, the calibration and all turns it adds up to ALPHA."""
    calibration = calibrated(np.random.default_rng(5))
    turns = [drift._sequences(calibration, turn) for turn in range(1, 2000)]
    run = sum(1 - sequence.level for sequences in turns for sequence in sequences)
    assert run == pytest.approx(ALPHA / 2, rel=1e-3)
    assert drift._errors(STREAMS).sum() == pytest.approx(ALPHA / 2)
    assert all(sequence.level < 1 for sequence in drift._sequences(calibration, 10**9))


def test_calibrated_bounds_are_those_of_a_fixed_sample():
    rng = np.random.default_rng(6)
    observed = texts(rng, TEXTS)
    calibration = drift.calibrate(observed, STREAMS, fingerprint="f", config_sha256="c", share=0.05)
    error = ALPHA / 4 / 3  # of each of the three streams over all layers
    values = [column[~np.isnan(column)] for column in observed[:, :3].T]
    assert calibration.values[0].upper == bounds.upper_bound(values[0], 0, 1, 1 - error)
    assert calibration.values[0].lower == 0
    assert calibration.values[1].lower == pytest.approx(
        1 - bounds.upper_bound(1 - values[1], 0, 1, 1 - error), abs=1e-9
    )
    assert calibration.values[2].upper == bounds.upper_bound(values[2], 0, 1, 1 - error / 2)
    assert calibration.values[2].texts == len(values[2])


def test_a_stream_without_observations_never_drifts():
    rng = np.random.default_rng(7)
    observed = texts(rng, TEXTS)
    observed[:, STREAMS.index(Stream("error", 2, "cached"))] = np.nan
    calibration = drift.calibrate(observed, STREAMS, fingerprint="f", config_sha256="c", share=0.05)
    monitor = drift.watch(drift.begin(calibration), texts(rng, TEXTS, error=0.2))
    assert {found.stream.tier for found in monitor.drifts} == {None, "fast"}


def test_calibrations_survive_a_round_trip(tmp_path):
    calibration = calibrated(np.random.default_rng(8))
    calibration.save(tmp_path / "calibration.json")
    assert Calibration.load(tmp_path / "calibration.json") == calibration


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format": 2}', '{"format": 1, "values": [{"texts": 3}]}'])
def test_a_file_that_is_none_is_named(tmp_path, text):
    path = tmp_path / "calibration.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"calibration\.json: .*; calibrate again"):
        Calibration.load(path)


def test_one_text_calibrates_nothing():
    with pytest.raises(ValueError, match="1 calibration texts; give at least two"):
        calibrated(np.random.default_rng(9), 1)


def test_a_message_names_the_first_drifts_and_counts_the_others():
    rng = np.random.default_rng(10)
    monitor = drift.watch(drift.begin(calibrated(rng)), texts(rng, 2 * TEXTS, error=0.3, agreement=-0.2, open=0.3))
    more = len(monitor.drifts) - drift.NAMED
    assert more > 0 and drift.message(monitor).endswith(f"and {more} more streams.")
    assert drift.message(monitor).count("drift after") == drift.NAMED

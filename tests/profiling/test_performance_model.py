"""Times that the model itself makes are explained by it, and those that it cannot make are not."""

import dataclasses

import numpy as np
import pytest

from models.config import read_config
from models.model import REFERENCE
from profiling.ceilings import Ceilings, Rate
from profiling.costs import Mix, Workload
from profiling.performance_model import (
    FEWEST,
    PARAMETERS,
    Errors,
    PerformanceModel,
    PointError,
    Study,
    _break_even,
    _errors,
    _expert_blocks,
    _seconds_by_part,
    _speedup,
    fit,
    predict,
    scaling,
    scaling_section,
    section,
    study,
)
from profiling.points import Point, Task, tasks

CONFIG = read_config(REFERENCE / "config.json")
TRUE = PerformanceModel(
    product=300e9, half_rows=35.0, weights=30e9, stream=8e9, call=30e-6, layer=15e-6, block=5e-6, plan=120e-6
)


def _figure(kind, name, value):
    return Rate(kind, name, "float32", value, 0.9 * value, 1.1 * value)


CEILINGS = Ceilings(
    "made up",
    (
        *(_figure("product", *one) for one in (("square: 1024", 400e9), ("decode, 8 rows", 60e9))),
        *(_figure("copy", *one) for one in (("memory: 128 MiB", 10e9), ("cache: 4 MiB", 20e9))),
        *(_figure("read", *one) for one in (("memory: 128 MiB", 15e9), ("cache: 4 MiB", 40e9))),
        *(_figure("overhead", *one) for one in (("call", 20e-6), ("kernel", 0.5e-6))),
    ),
)


def made(wanted, noise=0.0, seed=0, slower=lambda task: 1.0) -> list[Point]:
    """Points whose times are those of TRUE, times log-normal noise."""
    rng = np.random.default_rng(seed)
    found = []
    for task in wanted:
        workload = Workload(task.batch, task.length, cached=task.cached, last_logits_only=task.decodes)
        kept = {"plain": 2.0, "open": 2.0, "none": 0.0, "one": 1.0, "one if known": 1.1}
        experts = kept.get(task.policy.removeprefix("answers, "), 0.5)
        kind = task.policy.partition(",")[0]
        rank = 64 if kind == "affine" else 0
        mix = Mix.even(CONFIG, workload.tokens, experts, 2, kind in ("answers", "affine"), answer_rank=rank)
        mix = Mix.plain(CONFIG, workload.tokens) if task.policy == "plain" else mix
        seconds = predict(TRUE, CONFIG, workload, mix) * slower(task) * float(np.exp(noise * rng.standard_normal()))
        found.append(Point(task.name, workload, mix, seconds, seconds, seconds))
    return found


def split(**options):
    wanted = tasks()
    points = made(wanted, **options)
    return [
        [point for point, task in zip(points, wanted, strict=True) if task.calibrates is side] for side in (True, False)
    ]


def test_few_points_calibrate_and_many_others_test():
    known, unseen = split()
    assert 10 <= len(known) <= 14 and len(unseen) >= 30
    shapes = [
        {(task.batch, task.length, task.cached) for task in tasks() if task.calibrates is side}
        for side in (True, False)
    ]
    assert not shapes[0] & shapes[1]


def test_parameters_are_recovered_from_times_with_noise():
    known, _ = split(noise=0.01)
    found = fit(known, CONFIG, CEILINGS)
    for name in ("product", "half_rows", "weights", "stream", "plan"):
        assert getattr(found, name) == pytest.approx(getattr(TRUE, name), rel=0.25), name
    # One more layer costs what one more call does, four times: together they are known, apart they hardly are.
    overhead, true = (one.call + CONFIG.num_layers * one.layer for one in (found, TRUE))
    assert overhead == pytest.approx(true, rel=0.25)


def test_unseen_points_are_predicted():
    known, unseen = split(noise=0.03, seed=1)
    found = _errors(fit(known, CONFIG, CEILINGS), CONFIG, unseen)
    assert found.passed and found.median < 0.05 and found.low <= found.median <= found.high


def test_a_machine_that_the_model_does_not_describe_shows():
    """Decoding three times as slow wherever tokens are many, which no point of the calibration says."""
    known, unseen = split(slower=lambda task: 3.0 if task.decodes and not task.calibrates else 1.0)
    found = _errors(fit(known, CONFIG, CEILINGS), CONFIG, unseen)
    assert found.worst.relative < -0.6 and "decode" in found.worst.point.name
    # And a machine that makes one component dear at long prefills only cannot be fitted either.
    known, unseen = split(slower=lambda task: 3.0 if task.batch * task.length >= 1000 else 1.0)
    assert not _errors(fit(known, CONFIG, CEILINGS), CONFIG, unseen).passed


def test_the_worst_point_is_named():
    known, _ = split()
    spoilt = [*known[:3], dataclasses.replace(known[3], seconds=known[3].seconds / 2), *known[4:]]
    found = _errors(TRUE, CONFIG, spoilt)
    assert found.worst.point.name == known[3].name and found.worst.relative == pytest.approx(1.0)
    assert found.median == pytest.approx(0, abs=1e-12)


def test_no_number_beats_its_ceiling():
    known, _ = split()
    quick = [dataclasses.replace(point, seconds=point.seconds / 50) for point in known]
    found = fit(quick, CONFIG, CEILINGS)
    assert found.product <= 1.4 * CEILINGS.product and max(found.weights, found.stream) <= 1.4 * CEILINGS.cache
    assert all(value >= 0 for value in dataclasses.astuple(found))


def test_too_few_points_are_refused():
    with pytest.raises(ValueError, match="cannot settle"):
        fit(split()[0][: len(PARAMETERS) - 1], CONFIG, CEILINGS)
    with pytest.raises(ValueError, match="no points"):
        _errors(TRUE, CONFIG, [])


def test_parts_sum_to_the_prediction():
    workload = Workload(4, 128)
    mix = Mix.even(CONFIG, workload.tokens, 1.0, orders=2, answered=True)
    parts = _seconds_by_part(TRUE, CONFIG, workload, mix)
    affine = _seconds_by_part(TRUE, CONFIG, workload, dataclasses.replace(mix, answer_rank=64))
    assert affine.pop("answers") > 1.1 * parts["answers"]
    assert affine == {name: seconds for name, seconds in parts.items() if name != "answers"}
    assert sum(parts.values()) == predict(TRUE, CONFIG, workload, mix)
    assert all(seconds > 0 for seconds in parts.values())
    plain = _seconds_by_part(TRUE, CONFIG, workload, Mix.plain(CONFIG, workload.tokens))
    assert plain["plan"] == plain["commit"] == plain["answers"] == 0
    assert plain["experts"] > parts["experts"]


def test_blocks_are_those_of_drawn_rows():
    """Against the engine's own rule on rows that are drawn: 160 tokens, 8 experts, blocks of 32 and 8 rows."""
    rng = np.random.default_rng(0)
    chosen = np.argsort(rng.random((2000, 160, 8)))[..., :2]
    rows = (chosen[..., None] == np.arange(8)).sum((1, 2))
    rest = rows % 32
    whole = rows // 32 + (rest > 8)
    tails = np.where(rest > 8, 0, -(-rest // 8))
    (large, number), (small, smaller) = _expert_blocks(CONFIG, Workload(1, 160), Mix(2.0, 8.0))
    assert (large, small) == (32, 8)
    assert number == pytest.approx(whole.sum(1).mean(), rel=0.1)
    assert smaller == pytest.approx(tails.sum(1).mean(), rel=0.1)


def test_break_even_lies_where_the_times_are_equal():
    workload = Workload(4, 1, cached=128, last_logits_only=True)
    k = _break_even(TRUE, CONFIG, workload)
    assert k is not None and 0 < k < 2
    assert _speedup(TRUE, CONFIG, workload, k) == pytest.approx(1, rel=1e-3)
    assert _speedup(TRUE, CONFIG, workload, k - 0.1) > 1 > _speedup(TRUE, CONFIG, workload, k + 0.1)
    dear = dataclasses.replace(TRUE, plan=1.0)
    assert _break_even(dear, CONFIG, workload) is None


def test_the_report_says_how_far_off_and_where_the_gain_vanishes():
    known, unseen = split(noise=0.02)
    fitted = fit(known, CONFIG, CEILINGS)
    found = Study(CONFIG, CEILINGS, fitted, _errors(fitted, CONFIG, known), _errors(fitted, CONFIG, unseen))
    said = section(found)
    assert said.verdict == "PASS" and f"over {len(unseen)} points" in said.outcome
    assert found.unseen.worst.point.name in said.words[0]
    assert [len(table.rows) for table in said.tables] == [8, len(PARAMETERS), 12, len(unseen), len(known)]
    slow = dataclasses.replace(found, model=dataclasses.replace(fitted, plan=1.0))
    assert "decode at batch 1" in section(slow).words[1]
    assert all(figure.draw() is not None for figure in said.figures)


def test_a_tiny_model_is_measured_fitted_and_predicted(saved_model, documents):
    """Policies and batches by two calls each; how well it is predicted decides nothing here."""
    texts = [document.ids for document in documents[:60]]
    shapes = [(1, 12, 0), (2, 24, 0), (1, 1, 8), (3, 1, 6)]
    wanted = [
        Task(*shape, policy=policy, calibrates=policy != "one")
        for shape in shapes
        for policy in ("plain", "none", "one")
    ]
    wanted += [Task(2, 12, policy="answers, one", calibrates=True), Task(1, 1, 8, policy="answers, rising")]
    wanted += [Task(2, 12, policy="affine, one")]
    found = study(saved_model, wanted, ceilings=CEILINGS, texts=texts, keys=40, repeats=2, run_tokens=24)
    by_name = {one.point.name: one.point for one in (*found.calibrated.each, *found.unseen.each)}
    points = [by_name[task.name] for task in wanted]
    assert len(found.unseen.each) == sum(not task.calibrates for task in wanted) == 6
    assert np.isfinite(found.unseen.median)
    for point, task in zip(points, wanted, strict=True):
        assert 0 < point.low <= point.seconds <= point.high
        assert point.mix.planned == (task.policy != "plain")
        # With affine answers, the first of 12 tokens is left to the router.
        expected = {"plain": 2.0, "none": 0.0, "answers, rising": 0.5, "affine, one": 13 / 12}.get(task.policy, 1.0)
        assert point.mix.experts == pytest.approx(expected)
        assert point.mix.answer_rank == (24 if task.policy == "affine, one" else 0)
        assert point.mix.distinct >= point.mix.experts
    assert by_name["prefill 2 x 24, plain"].mix.distinct > by_name["decode 1 x 1 after 8, plain"].mix.distinct == 2
    assert by_name["decode 1 x 1 after 8, answers, rising"].mix.answers == 1.5


class Made:
    """As much of a study as scaling looks at; the calls that calibrated its model are predicted perfectly."""

    def __init__(self, each):
        known = [PointError(one.point, one.point.seconds) for one in each]
        known += calls("prefill", "open", 1.0, 1.0)
        self.calibrated = Errors(tuple(known), 0.0, 0.0, 0.0, each[0])
        self.unseen = Errors(tuple(each), 0.0, 0.0, 0.0, each[0])


def calls(phase, policy, exponent, expected, tokens=(64, 128, 256, 512)):
    return [
        PointError(
            Point(f"{phase} 1 x {n}, {policy}", Workload(1, n), Mix(2.0, 8.0), 1e-5 * n**exponent, 0.0, 0.0),
            1e-5 * n**expected,
        )
        for n in tokens
    ]


def test_exponents_are_those_of_the_times():
    made = Made(calls("prefill", "one", 1.1, 1.05) + calls("prefill", "plain", 1.2, 1.0))
    first, second = scaling(made)  # and none of the calls that calibrated
    assert (first.policy, second.policy) == ("plain", "one")
    assert (first.exponent, first.expected) == (pytest.approx(1.2), pytest.approx(1.0))
    assert second.tokens == (64, 128, 256, 512) and second.consistent and not first.consistent
    assert (
        scaling_section([first, second]).verdict == "FAIL"
        and "1.20 against 1.00" in scaling_section([first, second]).outcome
    )
    assert scaling_section([second]).verdict == "PASS"


def test_a_call_that_grows_more_slowly_than_expected_is_no_fault():
    (one,) = scaling(Made(calls("decode", "plain", 0.4, 0.9)))
    assert one.consistent


def test_a_quick_study_times_unseen_calls_of_three_sizes_in_both_phases():
    plain = [task for task in tasks(quick=True) if not task.calibrates and task.policy == "plain"]
    for decodes in (True, False):
        assert len({task.batch * task.length for task in plain if task.decodes is decodes}) == FEWEST


def test_too_few_sizes_are_not_fitted_and_that_is_said():
    assert scaling(Made(calls("prefill", "plain", 1.0, 1.0, tokens=(64, 128)))) == []
    assert scaling_section([]).verdict == "not measured"


def test_the_figure_shows_what_was_measured():
    made = scaling(Made(calls("prefill", "plain", 1.1, 1.0) + calls("decode", "plain", 0.5, 0.5)))
    drawn = scaling_section(made).figures[0].draw()
    np.testing.assert_allclose(drawn.axes[0].lines[0].get_ydata(), np.multiply(1e3, made[0].measured))
    assert dataclasses.astuple(made[0])[0] == "decode"

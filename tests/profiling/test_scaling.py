import dataclasses

import numpy as np
import pytest

from profiling.performance_model import Errors, PointError
from profiling.points import Point, tasks
from profiling.scaling import FEWEST, figure, scalings, section
from profiling.workload import Mix, Workload


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
    first, second = scalings(made)  # and none of the calls that calibrated
    assert (first.policy, second.policy) == ("plain", "one")
    assert (first.exponent, first.expected) == (pytest.approx(1.2), pytest.approx(1.0))
    assert second.tokens == (64, 128, 256, 512) and second.consistent and not first.consistent
    assert section([first, second]).verdict == "FAIL" and "1.20 against 1.00" in section([first, second]).outcome
    assert section([second]).verdict == "PASS"


def test_a_call_that_grows_more_slowly_than_expected_is_no_fault():
    (one,) = scalings(Made(calls("decode", "plain", 0.4, 0.9)))
    assert one.consistent


def test_a_quick_study_times_unseen_calls_of_three_sizes_in_both_phases():
    plain = [task for task in tasks(quick=True) if not task.calibrates and task.policy == "plain"]
    for decodes in (True, False):
        assert len({task.batch * task.length for task in plain if task.decodes is decodes}) == FEWEST


def test_too_few_sizes_are_not_fitted_and_that_is_said():
    assert scalings(Made(calls("prefill", "plain", 1.0, 1.0, tokens=(64, 128)))) == []
    assert section([]).verdict == "not measured"
    figure([])


def test_the_figure_shows_what_was_measured():
    made = scalings(Made(calls("prefill", "plain", 1.1, 1.0) + calls("decode", "plain", 0.5, 0.5)))
    drawn = figure(made)
    np.testing.assert_allclose(drawn.axes[0].lines[0].get_ydata(), np.multiply(1e3, made[0].measured))
    assert dataclasses.astuple(made[0])[0] == "decode"

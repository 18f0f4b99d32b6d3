"""The best points, the least bad ones and the front are those that comparing every pair would find."""

import dataclasses

import numpy as np
import pytest

from tuning.points import best, least_bad, pareto, predicted

LIMIT = 0.01


@pytest.fixture(scope="module", params=range(4))
def points(make_point, request):
    """Coarse results, so that there are ties in either and in both."""
    rng = np.random.default_rng(request.param)
    return [
        make_point(number, 1 + rng.integers(0, 8) / 10, rng.integers(-2, 12) / 500, hopeless=bool(rng.integers(5) == 0))
        for number in range(30)
    ]


def test_within_the_limit_takes_the_upper_limit_and_all_documents(make_point):
    outcome = make_point(0, degradation=0.008).outcome
    assert outcome.within(outcome.upper) and not outcome.within(0.009)
    assert not dataclasses.replace(outcome, hopeless=True).within(1.0)
    assert not dataclasses.replace(outcome, upper=float("inf")).within(1.0)
    assert not dataclasses.replace(outcome, upper=float("nan")).within(1.0)


def test_the_best_are_the_fastest_feasible(points):
    feasible = [one for one in points if one.outcome.upper <= LIMIT and not one.outcome.hopeless]
    found = best(points, LIMIT, 5)
    assert len(found) == min(5, len(feasible)) > 0
    for one in found:
        others = [other for other in feasible if other not in found]
        assert one in feasible and all(other.outcome.speedup <= one.outcome.speedup for other in others)
    speedups = [one.outcome.speedup for one in found]
    assert speedups == sorted(speedups, reverse=True)
    assert best(points, -1.0, 5) == [] and best([], LIMIT, 5) == []


def test_of_equal_speed_ups_the_earlier_trial_comes_first(make_point):
    late, early = make_point(7), make_point(3)
    assert best([late, early], LIMIT, 2) == [early, late]


def test_the_least_bad_have_the_lowest_upper_limit_and_were_not_given_up(points):
    found = least_bad(points, 40)
    assert sorted(one.number for one in found) == list(range(30))
    given_up = [one.outcome.hopeless for one in found]
    assert given_up == sorted(given_up)
    uppers = [one.outcome.upper for one in found if not one.outcome.hopeless]
    assert uppers == sorted(uppers) and len(least_bad(points, 3)) == 3


def test_equal_configs_come_once(make_point):
    points = [
        make_point(number, 1.1 + number / 100, 0.001 * (3 - number), config="ab"[number % 2]) for number in range(4)
    ]
    assert [one.number for one in best(points, LIMIT, 9)] == [3, 2]
    assert [one.number for one in least_bad(points, 9)] == [3, 2]


def test_no_pair_shows_a_point_of_the_front_beaten_or_one_beside_it_unbeaten(points):
    def beaten(one, other):
        a, b = one.outcome, other.outcome
        no_worse = b.speedup >= a.speedup and b.degradation <= a.degradation
        return no_worse and (b.speedup, b.degradation) != (a.speedup, a.degradation)

    whole = [one for one in points if not one.outcome.hopeless]
    results = {
        (one.outcome.speedup, one.outcome.degradation)
        for one in whole
        if not any(beaten(one, other) for other in whole)
    }
    front = [(one.outcome.speedup, one.outcome.degradation) for one in pareto(points)]
    assert front == sorted(results)


def test_points_that_were_given_up_are_not_on_the_front(make_point):
    assert pareto([make_point(0, 9.0, -1.0, hopeless=True)]) == []


def test_whether_a_speed_up_is_predicted_stands_in_its_phase(make_point):
    assert predicted([make_point(0)]) and not predicted([make_point(0, phase="decode")]) and not predicted([])

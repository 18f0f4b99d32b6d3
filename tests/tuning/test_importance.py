"""A parameter that decides gets the importance, chance does not, and correlations are those of SciPy."""

import dataclasses

import numpy as np
import optuna
import pytest
from scipy.stats import spearmanr

from tuning.importance import FEWEST, importances, sensitivities, varied


@pytest.fixture(scope="module")
def decided(make_point):
    """The window alone decides the speed-up, the occurrences alone and downwards the degradation."""
    points = [make_point(number) for number in range(120)]
    return [
        make_point(
            one.number,
            1 + one.values["context_window_size"] / 10,
            0.02 - one.values["frequency_threshold"] / 10_000,
            hopeless=one.number % 4 == 0,
            **one.values,
        )
        for one in points
    ]


@pytest.fixture(scope="module")
def noise(make_point):
    rng = np.random.default_rng(1)
    return [make_point(number, 1 + rng.uniform(), rng.uniform() / 50) for number in range(120)]


def test_what_decides_gets_the_importance(decided, space):
    speedup, degradation = importances(decided, space)
    assert (speedup.target, degradation.target) == ("speed-up", "degradation")
    assert speedup.shares["context_window_size"] > 0.8 > speedup.by_chance
    assert degradation.shares["frequency_threshold"] > 0.8 > degradation.by_chance
    for one in (speedup, degradation):
        assert set(one.shares) == {parameter.name for parameter in space} and sum(one.shares.values()) == pytest.approx(
            1
        )
    assert (speedup.points, degradation.points) == (120, 90)  # without those that were given up


def test_what_decides_either_or_gets_the_importance_too(make_point, space):
    points = [make_point(number) for number in range(80)]
    points = [make_point(one.number, 1.1 + 0.2 * one.values["cached_tier"], **one.values) for one in points]
    speedup, _ = importances(points, space)
    assert speedup.shares["cached_tier"] == max(speedup.shares.values()) > speedup.by_chance


def test_noise_stays_within_what_chance_gives(noise, space):
    for one in importances(noise, space):
        assert max(one.shares.values()) < one.by_chance < 1


def test_importance_repeats_with_its_seed(noise, space):
    first, again, other = (importances(noise[:40], space, shuffles=5, seed=seed) for seed in (3, 3, 4))
    assert first == again and first[0].by_chance != other[0].by_chance


def test_optuna_is_left_as_talkative_as_it_was(noise, space, capfd):
    before = optuna.logging.get_verbosity()
    importances(noise, space, shuffles=1)
    assert optuna.logging.get_verbosity() == before and "study" not in capfd.readouterr().err


def test_correlations_are_one_and_minus_one_where_the_order_is_the_parameters(decided, space):
    speedup, degradation = sensitivities(decided, space)
    assert dataclasses.astuple(speedup.correlations["context_window_size"]) == pytest.approx((1, 1, 1))
    assert dataclasses.astuple(degradation.correlations["frequency_threshold"]) == pytest.approx((-1, -1, -1))
    assert (speedup.points, degradation.points) == (120, 90)


def test_correlations_are_those_of_scipy(noise, space):
    speedup, _ = sensitivities(noise, space, samples=200)
    for one in space:
        values = [float(point.values[one.name]) for point in noise]
        expected = spearmanr(values, [point.outcome.speedup for point in noise]).statistic
        found = speedup.correlations[one.name]
        assert found.value == pytest.approx(expected) and found.low < found.value < found.high


def test_intervals_cover_the_truth(make_point, space):
    """Of normal variables with correlation r, Spearman's is 6/pi arcsin(r/2)."""
    (one,) = [parameter for parameter in space if parameter.name == "loss_budget"]
    truth = 6 / np.pi * np.arcsin(0.6 / 2)
    rng = np.random.default_rng(5)
    covered = 0
    for _ in range(60):
        x = rng.normal(size=60)
        y = 0.6 * x + 0.8 * rng.normal(size=60)
        points = [make_point(number, float(y[number]), loss_budget=float(x[number])) for number in range(60)]
        found = sensitivities(points, (one,), samples=300)[0].correlations["loss_budget"]
        covered += found.low <= truth <= found.high
    assert 51 <= covered < 60  # 95 % of 60 is 57


def test_too_few_points_say_nothing(decided, space):
    few = decided[: FEWEST - 1]
    speedup, degradation = importances(few, space)
    assert not speedup.shares and not degradation.shares and np.isnan(speedup.by_chance)
    assert all(not one.correlations for one in sensitivities(few, space))
    speedup, degradation = importances(decided[:FEWEST], space)  # a quarter of them was given up
    assert speedup.shares and not degradation.shares


def test_a_parameter_that_never_varied_is_left_out(decided, space):
    same = [dataclasses.replace(one, values={**one.values, "cached_tier": True}) for one in decided]
    names = {one.name for one in space} - {"cached_tier"}
    assert {one.name for one in varied(same, space)} == names
    assert set(importances(same, space)[0].shares) == set(sensitivities(same, space)[0].correlations) == names


def test_results_that_are_mostly_the_same_have_no_best_quarter(make_point, space):
    points = [make_point(number, 1.5 if number < 5 else 1.2) for number in range(40)]
    speedup, degradation = importances(points, space)
    assert not speedup.shares and not degradation.shares
    correlated, constant = sensitivities(points, space)
    assert correlated.correlations and not constant.correlations


def test_no_search_is_too_poor_to_be_asked(searches, space):
    for name, points in searches.items():
        found = [*importances(points, space), *sensitivities(points, space, samples=50)]
        said = [one.shares for one in found[:2]] + [one.correlations for one in found[2:]]
        expected = {"many": 4, "none feasible": 4, "all given up": 0}.get(name, 0)
        assert sum(map(bool, said)) == expected, name

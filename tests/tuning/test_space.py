"""A space refuses what is none, covers its ranges to both ends, and its points become the configs that they name."""

import itertools

import numpy as np
import optuna
import pytest

from analysis.evaluate.prices import Prices
from tuning.space import (
    CACHED,
    THRESHOLDS,
    Parameter,
    Space,
    config_at,
    grid,
    reasons,
    search_space,
    suggest,
)
from varjax.config import LayerPolicy, VARConfig

PRICES = Prices((0, 1), np.array([4.0, 1.0]), np.tile(np.linspace(0.01, 1, 100), (2, 1)), np.ones(2))
ORDERS = (1, 2, 3)


def searched(orders, num_experts=8, **options) -> Space:
    """The space where everything has an effect."""
    space, unsearched = search_space(orders, num_experts, **options)
    assert not unsearched
    return space


SPACE = searched(ORDERS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("int", 2.5, 8), "x=2.5:8: expected whole numbers"),
        (("int", 2, float("inf")), "x=2:inf: expected whole numbers"),
        (("float", 2, 2), "x=2:2: expected a low end below the high one"),
        (("float", 3, 2), "x=3:2: expected a low end below the high one"),
        (("float", 0, float("nan")), "x=0:nan: expected a low end below the high one"),
        (("float", 0, 1, True), "x=0:1: searched on a logarithmic scale; expected a low end above 0"),
    ],
)
def test_a_range_that_is_none_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Parameter("x", *settings)


@pytest.mark.parametrize("name", ["answer_shrinkage", "answers_per_layer", "answer_dtype"])
def test_what_is_laid_down_in_the_table_cannot_be_searched(name):
    with pytest.raises(ValueError, match=f"{name} is fixed in the table"):
        Parameter(name, "int", 1, 10)


def spaced(number: int, *settings) -> list:
    """The values of a grid over one parameter."""
    return [point["x"] for point in grid((Parameter("x", *settings),), number)]


def test_points_go_from_end_to_end_on_the_parameters_scale():
    even = spaced(5, "float", 0.1, 1.5)
    assert (even[0], even[-1]) == (0.1, 1.5) and np.diff(even) == pytest.approx(0.35)
    factors = spaced(4, "float", 10, 300, True)
    assert factors[0] == 10 and factors[-1] == 300
    assert np.diff(np.log(factors)) == pytest.approx(np.log(30) / 3)
    assert spaced(1, "float", 1, 100, True) == [pytest.approx(10)]
    assert spaced(7, "bool") == [False, True]


def test_whole_numbers_are_whole_and_come_once():
    found = spaced(100, "int", 2, 8)
    assert found == [2, 3, 4, 5, 6, 7, 8] and all(isinstance(value, int) for value in found)
    assert spaced(3, "int", 100, 10_000, True) == [100, 1000, 10_000]


@pytest.mark.parametrize("number", [1, 2, 3, 7, 50])
def test_no_point_is_outside_the_range(number):
    for one in SPACE:
        for point in grid((one,), number):  # Optuna raises where a value is outside
            optuna.trial.create_trial(params=point, distributions={one.name: one.distribution}, value=0.0)


def test_a_grid_has_every_combination_once():
    space = (Parameter("a", "float", 0, 1), Parameter("b", "int", 1, 2), Parameter("c", "bool"))
    found = [tuple(point.values()) for point in grid(space, 3)]
    assert sorted(found) == sorted(itertools.product([0, 0.5, 1], [1, 2], [False, True]))
    assert all(list(point) == ["a", "b", "c"] for point in grid(space, 3))


def test_the_default_space_has_the_published_ranges_and_the_orders_of_the_statistics():
    ranges = {one.name: (one.low, one.high) for one in SPACE}
    assert ranges["frequency_threshold"] == (10, 200) and ranges["entropy_threshold"] == (0.1, 1.5)
    assert ranges["confidence_threshold"] == (0.5, 0.95) and ranges["cache_size"] == (100, 5000)
    assert ranges["cache_ttl_seconds"] == (10, 300) and ranges["context_window_size"] == (2, 8)
    assert ranges["longest_context"] == (1, 3) and len(ranges) == 9
    assert "longest_context" not in {one.name for one in searched((1,))}


def test_entropies_grow_with_the_number_of_experts():
    few, many = ({one.name: one for one in searched((1,), number)} for number in (8, 64))
    assert many.pop("entropy_threshold").high == pytest.approx(3.0)  # twice that of 8: ln 64 = 2 ln 8
    del few["entropy_threshold"]
    assert few == many


def test_ranges_are_replaced_by_name():
    changed = searched(ORDERS, ranges=["cache_size=200:400", "entropy_threshold=0.5:1"])
    assert [one.name for one in changed] == [one.name for one in SPACE]
    by_name = {one.name: one for one in changed}
    assert (by_name["cache_size"].low, by_name["cache_size"].high) == (200, 400) and by_name["cache_size"].log
    assert (by_name["entropy_threshold"].low, by_name["entropy_threshold"].high) == (0.5, 1)
    assert by_name["cache_ttl_seconds"] == THRESHOLDS[4]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cache_size", "'cache_size' is not a range; write for example cache_size=100:5000"),
        ("cache_size=1:2:3", "'cache_size=1:2:3' is not a range"),
        ("cache_size=a:b", "'cache_size=a:b' is not a range"),
        ("cache_size=5:1", "cache_size=5:1: expected a low end below the high one"),
        ("cache_size=0:10", "searched on a logarithmic scale; expected a low end above 0"),
        (
            "cache_sizes=1:10",
            "no parameter is called 'cache_sizes'; did you mean 'cache_size'\\? The parameters are loss",
        ),
        ("cached_tier=0:1", "cached_tier is either true or false; leave it out"),
    ],
)
def test_a_range_that_cannot_be_set_says_why(text, message):
    with pytest.raises(ValueError, match=message):
        search_space(ORDERS, ranges=[text])


def test_some_parameters_are_picked_in_the_order_of_the_space():
    assert [one.name for one in searched(ORDERS, names=["cached_tier", "loss_budget"])] == [
        "loss_budget",
        "cached_tier",
    ]
    with pytest.raises(ValueError, match="did you mean 'loss_budget'"):
        search_space(ORDERS, names=["los_budget"])
    with pytest.raises(ValueError, match="no parameter is called 'zzz'\\. The parameters are loss_budget, "):
        search_space(ORDERS, names=["zzz"])


def test_a_trial_tries_a_point_of_the_space():
    space = SPACE
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    trial = study.ask()
    values = suggest(space, trial)
    assert list(values) == [one.name for one in space] and values == trial.params
    assert trial.distributions == {one.name: one.distribution for one in space}


def test_values_that_are_not_given_stay_the_bases():
    base = VARConfig(cache_size=77, entropy_threshold=1.1, layers={1: LayerPolicy(experts_kept=0)})
    assert config_at({}, base, PRICES, ORDERS) == base
    changed = config_at({"frequency_threshold": 12, "cache_ttl_seconds": 5.0}, base, PRICES, ORDERS)
    assert (changed.frequency_threshold, changed.cache_ttl_seconds) == (12, 5.0)
    assert (changed.cache_size, changed.entropy_threshold, changed.layers) == (77, 1.1, base.layers)


def test_a_budget_sets_one_price_and_leaves_the_other_layers_open():
    config = config_at({"loss_budget": 0.02}, VARConfig(), PRICES, ORDERS)
    assert config.default is None and config.policy(2) is None
    assert dict(config.layers) == {
        layer: LayerPolicy(experts_kept=None, tolerance=tolerance, ngram_orders=ORDERS)
        for layer, tolerance in PRICES.within(0.02)
    }
    first, second = (dict(config.layers)[layer].tolerance for layer in (0, 1))
    assert second == pytest.approx(2 * first)  # an error costs a quarter there


def test_a_budget_of_nothing_leaves_all_layers_open():
    config = config_at({"loss_budget": 0.0}, VARConfig(layers={0: LayerPolicy()}), PRICES, ORDERS)
    assert all(config.policy(layer) is None for layer in range(4))


@pytest.mark.parametrize(("longest", "orders"), [(1, (1,)), (2, (1, 2)), (3, (1, 2, 3))])
def test_the_longest_context_limits_the_orders_of_all_layers(longest, orders):
    config = config_at({"loss_budget": 0.03, "longest_context": longest}, VARConfig(), PRICES, ORDERS)
    assert [config.policy(layer).ngram_orders for layer in (0, 1)] == [orders, orders]
    own = VARConfig(default=LayerPolicy(ngram_orders=(1,)), layers={1: LayerPolicy(experts_kept=0), 2: None})
    kept = config_at({"longest_context": longest}, own, PRICES, ORDERS)
    assert (
        kept.policy(0).ngram_orders == orders
        and kept.policy(1).ngram_orders == orders
        and kept.policy(1).experts_kept == 0
    )
    assert kept.policy(2) is None


def test_without_a_cached_tier_nothing_is_cached():
    values = {"cache_size": 500, "cached_tier": False}
    assert config_at(values, VARConfig(), PRICES, ORDERS).cache_size == 0
    assert config_at(values | {"cached_tier": True}, VARConfig(), PRICES, ORDERS).cache_size == 500
    assert values == {"cache_size": 500, "cached_tier": False}


def test_every_corner_of_the_default_space_is_a_config_that_survives_json():
    for values in grid(SPACE, 2)[::7]:
        config = config_at(values, VARConfig(), PRICES, ORDERS)
        assert VARConfig.from_json(config.to_json()) == config


def test_a_value_that_the_config_refuses_is_named():
    with pytest.raises(ValueError, match="confidence_threshold=2"):
        config_at({"confidence_threshold": 2.0}, VARConfig(), PRICES, ORDERS)


def test_what_can_change_nothing_is_named_with_its_reason():
    space, unsearched = search_space(ORDERS, span=0.0)
    assert set(unsearched) == {*CACHED, "cached_tier"} and len(space) + len(unsearched) == len(SPACE)
    assert "a cached tier of its own" in unsearched["cache_size"]
    assert reasons(unsearched).startswith("confidence_threshold, cache_size, ") and reasons(unsearched).count(":") == 1
    assert search_space(ORDERS, span=10.0)[1] == {
        "cache_ttl_seconds": "no decision of the cached tier gets older than 10.00 s on these documents"
    }
    assert search_space(ORDERS, span=10.01) == (SPACE, {})
    assert search_space(ORDERS, names=["loss_budget"], span=0.0) == ((SPACE[0],), {})
    with pytest.raises(ValueError, match=r"nothing is left to search: cache_size: each document .*--shared_cache"):
        search_space(ORDERS, names=["cache_size"], span=0.0)


def test_with_one_expert_the_thresholds_on_the_gate_are_not_searched():
    space, unsearched = search_space(ORDERS, 1)
    assert set(unsearched) == {"entropy_threshold", "confidence_threshold"}
    assert "every layer has one expert" in reasons(unsearched)
    assert {one.name for one in space} == {one.name for one in SPACE} - set(unsearched)

import dataclasses

import pytest

import profiling.bottlenecks
from analysis.resampling import Estimate
from profiling.bottlenecks import Evidence, bottlenecks

WELL = Evidence(
    phase="decode",
    batch=1,
    plain={"plan": 0.0, "experts": 6e-3, "projections": 3e-3, "commit": 0.0, "other": 1e-3},
    var={"plan": 1e-4, "experts": 2.4e-3, "projections": 3e-3, "commit": 1e-4, "other": 1e-3},
    speedup=Estimate(1.5, 1.45, 1.55),
    experts=(2.0, 0.8),
    tiers={"fast": 0.95, "cached": 0.0, "learned": 0.05},
    cached_tier=False,
    overhead=1e-4,
    waiting={"experts": False, "projections": False},
    exponent=(1.02, 1.0),
)


def seen(**changes):
    return {one.name: one for one in bottlenecks(dataclasses.replace(WELL, **changes))}


@pytest.mark.parametrize("raised", [ValueError, RuntimeError])
def test_a_fault_in_a_rule_is_no_finding(monkeypatch, raised):
    def broken(evidence):
        raise raised("operands could not be broadcast together")

    monkeypatch.setattr(profiling.bottlenecks, "RULES", (*profiling.bottlenecks.RULES, broken))
    with pytest.raises(raised, match="broadcast"):
        bottlenecks(WELL)


def test_where_all_is_well_nothing_is_found():
    assert bottlenecks(WELL) == []


@pytest.mark.parametrize(
    ("changes", "name", "severity", "said"),
    [
        ({"speedup": Estimate(0.7, 0.6, 0.8)}, "slow-down", "high", "0.70x [0.60, 0.80]"),
        ({"speedup": Estimate(0.96, 0.95, 0.99)}, "slow-down", "low", "0.96x"),
        ({"var": {**WELL.var, "plan": 5e-3}}, "look-up", "high", "plan 5.00 ms, commit 100 µs"),
        ({"tiers": {"fast": 0.4, "cached": 0.0, "learned": 0.6}}, "learned share", "high", "60% of tokens and layers"),
        ({"cached_tier": True}, "cache use", "low", "decides 0.00%"),
        ({"var": {**WELL.var, "experts": 6e-3}}, "padding waste", "high", "0.40 of the plain model's expert runs"),
        ({"overhead": 3e-3}, "dispatch-bound", "high", "3.00 ms of 6.60 ms"),
        ({"waiting": {"experts": True, "projections": True}}, "memory-bound", "low", "82% of the call waits"),
        ({"exponent": (1.6, 1.0)}, "poor scaling", "high", "to the power of 1.60, 1.00"),
    ],
)
def test_each_bottleneck_is_named_alone_with_its_severity_and_numbers(changes, name, severity, said):
    found = seen(**changes)
    assert list(found) == [name] and found[name].severity == severity
    assert said in found[name].evidence and found[name].where == "decode, batch 1" and found[name].advice


@pytest.mark.parametrize(
    "changes",
    [
        {"speedup": Estimate(0.98, 0.9, 1.02)},  # the interval reaches 1
        {"cached_tier": True, "tiers": {"fast": 0.8, "cached": 0.15, "learned": 0.05}},
        {"overhead": None, "waiting": None, "exponent": None},  # not measured
        {"experts": (2.0, 2.0), "var": {**WELL.plain, "plan": 1e-4}, "speedup": Estimate(1.0, 0.99, 1.01)},
    ],
)
def test_what_is_no_bottleneck_is_not_found(changes):
    assert seen(**changes) == {}


def test_the_dearest_comes_first():
    found = bottlenecks(
        dataclasses.replace(WELL, var={**WELL.var, "plan": 5e-3}, cached_tier=True, exponent=(1.2, 1.0))
    )
    assert [one.name for one in found] == sorted(
        [one.name for one in found], key=lambda name: -seen_cost(found, name)
    ) and len(found) == 3


def seen_cost(found, name):
    return next(one.cost for one in found if one.name == name)


def test_advice_that_was_tried_says_what_came_of_it():
    found = seen(cached_tier=True, tried={"cache use": 1.5})
    assert "Tried: 1.50x" in found["cache use"].advice
    assert found["cache use"].cost == pytest.approx(1 / 3) and found["cache use"].severity == "high"


def test_a_slow_down_names_the_component_that_grew_most():
    found = seen(var={**WELL.var, "commit": 9e-3}, speedup=Estimate(0.6, 0.55, 0.65))
    assert "commit grew most, by 9.00 ms" in found["slow-down"].evidence


def test_of_the_plain_model_nothing_is_said_that_compares():
    """VAR is switched off: no speed-up, no tiers; what the call itself is bound by is still said."""
    seconds = {"experts": 0.5, "attention": 0.1, "other": 0.4}
    seen = Evidence(
        phase="decode",
        batch=1,
        plain=seconds,
        var=seconds,
        speedup=None,
        experts=(2.0, 2.0),
        tiers=None,
        cached_tier=False,
        overhead=seconds["other"],
    )
    assert [one.name for one in bottlenecks(seen)] == ["dispatch-bound"]

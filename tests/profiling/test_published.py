"""Ceilings against what is known of Mixtral-8x7B on an H200: see the measured entry."""

import pytest

from profiling.costs import Cost, Mix, Workload, component_costs
from profiling.published import HARDWARE, PUBLISHED, Hardware, ceiling

MIXTRAL_8X7B = PUBLISHED["mixtral-8x7b"]


def rate(workload: Workload, mix: Mix) -> float:
    costs = component_costs(MIXTRAL_8X7B, workload, mix)
    return workload.tokens / ceiling(costs, HARDWARE["h200-measured"])


def test_a_component_takes_as_long_as_its_slower_side():
    hardware = Hardware("toy", "float32", flops=10.0, bandwidth=2.0, memory=1.0, source="made up")
    costs = {"arithmetic": Cost(flops=30.0, bytes=2.0), "traffic": Cost(flops=1.0, bytes=8.0), "nothing": Cost()}
    assert ceiling(costs, hardware) == 3.0 + 4.0


@pytest.mark.parametrize(("experts", "tokens_per_second"), [(2, 168), (1, 300)])
def test_the_ceiling_of_mixtrals_decoding_on_an_h200(experts, tokens_per_second):
    mix = Mix(experts=experts, distinct=experts)
    assert rate(Workload(1, 1, cached=1023, itemsize=2), mix) == pytest.approx(tokens_per_second, rel=0.01)


@pytest.mark.parametrize(("experts", "tokens_per_second"), [(2, 30_300), (1, 53_500)])
def test_the_ceiling_of_mixtrals_prefill_on_an_h200(experts, tokens_per_second):
    """The known figures count operations only; here activations are moved as well, which costs a few per cent."""
    found = rate(Workload(1, 2048, itemsize=2), Mix(experts=experts, distinct=8))
    assert 0.95 * tokens_per_second < found < tokens_per_second * 1.001
    flops = sum(component_costs(MIXTRAL_8X7B, Workload(1, 2048), Mix(experts, 8)).values(), Cost()).flops
    assert 2048 * 790e12 / flops == pytest.approx(tokens_per_second, rel=0.002)


@pytest.mark.parametrize(("batch", "speedup"), [(8, 1.35), (32, 1.01), (128, 1.0)])
def test_decoding_in_batches_gains_little_for_every_expert_is_hit(batch, speedup):
    workload = Workload(batch, 1, cached=1023, itemsize=2)
    found = rate(workload, Mix.even(MIXTRAL_8X7B, batch, 1.0)) / rate(workload, Mix.plain(MIXTRAL_8X7B, batch))
    assert found == pytest.approx(speedup, abs=0.006)


def test_every_entry_is_in_whole_units_and_says_its_source():
    for name, hardware in HARDWARE.items():
        assert 1e14 < hardware.flops < 1e16 and 5e11 < hardware.bandwidth < 1e13 and 1e10 < hardware.memory < 1e12
        assert hardware.source and hardware.measured == ("measured" in name)
    assert HARDWARE["h200-measured"].flops < HARDWARE["h200"].flops
    assert HARDWARE["h200-measured"].bandwidth < HARDWARE["h200"].bandwidth

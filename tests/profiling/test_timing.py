"""Throughput counts what runs; how long it takes decides nothing here."""

import numpy as np

from analysis.resampling import Estimate
from profiling.timing import Throughput, by_batch, by_batch_section, measure


def test_every_phase_at_every_batch_size_and_what_runs_in_it(small_var_model, documents):
    found = by_batch(small_var_model, documents, batch_sizes=(1, 3), max_length=24, decode_tokens=8, repeats=2, seed=0)
    assert [(one.phase, one.batch) for one in found] == [("prefill", 1), ("decode", 1), ("prefill", 3), ("decode", 3)]
    for one in found:
        plain, var = one.experts
        assert plain == 2 and 1 <= var < 2
        assert one.distinct[1] <= one.distinct[0] <= 4
        assert min(one.plain, one.var) > 0 and one.speedup.low <= one.speedup.value <= one.speedup.high
    alone, many = (one for one in found if one.phase == "decode")
    assert alone.distinct[0] == 2  # one token: its own experts
    assert many.distinct[0] > 2
    np.testing.assert_allclose(alone.distinct[1], alone.experts[1])

    said = by_batch_section(found)
    assert len(said.tables[0].rows) == 4 and "distinct experts" in said.words[1]
    assert said.figures[0].draw() is not None


def test_where_var_reads_no_expert_there_is_no_bound():
    ratio = Estimate(1.5, 1.4, 1.6)
    found = [Throughput(phase, 1, 8, 10.0, 15.0, ratio, (2.0, 0.0), (2.0, 0.0)) for phase in ("prefill", "decode")]
    said = by_batch_section(found)
    assert "has no bound (VAR reads no expert) on the experts at batch 1" in said.words[1]
    assert said.figures[0].draw() is not None


def test_the_rates_of_both_sides_are_of_the_same_rounds(small_var_model, documents):
    found = measure(small_var_model, documents, batch_size=3, max_length=24, decode_tokens=8, repeats=1)
    for phase in ("prefill", "decode"):
        plain = found[phase]["plain_tokens_per_second"]
        ratio = found[f"{phase}_tokens_per_second"] / plain
        np.testing.assert_allclose(ratio, found["speedup"][phase]["value"])  # of one round, its ratio
    alone = measure(small_var_model.disabled(), documents, batch_size=3, max_length=24, decode_tokens=8, repeats=1)
    assert alone["speedup"] == {} and "plain_tokens_per_second" not in alone["prefill"]

"""Distinct experts against drawing them; bytes of a look-up against a table's own arrays."""

import dataclasses

import numpy as np
import pytest

from profiling.published import MIXTRAL_8X7B
from profiling.workload import Mix, Workload, distinct_experts, table_bytes
from varjax import LayerPolicy, VARConfig
from varjax.stats import RoutingStats
from varjax.table import build_table


@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize(("k", "tokens"), [(1, 5), (2, 1), (2, 8), (3, 20)])
def test_distinct_experts_are_those_of_tokens_that_draw_different_ones(k, tokens, skewed):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=8) if skewed else np.zeros(8)
    drawn = np.argsort(-(logits + rng.gumbel(size=(20_000, tokens, 8))), axis=-1)[..., :k]
    hit = (drawn[..., None] == np.arange(8)).any(axis=-2)  # [samples, tokens, E]
    shares = hit.mean(axis=(0, 1)) / k
    simulated = hit.any(axis=1).sum(axis=-1).mean()
    assert distinct_experts(8, k, tokens, shares if skewed else None) == pytest.approx(simulated, abs=0.03)


def test_a_fraction_of_an_expert_is_a_mean_over_tokens():
    rng = np.random.default_rng(0)
    order = np.argsort(rng.random((20_000, 6, 8)), axis=-1)
    runs = rng.integers(0, 3, (20_000, 6, 1, 1))  # 0, 1 or 2 experts, 1 on average
    hit = ((order[..., :2, None] == np.arange(8)) & (np.arange(2)[:, None] < runs)).any(axis=2)
    assert distinct_experts(8, 1.0, 6) == pytest.approx(hit.any(axis=1).sum(axis=-1).mean(), abs=0.03)


def test_one_token_hits_its_own_experts_and_many_hit_all():
    skew = np.array([0.4, 0.3, 0.2, 0.1])
    assert distinct_experts(4, 2, 1, skew) == pytest.approx(2)
    assert distinct_experts(4, 2, 1000, skew) == pytest.approx(4)
    assert distinct_experts(4, 0, 1000) == distinct_experts(4, 2, 0) == 0
    assert distinct_experts(4, 2, 5, skew) < distinct_experts(4, 2, 5)  # favorites are shared


def test_shares_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"0\.7 of the assignments cannot be.*at most 0\.5"):
        distinct_experts(3, 2, 4, np.array([0.7, 0.2, 0.1]))
    with pytest.raises(ValueError, match=r"shape \(2,\).*expected \[3\]"):
        distinct_experts(3, 2, 4, np.array([0.5, 0.5]))
    with pytest.raises(ValueError, match="k=4 of 3 experts"):
        distinct_experts(3, 4, 1)


def test_a_look_up_reads_a_bucket_its_keys_and_a_row_of_every_array():
    rng = np.random.default_rng(0)
    keys = np.arange(200, dtype=np.int32)[:, None]
    stats = RoutingStats.empty(keys, (1,), 3, 4)
    count = np.full_like(stats.count, 7)
    stats = dataclasses.replace(stats, count=count, sum_probs=7 * rng.dirichlet(np.ones(4), count.shape))
    config = VARConfig(
        frequency_threshold=1, entropy_threshold=9.0, default=LayerPolicy(experts_kept=1, use_answers=False)
    )
    table = build_table(config, stats, top_k=2)

    bucket, width = table.index.buckets.shape[1], table.index.keys.shape[1]
    look_up = (table.index.buckets.nbytes / len(table.index.buckets)) + bucket * 4 * width
    rows = len(table.index.keys)
    per_row = [leaf.nbytes / rows for leaf in (table.experts_kept, table.routing.experts, table.routing.weights)]
    expected = 5 * (look_up + table.eligible.nbytes / rows + sum(per_row))
    model = dataclasses.replace(MIXTRAL_8X7B, num_layers=3)
    assert table_bytes(model, 5, orders=1, width=width, bucket=bucket) == expected


def test_a_cache_too_small_for_its_positions_is_refused():
    with pytest.raises(ValueError, match="if it is 12 or more"):
        Workload(batch=1, length=2, cached=10, capacity=11)
    with pytest.raises(ValueError, match="at least 1"):
        Workload(batch=0, length=2)


def test_what_var_leaves_out_is_answered():
    mix = Mix.even(MIXTRAL_8X7B, tokens=1, experts=0.75)
    assert (mix.experts, mix.answers, mix.distinct) == (0.75, 1.25, 0.75)
    assert mix.planned and mix.table_bytes > 0
    assert not Mix.plain(MIXTRAL_8X7B, 1).planned

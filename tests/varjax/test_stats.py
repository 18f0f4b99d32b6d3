"""Running statistics against one pass over all observations in float64."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from varjax.keys import ANY
from varjax.stats import MAX_WINDOW, Moments, RoutingStats, absorb, bytes_a_key, init, merge, spread, update

LAYERS, EXPERTS, BATCH, LENGTH = 2, 3, 2, 5
ORDERS = (1, 2)
KEYS = np.array([[ANY, 0], [ANY, 1], [ANY, 2], [0, 0], [0, 1], [1, 2]], np.int32)
EMPTY = RoutingStats.empty(KEYS, ORDERS, LAYERS, EXPERTS)


def batches(seed: int, number: int = 3) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(rows, probs, mask) with padding, absent keys, certain routers, NaN and infinity."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(number):
        rows = np.stack([rng.integers(-1, 3, (BATCH, LENGTH)), rng.integers(2, 6, (BATCH, LENGTH))])
        rows[1][rows[1] == 2] = -1
        probs = rng.dirichlet(np.full(EXPERTS, 0.5), (LAYERS, BATCH, LENGTH)).astype(np.float32)
        probs[rng.random(probs.shape[:-1]) < 0.1] = np.eye(EXPERTS)[0]
        probs[rng.random(probs.shape) < 0.02] = np.nan
        probs[rng.random(probs.shape) < 0.02] = np.inf
        made.append((rows.astype(np.int32), probs, rng.random((BATCH, LENGTH)) < 0.8))
    return made


def oracle(made, keys=KEYS) -> RoutingStats:
    """Everything at once, one row and layer at a time, in float64."""
    rows, mask = (np.concatenate([batch[i] for batch in made], axis=-1) for i in (0, 2))
    probs = np.concatenate([batch[1] for batch in made], axis=2).astype(np.float64)
    finite = np.isfinite(probs).all(axis=-1)
    stats = RoutingStats.empty(keys, ORDERS, LAYERS, EXPERTS)
    entropy, confidence = (
        Moments(*(np.array(field) for field in vars(moments).values())) for moments in (stats.entropy, stats.confidence)
    )
    for layer in range(LAYERS):
        for row in range(len(keys)):
            seen = probs[layer][(rows == row).any(axis=0) & mask & finite[layer]]
            stats.count[layer, row] = len(seen)
            stats.sum_probs[layer, row] = seen.sum(axis=0)
            stats.top1_counts[layer, row] = np.bincount(seen.argmax(axis=-1), minlength=EXPERTS)
            values = -np.sum(seen * np.log(np.where(seen > 0, seen, 1)), axis=-1), seen.max(axis=-1, initial=0)
            for moments, value in zip((entropy, confidence), values, strict=True):
                if len(seen):
                    moments.mean[layer, row], moments.m2[layer, row] = value.mean(), value.var() * len(value)
                    moments.min[layer, row], moments.max[layer, row] = value.min(), value.max()
    return replace(
        stats,
        entropy=entropy,
        confidence=confidence,
        nonfinite=(~finite & mask).sum(axis=(1, 2)),
        absent=((rows < 0) & mask).sum(axis=(1, 2)),
        tokens=int(mask.sum()),
    )


def collect(made, flush_each: bool = False, stats: RoutingStats = EMPTY) -> RoutingStats:
    buffer = init(stats)
    for rows, probs, mask in made:
        buffer = update(buffer, jnp.asarray(rows), jnp.asarray(probs), jnp.asarray(mask))
        if flush_each:
            stats = absorb(buffer, stats)
            buffer = init(stats)
    return absorb(buffer, stats)


def assert_same(a: RoutingStats, b: RoutingStats, tolerance: float) -> None:
    """Counts exactly, the rest within a tolerance relative to values of about 1."""
    for name in ("keys", "count", "top1_counts", "nonfinite", "absent"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), name)
    assert (a.ngram_orders, a.tokens, a.documents) == (b.ngram_orders, b.tokens, b.documents)
    np.testing.assert_allclose(a.sum_probs, b.sum_probs, tolerance, tolerance)
    for ours, theirs in ((a.entropy, b.entropy), (a.confidence, b.confidence)):
        for name, value in vars(ours).items():
            np.testing.assert_allclose(value, getattr(theirs, name), tolerance, tolerance, err_msg=name)


@given(seed=st.integers(0, 2**32 - 1), flush_each=st.booleans())
@settings(max_examples=30, deadline=None)
def test_updates_equal_one_pass_in_float64(seed, flush_each):
    made = batches(seed)
    assert_same(collect(made, flush_each), oracle(made), 2e-6)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_merged_parts_equal_the_whole(seed):
    made = batches(seed, 4)
    assert_same(merge(oracle(made[:1]), oracle(made[1:])), oracle(made), 1e-13)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_merge_takes_the_union_of_keys(seed):
    """Two parts that hold each key of the whole at other rows, or not at all."""
    rng = np.random.default_rng(seed)
    made = batches(seed, 2)
    order = rng.permutation(len(KEYS))
    held = order[: rng.integers(0, len(KEYS) + 1)]  # the rows that the second part knows
    row_there = np.full(len(KEYS) + 1, -1)
    row_there[held] = np.arange(len(held))
    rows, probs, mask = made[1]
    second = oracle([(row_there[rows].astype(np.int32), probs, mask)], KEYS[held])
    known_here = np.where(np.isin(rows, held), rows, -1)
    assert_same(merge(oracle(made[:1]), second), oracle([made[0], (known_here, probs, mask)]), 1e-13)
    only_second = merge(RoutingStats.empty(KEYS[:0], ORDERS, LAYERS, EXPERTS), second)
    assert_same(only_second, second, 0)


def test_merge_with_nothing_changes_nothing():
    stats = replace(oracle(batches(0)), documents=3)
    assert_same(merge(stats, EMPTY), stats, 0)
    assert_same(merge(EMPTY, stats), stats, 0)


def test_merge_refuses_other_layers():
    other = RoutingStats.empty(KEYS, ORDERS, LAYERS + 1, EXPERTS)
    with pytest.raises(ValueError, match="same orders, layers and experts"):
        merge(EMPTY, other)


def test_a_fault_in_one_layer_leaves_the_others():
    probs = np.full((LAYERS, 1, 1, EXPERTS), 1 / EXPERTS, np.float32)
    probs[0, 0, 0, 1] = np.nan
    stats = collect([(np.array([[[0]], [[3]]], np.int32), probs, np.ones((1, 1), bool))])
    assert stats.nonfinite.tolist() == [1, 0]
    assert stats.count[:, 0].tolist() == stats.count[:, 3].tolist() == [0, 1]
    assert stats.entropy.mean[1, 0] == pytest.approx(np.log(EXPERTS))
    assert np.isnan(stats.entropy.mean[0, 0])


def test_derived_quantities():
    stats = oracle(batches(5, 6))
    count = stats.count
    assert (count > 0).all()
    np.testing.assert_allclose(stats.std_entropy**2 * count, stats.entropy.m2)
    np.testing.assert_allclose(stats.std_confidence**2 * count, stats.confidence.m2)
    np.testing.assert_allclose(stats.mean_probs.sum(axis=-1), 1, rtol=1e-6)
    np.testing.assert_allclose(stats.routing_consistency * count, stats.top1_counts.max(axis=-1))
    assert stats.row_orders.tolist() == [1, 1, 1, 2, 2, 2]
    for value in (EMPTY.std_entropy, EMPTY.mean_probs, EMPTY.routing_consistency):
        assert np.isnan(value).all()


def test_resuming_from_the_flushed_statistics_changes_nothing():
    made = batches(1, 4)
    stats = collect(made[:2])
    assert_same(collect(made[2:], stats=stats), collect(made[2:], stats=merge(EMPTY, stats)), 0)


def test_documents_are_added():
    assert absorb(init(EMPTY), replace(EMPTY, documents=2), documents=3).documents == 5


def test_bytes_a_key_are_those_of_the_window():
    buffer = init(EMPTY)
    by_key = (buffer.sums, buffer.lows, buffer.center, buffer.center_probs)
    assert sum(leaf.nbytes for leaf in by_key) == len(KEYS) * bytes_a_key(LAYERS, EXPERTS)


def test_no_keys_at_all():
    nothing = RoutingStats.empty(KEYS[:0], ORDERS, LAYERS, EXPERTS)
    rows, probs, mask = batches(2, 1)[0]
    stats = collect([(np.full_like(rows, -1), probs, mask)], stats=nothing)
    assert stats.absent.tolist() == [mask.sum()] * 2
    assert stats.count.shape == (LAYERS, 0)


def test_a_small_deviation_around_a_large_mean_keeps_its_digits():
    """Entropy near ln 2 with a standard deviation of about 1e-3, in the first window of a new row."""
    rng = np.random.default_rng(0)
    first = (0.45 + 0.005 * rng.random((1, 1, 20_000))).astype(np.float32)
    probs = np.stack([first, np.float32(1) - first], axis=-1)
    empty = RoutingStats.empty(KEYS[:1], (1,), 1, 2)
    stats = collect([(np.zeros((1, 1, 20_000), np.int32), probs, np.ones((1, 20_000), bool))], stats=empty)
    exact = -np.sum(probs.astype(np.float64) * np.log(probs.astype(np.float64)), axis=-1)
    assert exact.std() < 2e-3
    assert stats.std_entropy[0, 0] == pytest.approx(exact.std(), rel=1e-4)
    assert stats.std_confidence[0, 0] == pytest.approx(probs.max(axis=-1).astype(np.float64).std(), rel=1e-4)


def test_a_hot_key_keeps_five_digits():
    """10**7 observations of one key through the device, in windows of 2**16; then ten such runs merged to 10**8."""
    window, windows, pool = 2**16, 160, 8
    rng = np.random.default_rng(0)
    draws = rng.dirichlet(np.full(EXPERTS, 0.6), (pool, 1, 1, window)).astype(np.float32)
    exact = draws.astype(np.float64)
    entropy = -np.sum(exact * np.log(np.maximum(exact, 1e-300)), axis=-1)
    rows, mask = jnp.zeros((1, 1, window), jnp.int32), jnp.ones((1, window), bool)
    batches_on_device = [jnp.asarray(draw) for draw in draws]

    stats = RoutingStats.empty(KEYS[:1], (1,), 1, EXPERTS)
    buffer = init(stats)
    for number in range(windows):
        buffer = update(buffer, rows, batches_on_device[number % pool], mask)
        stats = absorb(buffer, stats)
        buffer = init(stats)
    assert stats.count[0, 0] == windows * window > 10**7

    run = stats
    for _ in range(9):
        stats = merge(stats, run)
    assert stats.count[0, 0] > 10**8
    for result in (run, stats):
        assert result.entropy.mean[0, 0] == pytest.approx(entropy.mean(), rel=1e-5)
        assert result.std_entropy[0, 0] == pytest.approx(entropy.std(), rel=1e-5)
        assert result.confidence.mean[0, 0] == pytest.approx(exact.max(axis=-1).mean(), rel=1e-5)
        assert result.std_confidence[0, 0] == pytest.approx(exact.max(axis=-1).std(), rel=1e-5)
        np.testing.assert_allclose(result.mean_probs[0, 0], exact.mean(axis=(0, 1, 2, 3)), rtol=1e-5)


def test_update_is_traced_once_and_donates():
    traces = 0

    def counted(buffer, rows, probs, mask):
        nonlocal traces
        traces += 1
        return update(buffer, rows, probs, mask)

    step = jax.jit(counted, donate_argnums=0)
    stats, old = EMPTY, init(EMPTY)
    for batch in batches(3, 3):
        new = step(old, *map(jnp.asarray, batch))
        assert old.sums.is_deleted()
        stats = absorb(new, stats)
        old = init(stats)
    assert traces == 1


def test_update_refuses_shapes_that_do_not_fit():
    rows, probs, mask = map(jnp.asarray, batches(4, 1)[0])
    with pytest.raises(ValueError, match="2 orders, 2 layers and 3 experts"):
        update(init(EMPTY), rows[:1], probs, mask)


def test_a_window_beyond_exact_counts_is_refused():
    buffer = replace(init(EMPTY), tokens=jnp.int32(MAX_WINDOW + 1))
    with pytest.raises(ValueError, match="flush more often"):
        absorb(buffer, EMPTY)


def test_spread_puts_layers_where_they_belong():
    some = oracle(batches(3))
    wide = spread(some, (1, 3), 5)
    np.testing.assert_array_equal(wide.count[[1, 3]], some.count)
    np.testing.assert_array_equal(wide.entropy.mean[[1, 3]], some.entropy.mean)
    assert not wide.count[[0, 2, 4]].any() and np.isnan(wide.confidence.max[[0, 2, 4]]).all()
    assert (wide.tokens, wide.ngram_orders) == (some.tokens, some.ngram_orders)

"""Keys against plain Python: windows token by token, look-up in a dict, counting in a Counter."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from varjax import keys as keys_module
from varjax.keys import ABSENT, ANY, NONE, KeyIndex, contexts, count_contexts, find_orders, hash_words

SMALL_IDS = st.integers(0, 4)  # few ids, so that contexts repeat
DOCUMENTS = st.lists(st.lists(SMALL_IDS, max_size=12), max_size=5)


def murmur3(words: list[int]) -> int:
    """MurmurHash3_x86_32 with seed 0, as published, over 32-bit words."""

    def rotate(x: int, bits: int) -> int:
        return (x << bits | x >> (32 - bits)) & 0xFFFFFFFF

    state = 0
    for word in words:
        mixed = rotate((word & 0xFFFFFFFF) * 0xCC9E2D51 & 0xFFFFFFFF, 15) * 0x1B873593 & 0xFFFFFFFF
        state = (rotate(state ^ mixed, 13) * 5 + 0xE6546B64) & 0xFFFFFFFF
    state ^= 4 * len(words)
    state = (state ^ state >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    state = (state ^ state >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    return state ^ state >> 16


def padded(ids: list[int], width: int) -> tuple[int, ...]:
    """The ids as a key: ANY before them."""
    return (*[ANY] * (width - len(ids)), *ids)


def slow_counts(documents: list[list[int]], order: int, special: set[int]) -> Counter:
    """How often each context of one order occurs."""
    return Counter(
        tuple(ids[end - order : end])
        for ids in documents
        for end in range(order, len(ids) + 1)
        if ids[end - 1] not in special
    )


@given(st.lists(st.integers(-2, 2**31 - 1), min_size=1, max_size=4))
@settings(max_examples=30, deadline=None)
def test_hash_is_murmur3_in_numpy_and_in_jax(words):
    ids = np.array(words, np.int32)
    assert int(hash_words(ids)) == murmur3(words)
    assert int(jax.jit(hash_words)(jnp.asarray(ids))) == murmur3(words)


def test_hash_of_a_published_vector():
    assert int(hash_words(np.zeros(1, np.int32))) == 0x2362F9DE


@given(seed=st.integers(0, 2**32 - 1), length=st.sampled_from((1, 4)), use_mask=st.booleans())
@settings(max_examples=30, deadline=None)
def test_contexts_are_the_last_real_ids(seed, length, use_mask):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 50, (3, 7)).astype(np.int32)
    recent = rng.integers(0, 50, (3, 3)).astype(np.int32)
    for row, missing in zip(recent, rng.integers(0, 4, 3), strict=True):
        row[:missing] = NONE
    mask = rng.random((3, 7)) < 0.6 if use_mask else np.ones((3, 7), bool)
    given_mask = jnp.asarray(mask) if use_mask else None
    got = jax.jit(contexts, static_argnums=2)(jnp.asarray(ids), jnp.asarray(recent), length, given_mask)
    assert got.dtype == jnp.int32
    got = got.tolist()

    for b in range(3):
        past = recent[b].tolist()
        for t in range(7):
            if mask[b, t]:
                past.append(int(ids[b, t]))
                expected = past[-length:]
            else:
                expected = [NONE] * length
            assert got[b][t] == expected


def test_contexts_of_two_steps_equal_those_of_one():
    ids = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)
    start = jnp.full((2, 2), NONE, jnp.int32)
    whole = contexts(ids, start, 3)
    parts = [contexts(ids[:, :4], start, 3), contexts(ids[:, 4:], ids[:, 2:4], 3)]
    np.testing.assert_array_equal(whole, jnp.concatenate(parts, axis=1))


def test_contexts_need_enough_recent_ids():
    with pytest.raises(ValueError, match="3 ids need 2 recent"):
        contexts(jnp.zeros((1, 4), jnp.int32), jnp.zeros((1, 1), jnp.int32), 3)


@given(
    keys=st.lists(st.lists(SMALL_IDS, max_size=3).map(tuple), unique=True, min_size=12, max_size=12),
    queries=st.lists(st.tuples(*[st.integers(-2, 4)] * 3), min_size=8, max_size=8),
)
@settings(max_examples=40, deadline=None)
def test_find_equals_a_dictionary(keys, queries):
    rows = np.array([padded(list(key), 3) for key in keys], np.int32)
    known = {tuple(row): number for number, row in enumerate(rows.tolist())}
    every = [*map(tuple, rows.tolist()), *queries]
    found = jax.jit(KeyIndex.find)(KeyIndex.build(rows), jnp.asarray(every, jnp.int32))
    assert found.tolist() == [known.get(query, ABSENT) for query in every]


def test_keys_in_one_bucket_are_told_apart(monkeypatch):
    monkeypatch.setattr("varjax.keys.hash_words", lambda ids: (ids[..., 0] * 0).astype(np.uint32))
    keys = np.arange(20, dtype=np.int32).reshape(10, 2)
    index = KeyIndex.build(keys)
    assert index.find(jnp.asarray(keys)).tolist() == list(range(10))
    assert index.find(jnp.asarray(keys + 1)).tolist() == [ABSENT] * 10


def test_many_keys_are_all_found_and_buckets_stay_short():
    keys = np.random.default_rng(0).permutation(10**6)[:100_000].astype(np.int32)[:, None]
    index = KeyIndex.build(np.pad(keys, ((0, 0), (2, 0)), constant_values=ANY))
    assert index.buckets.shape[1] <= 10
    np.testing.assert_array_equal(index.find(index.keys), np.arange(100_000))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([[1, 2], [3, 4], [1, 2]], r"\[1, 2\] stands in rows 0 and 2"),
        ([[1, -2]], r"key 0 is \[1, -2\]"),
        ([[1, ANY]], r"key 0 is \[1, -1\]"),
        ([[ANY, ANY], [5, 1], [ANY, ANY]], r"\[-1, -1\] stands in rows 0 and 2"),
        ([[NONE, NONE]], r"key 0 is \[-2, -2\]"),
        ([[1, ANY, 2]], r"key 0 is"),
        ([[1, 2**31]], "2147483648"),
        ([1, 2], r"\[R, C\]"),
        ([[0.5]], "float64"),
    ],
)
def test_bad_keys_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        KeyIndex.build(np.array(keys))


@pytest.mark.parametrize("seed", range(3))
def test_find_orders_looks_at_the_last_ids_only(seed):
    rng = np.random.default_rng(seed)
    documents = rng.integers(0, 4, (2, 9))
    orders = (1, 3)
    keys = count_contexts(documents, orders, min_count=2).keys
    index = KeyIndex.build(keys)
    ids, start = jnp.asarray(documents, jnp.int32), jnp.full((2, 3), NONE, jnp.int32)
    rows = jax.jit(lambda index, c: find_orders(index, c, orders))(index, contexts(ids, start, 4)).tolist()
    known = {tuple(key): row for row, key in enumerate(keys.tolist())}
    for o, order in enumerate(orders):
        for b in range(2):
            for t in range(9):
                ids_here = documents[b, max(0, t + 1 - order) : t + 1].tolist()
                key = padded(ids_here, 3) if len(ids_here) == order else None
                assert rows[o][b][t] == known.get(key, ABSENT)


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("present", [True, False])
def test_the_key_of_order_0_is_at_every_real_token_and_at_no_padding(width, length, present):
    rng = np.random.default_rng(0)
    keys = np.pad(rng.permutation(9)[:5, None], ((0, 0), (width - 1, 0)), constant_values=ANY)
    index = KeyIndex.build(np.concatenate([keys, np.full((int(present), width), ANY)]))
    ids, mask = rng.integers(0, 9, (3, 8)).astype(np.int32), rng.random((3, 8)) < 0.6
    recent = jnp.full((3, length - 1), NONE, jnp.int32)  # so contexts at the beginning reach back too far
    none, single = find_orders(index, contexts(jnp.asarray(ids), recent, length, jnp.asarray(mask)), (0, 1))
    np.testing.assert_array_equal(none, np.where(mask & present, 5, ABSENT))
    known = {int(key): row for row, key in enumerate(keys[:, -1])}
    expected = np.vectorize(lambda i: known.get(int(i), ABSENT))(ids)
    np.testing.assert_array_equal(single, np.where(mask, expected, ABSENT))


def test_an_empty_index_finds_nothing():
    index = KeyIndex.build(np.zeros((0, 2), np.int32))
    recent = contexts(jnp.ones((2, 3), jnp.int32), jnp.ones((2, 1), jnp.int32), 2)
    assert bool(jnp.all(find_orders(index, recent, (1, 2)) == ABSENT))


@pytest.mark.parametrize("orders", [(), (-1,), (1, 3)])
def test_orders_beyond_the_keys_are_refused(orders):
    index = KeyIndex.build(np.zeros((1, 2), np.int32))
    with pytest.raises(ValueError, match=r"must be in 0\.\.2"):
        find_orders(index, jnp.zeros((1, 1, 4), jnp.int32), orders)


@given(
    documents=DOCUMENTS,
    orders=st.sets(st.integers(1, 3), min_size=1),
    min_count=st.integers(1, 3),
    max_keys=st.none() | st.integers(0, 12),
    special=st.sets(SMALL_IDS, max_size=2),
)
@settings(max_examples=80, deadline=None)
def test_count_contexts_equals_a_counter(documents, orders, min_count, max_keys, special):
    arrays = (np.array(ids, np.int32) for ids in documents)  # an iterator is enough
    got = count_contexts(arrays, tuple(orders), min_count, max_keys, special)

    width = max(orders)
    seen = {order: slow_counts(documents, order, special) for order in sorted(orders)}
    ranked = sorted(
        ((-count, order, key[::-1]) for order in seen for key, count in seen[order].items() if count >= min_count)
    )
    kept = sorted(ranked[:max_keys], key=lambda entry: entry[1])  # stable: by order, then as ranked
    assert [tuple(key) for key in got.keys.tolist()] == [padded(list(key[::-1]), width) for *_, key in kept]
    assert got.counts.tolist() == [-count for count, *_ in kept]
    for report in got.orders:
        assert report.distinct == len(seen[report.order])
        assert report.occurrences == seen[report.order].total()
        assert report.admitted == sum(order == report.order for _, order, _ in kept)
        assert report.occurrences_admitted == sum(-count for count, order, _ in kept if order == report.order)
    assert (got.keys.dtype, got.counts.dtype) == (np.int32, np.int64)


@given(documents=DOCUMENTS, max_keys=st.integers(1, 20))
@settings(max_examples=30, deadline=None)
def test_the_shorter_key_is_admitted_too(documents, max_keys):
    keys = count_contexts(map(np.array, documents), (1, 2, 3), max_keys=max_keys).keys.tolist()
    for key in keys:
        longer = [place for place in key if place != ANY]
        assert len(longer) == 1 or list(padded(longer[1:], 3)) in keys


def test_count_contexts_takes_ids_up_to_the_largest():
    largest = 2**31 - 1
    got = count_contexts([np.array([largest, largest, largest])], (3,))
    assert got.keys.tolist() == [[largest] * 3]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (np.array([3, -1]), "document 1 holds the id -1 at position 1"),
        (np.array([2**31]), "document 1 holds the id 2147483648"),
        (np.array([[1]]), r"document 1 must be a 1-D array"),
        (np.array([0.5]), r"document 1 must be a 1-D array"),
    ],
)
def test_bad_documents_are_refused(document, message):
    with pytest.raises(ValueError, match=message):
        count_contexts([np.array([1, 2]), document], (1,))


@pytest.mark.parametrize("settings", [{"ngram_orders": ()}, {"ngram_orders": (0,)}, {"min_count": 0}, {"max_keys": -1}])
def test_bad_counting_settings_are_refused(settings):
    with pytest.raises(ValueError, match="at least one order"):
        count_contexts([], **({"ngram_orders": (1,)} | settings))


@settings(deadline=None)
@given(documents=st.lists(st.lists(st.integers(0, 3), max_size=12), max_size=8), chunk=st.integers(1, 12))
def test_counting_in_chunks_changes_nothing(documents, chunk):
    arrays = [np.array(document, np.int64) for document in documents]
    whole = count_contexts(arrays, (1, 3), min_count=2, max_keys=7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keys_module, "_CHUNK", chunk)
        parts = count_contexts(iter(arrays), (1, 3), min_count=2, max_keys=7)
    np.testing.assert_array_equal(parts.keys, whole.keys)
    np.testing.assert_array_equal(parts.counts, whole.counts)
    assert parts.orders == whole.orders


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 30), min_size=1, max_size=200), capacity=st.integers(1, 8))
def test_a_bounded_count_is_never_too_high_and_at_most_undercount_too_low(ids, capacity):
    arrays = np.array_split(np.array(ids), 1 + len(ids) // 10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keys_module, "_CHUNK", 10)
        got = count_contexts(arrays, (1,), capacity=capacity)
    (order,) = got.orders
    true = np.bincount(ids, minlength=31)
    assert len(got.keys) <= capacity
    counted = np.zeros_like(true)
    counted[got.keys[:, 0]] = got.counts
    assert (counted <= true).all() and (true - counted <= order.undercount).all()
    assert order.occurrences == len(ids) and order.distinct >= len(set(ids))

"""Context keys: which tokens share a row of a table, and an exact look-up of that row.

Letters: B sequences, T positions, C key width (the longest order), R keys (rows), O orders, S buckets (a power
of two), W slots per bucket.

A key of order n is the last n token ids, the current one last. Keys of all orders share one width: int32
[..., C], right-aligned, with `ANY` in the leading places that a shorter order does not look at. In a
context, `NONE` fills the places before the start of a sequence; no key holds it, so a context that
reaches back too far matches nothing.

Keys are exact: the hash only finds the bucket, then the ids themselves are compared. The keys depend on token ids
alone (`count_contexts`), so they are chosen on the host before any model runs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from varjax.errors import InputError
from varjax.transfer import to_device

ANY = -1  # a place that the key's order does not look at
NONE = -2  # no token: before the start of a sequence, or padding
ABSENT = -1  # the row of a context that is not a key

_CHUNK = 1 << 19  # tokens that are counted at once

AnyArray = TypeVar("AnyArray", np.ndarray, Array)


def contexts(token_ids: Array, recent: Array, length: int, mask: Array | None = None) -> Array:
    """The last `length` ids at every position, its own included.

    Padding is skipped on either side: a context consists of real tokens only, and reaches back through
    `recent` into earlier calls. A padded position has no context.

    Args:
        token_ids: int32 [B, T].
        recent: int32 [B, >= length - 1], ids before position 0, the latest last; NONE where there is none.
        length: ids per context.
        mask: bool [B, T], True at real tokens; None where there is no padding.

    Returns:
        int32 [B, T, length], right-aligned; NONE before the start, and in all places of a padded position.

    Raises:
        InputError: `recent` holds too few ids.
    """
    batch, steps = token_ids.shape
    before = recent.shape[1]
    if before < length - 1:
        raise InputError(
            f"contexts of {length} ids need {length - 1} recent ids per sequence, `recent` holds {before}: widen it"
        )
    if mask is None:
        ids = jnp.concatenate([recent, token_ids], axis=1).astype(jnp.int32)
        last = jnp.broadcast_to(before + jnp.arange(steps, dtype=jnp.int32), (batch, steps))
    else:
        # Real tokens move together behind `recent`; `last` is the place of each of them.
        last = before + jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1
        width = before + steps
        sequence = jnp.arange(batch, dtype=jnp.int32)[:, None]
        ids = jnp.concatenate([recent, jnp.full_like(token_ids, NONE)], axis=1).astype(jnp.int32)
        ids = ids.at[sequence, jnp.where(mask, last, width)].set(token_ids.astype(jnp.int32), mode="drop")
    places = last[..., None] + jnp.arange(1 - length, 1, dtype=jnp.int32)[None, None]
    windows = jnp.take_along_axis(ids[:, None, :], jnp.maximum(places, 0), axis=2)
    return windows if mask is None else jnp.where(mask[..., None], windows, NONE)


def hash_words(ids: AnyArray) -> AnyArray:
    """MurmurHash3 (32 bit, seed 0), the same in NumPy and in JAX.

    Args:
        ids: int32 [..., C].

    Returns:
        uint32 [...].
    """
    words = ids.astype(np.uint32)
    length = words.shape[-1]
    state = words[..., :1] * np.uint32(0)  # the axis stays: NumPy warns of wrap-around in scalars only
    for place in range(length):
        mixed = _rotate(words[..., place : place + 1] * np.uint32(0xCC9E2D51), 15) * np.uint32(0x1B873593)
        state = _rotate(state ^ mixed, 13) * np.uint32(5) + np.uint32(0xE6546B64)
    state = state ^ np.uint32(4 * length)
    state = (state ^ (state >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    state = (state ^ (state >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return (state ^ (state >> np.uint32(16)))[..., 0]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KeyIndex:
    """An exact look-up from key to row. One index holds the keys of all orders; row r is `keys[r]`."""

    buckets: Array  # int32 [S, W], rows of the keys that hash here, ABSENT in free slots
    keys: Array  # int32 [R, C]

    @classmethod
    def build(cls, keys: np.ndarray) -> KeyIndex:
        """Index some keys.

        Args:
            keys: int [R, C], right-aligned, with ANY before the ids of a shorter order (order 0: ANY alone).

        Returns:
            The index, on the device.

        Raises:
            InputError: not a matrix; an id negative or wider than int32; ANY behind an id; a key twice.
        """
        keys = _checked_keys(keys)
        num_keys = len(keys)
        num_buckets = 1 << max(0, 2 * num_keys - 1).bit_length()  # at most half full: buckets stay short
        bucket = hash_words(keys) & np.uint32(num_buckets - 1)
        by_bucket = np.argsort(bucket, kind="stable")
        ordered = bucket[by_bucket]
        slot = np.arange(num_keys) - np.searchsorted(ordered, ordered)  # rank within the bucket
        buckets = np.full((num_buckets, slot.max(initial=0) + 1), ABSENT, np.int32)
        buckets[ordered, slot] = by_bucket
        return cls(*to_device((buckets, keys)))

    def find(self, queries: Array) -> Array:
        """Look up keys; a pure gather, fit for jit.

        Args:
            queries: int32 [..., C].

        Returns:
            int32 [...], the row of each query, ABSENT where it is not a key.

        Raises:
            InputError: the queries have another width.
        """
        num_keys, width = self.keys.shape
        if queries.shape[-1] != width:
            raise InputError(f"this index holds keys of {width} ids, got queries of {queries.shape[-1]}")
        if num_keys == 0:
            return jnp.full(queries.shape[:-1], ABSENT, jnp.int32)
        rows = self.buckets[hash_words(queries) & np.uint32(len(self.buckets) - 1)]  # [..., W]
        same = jnp.all(self.keys[rows] == queries[..., None, :], axis=-1)
        return jnp.max(jnp.where(same & (rows != ABSENT), rows, ABSENT), axis=-1)

    def rows(self, queries: np.ndarray) -> np.ndarray:
        """`find` for arrays of the host.

        Args:
            queries: int [..., C].

        Returns:
            int32 [...].
        """
        return np.asarray(_find(self, to_device(np.asarray(queries, np.int32))))


_find = jax.jit(KeyIndex.find)


def find_orders(index: KeyIndex, contexts: Array, ngram_orders: Sequence[int]) -> Array:
    """Look up the last ids at every position, once per order.

    Args:
        index: keys of any orders, width C.
        contexts: int32 [B, T, >= max(ngram_orders)], from `contexts`.
        ngram_orders: how many of the last ids to look at, each from 0 to C. The key of order 0 is at every real token.

    Returns:
        int32 [O, B, T], the row, ABSENT where the last ids are no key.

    Raises:
        InputError: an order is out of range.
    """
    width = index.keys.shape[1]
    longest = min(width, contexts.shape[-1])
    if not ngram_orders or min(ngram_orders) < 0 or max(ngram_orders) > longest:
        raise InputError(
            f"ngram_orders {tuple(ngram_orders)} must be in 0..{longest}; "
            f"keys hold {width} ids, contexts {contexts.shape[-1]}"
        )
    padding = [(0, 0)] * (contexts.ndim - 1) + [(width - longest, 0)]
    recent = jnp.pad(contexts[..., -longest:], padding, constant_values=ANY)
    seen = np.arange(width) >= width - np.asarray(ngram_orders)[:, None]  # [O, C]
    real = recent[..., -1:] != NONE
    return index.find(jnp.where(seen[:, None, None, :] | ~real[None], recent[None], ANY))


def find_rows(index: KeyIndex, token_ids: Array, ngram_orders: Sequence[int], mask: Array | None = None) -> Array:
    """`find_orders` of whole texts, which have no past.

    Args:
        index: keys of any orders, width C.
        token_ids: int32 [B, T].
        ngram_orders: how many of the last ids to look at, each from 0 to C.
        mask: bool [B, T], True at real tokens; None where there is no padding.

    Returns:
        int32 [O, B, T], ABSENT where the last ids are no key.
    """
    length = max(1, *ngram_orders)
    recent = jnp.full((token_ids.shape[0], length - 1), NONE, jnp.int32)
    return find_orders(index, contexts(token_ids, recent, length, mask), ngram_orders)


class OrderCount(NamedTuple):
    """What `count_contexts` saw of one order."""

    order: int
    distinct: int  # different contexts; an upper bound where `undercount` is not 0
    admitted: int  # of these, keys
    occurrences: int  # positions with such a context
    occurrences_admitted: int  # of these, at a key; a lower bound where `undercount` is not 0
    undercount: int  # by how much a count may be too low, because rare contexts were forgotten; 0: exact


class ContextCounts(NamedTuple):
    """The admitted keys: by order, then by falling count, then by ids."""

    keys: np.ndarray  # int32 [R, C]
    counts: np.ndarray  # int64 [R], occurrences
    orders: tuple[OrderCount, ...]


def count_contexts(
    documents: Iterable[np.ndarray],
    ngram_orders: Sequence[int],
    min_count: int = 1,
    max_keys: int | None = None,
    special_ids: Collection[int] = (),
    capacity: int = 1 << 20,
) -> ContextCounts:
    """Choose the keys: count every context of every order and admit the frequent ones.

    No context crosses from one document into the next. Of equally frequent contexts the shorter is
    admitted first, then the one with the smaller ids, from the current one backwards. So with orders 1 to n,
    whenever a key is admitted, the key one id shorter is too, as long as all counts are exact.

    The documents may be a stream of any length. Where an order shows more different contexts than `capacity`,
    the rarest are forgotten, as in lossy counting (Manku and Motwani 2002): a context that is left was counted since it
    last came in, so its count is at most `undercount` too low, and never too high. Host memory: about 12 + 4 C
    bytes per order and context held, and 60 MB for the documents that are being counted.

    Args:
        documents: 1-D integer arrays of token ids >= 0.
        ngram_orders: context lengths to count, in ids; the keys' width C is the largest.
        min_count: occurrences that a key needs.
        max_keys: keys to admit at most, over all orders together; None for no bound.
        special_ids: tokens such as start and padding; no key ends in one.
        capacity: different contexts of one order that are held.

    Returns:
        The keys, their counts, and a report on each order.

    Raises:
        InputError: a document is not a 1-D array of ids in int32, or another argument is out of range.
    """
    ngram_orders = sorted(set(ngram_orders))
    if (
        not ngram_orders
        or ngram_orders[0] < 1
        or min_count < 1
        or (max_keys is not None and max_keys < 0)
        or capacity < 1
    ):
        raise InputError(
            "need at least one order, ngram_orders >= 1, min_count >= 1, max_keys >= 0 and capacity >= 1; "
            f"got ngram_orders {ngram_orders}, min_count {min_count}, max_keys {max_keys}, capacity {capacity}"
        )
    special = np.fromiter(special_ids, np.int64)
    tallies = [_Tally.empty(order) for order in ngram_orders]
    for ids, position in _chunks(documents):
        fresh = _occurring(ids, position, ~np.isin(ids, special), ngram_orders)
        tallies = [tally.with_chunk(*found, capacity) for tally, found in zip(tallies, fresh, strict=True)]

    # Each order comes sorted by current id, then the one before, ...: a stable sort breaks ties as promised.
    every_key = np.concatenate([_widened(tally.keys, ngram_orders[-1]) for tally in tallies])
    every_count = np.concatenate([tally.counts for tally in tallies])
    which = np.repeat(ngram_orders, [len(tally.counts) for tally in tallies])
    frequent = np.argsort(-every_count, kind="stable")[:max_keys]
    frequent = frequent[every_count[frequent] >= min_count]
    frequent = frequent[np.argsort(which[frequent], kind="stable")]
    report = tuple(
        OrderCount(
            order=order,
            distinct=len(tally.counts) + tally.forgotten,
            admitted=int(np.sum(which[frequent] == order)),
            occurrences=tally.occurrences,
            occurrences_admitted=int(every_count[frequent][which[frequent] == order].sum()),
            undercount=tally.undercount,
        )
        for order, tally in zip(ngram_orders, tallies, strict=True)
    )
    return ContextCounts(every_key[frequent], every_count[frequent], report)


class _Tally(NamedTuple):
    """The contexts of one order counted so far, by current id, then the one before, ..."""

    keys: np.ndarray  # int32 [n, order]
    counts: np.ndarray  # int64 [n]
    occurrences: int
    undercount: int
    forgotten: int  # contexts; one that came back and was forgotten again counts twice

    @classmethod
    def empty(cls, order: int) -> _Tally:
        return cls(np.zeros((0, order), np.int32), np.zeros(0, np.int64), 0, 0, 0)

    def with_chunk(self, keys: np.ndarray, counts: np.ndarray, capacity: int) -> _Tally:
        """With the different contexts int32 [m, order] of one chunk and their counts int64 [m]."""
        occurrences = self.occurrences + int(counts.sum())
        if len(self.keys):
            keys, counts = np.concatenate([self.keys, keys]), np.concatenate([self.counts, counts])
            by_ids = np.lexsort(keys.T)
            keys, counts = keys[by_ids], counts[by_ids]
            starts = np.flatnonzero(np.append(True, np.any(keys[1:] != keys[:-1], axis=1)))
            keys, counts = keys[starts], np.add.reduceat(counts, starts)
        if len(counts) <= capacity:
            return self._replace(keys=keys, counts=counts, occurrences=occurrences)
        # The largest count that does not fit goes, with all that are equal to it.
        bar = int(np.partition(counts, len(counts) - capacity - 1)[len(counts) - capacity - 1])
        left = counts > bar
        forgotten = self.forgotten + int(np.sum(~left))
        return _Tally(keys[left], counts[left], occurrences, self.undercount + bar, forgotten)


def _occurring(
    ids: np.ndarray, position: np.ndarray, ordinary: np.ndarray, orders: Sequence[int]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Per order, the different contexts int32 [n, order] of one chunk, by current id first, and their counts int64 [n].

    `ids` and `position` are int64 [N], the latter counts within the document; `ordinary` bool [N] is False where no key
    may end.
    """
    vocabulary = int(ids.max(initial=0)) + 1
    code = np.zeros(len(ids), np.int64)  # equal where the last `order` ids are equal; one more id each round
    for order in range(1, orders[-1] + 1):
        here = np.flatnonzero(ordinary & (position >= order - 1))
        extended = code[here] * vocabulary + ids[here - (order - 1)]
        _, first, code[here], count = np.unique(extended, return_index=True, return_inverse=True, return_counts=True)
        if order in orders:
            last = here[first]
            yield np.stack([ids[last - back] for back in range(order)][::-1], axis=1).astype(np.int32), count


def _widened(keys: np.ndarray, width: int) -> np.ndarray:
    """int32 [n, width]: keys [n, order] with ANY in front."""
    return np.pad(keys, ((0, 0), (width - keys.shape[1], 0)), constant_values=ANY)


def distinct(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different rows of keys, in order of first appearance.

    Args:
        keys: int [N, C].

    Returns:
        int [R, C], the different rows; and int64 [N], which of them each key is.
    """
    if len(keys) == 0:
        return keys, np.zeros(0, np.int64)
    by_ids = np.lexsort(keys.T)  # stable: of equal keys the first comes first
    starts = np.ones(len(keys), bool)
    starts[1:] = np.any(keys[by_ids[1:]] != keys[by_ids[:-1]], axis=1)
    first = np.empty(len(keys), np.int64)  # where each key appears first
    first[by_ids] = by_ids[starts][np.cumsum(starts) - 1]
    appears = np.sort(by_ids[starts])
    return keys[appears], np.searchsorted(appears, first)


def _rotate(words: AnyArray, bits: int) -> AnyArray:
    """The uint32 words turned left by `bits`."""
    return (words << np.uint32(bits)) | (words >> np.uint32(32 - bits))


def _checked_keys(keys: np.ndarray) -> np.ndarray:
    """The keys as int32 [R, C], or the error that says which row is wrong."""
    keys = np.asarray(keys)
    if keys.ndim != 2 or keys.shape[1] == 0 or not (np.issubdtype(keys.dtype, np.integer) or keys.size == 0):
        raise InputError(f"keys must be integers [R, C] with C >= 1, got {keys.dtype} {list(keys.shape)}")
    unused = np.logical_and.accumulate(keys == ANY, axis=1)  # the leading ANYs; all of them in the key of order 0
    valid = unused | ((keys >= 0) & (keys <= np.iinfo(np.int32).max))
    if not valid.all():
        row = int(np.flatnonzero(~valid.all(axis=1))[0])
        raise InputError(
            f"key {row} is {keys[row].tolist()}: ids must be 0 to 2**31 - 1, with {ANY} only before the first"
        )
    keys = keys.astype(np.int32)
    different, place = distinct(keys)
    if len(different) < len(keys):
        second = int(np.flatnonzero(place < np.arange(len(keys)))[0])
        raise InputError(f"key {keys[second].tolist()} stands in rows {place[second]} and {second}; keep one of them")
    return keys


def _chunks(documents: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Some whole documents at a time: int64 [N] their ids in a row, and int64 [N] the positions in their documents."""
    together: list[np.ndarray] = []
    waiting = 0
    for number, document in enumerate(documents):
        together.append(_checked_document(number, np.asarray(document)))
        waiting += len(together[-1])
        if waiting >= _CHUNK:
            yield _joined(together)
            together, waiting = [], 0
    if waiting:
        yield _joined(together)


def _joined(documents: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate(documents), np.concatenate([np.arange(len(document)) for document in documents])


def _checked_document(number: int, document: np.ndarray) -> np.ndarray:
    """The document as int64 [n], or the error that says what is wrong with it."""
    if document.ndim != 1 or not (np.issubdtype(document.dtype, np.integer) or document.size == 0):
        raise InputError(
            f"document {number} must be a 1-D array of token ids, got {document.dtype} {list(document.shape)}"
        )
    bad = np.flatnonzero((document < 0) | (document > np.iinfo(np.int32).max))
    if bad.size:
        raise InputError(
            f"document {number} holds the id {document[bad[0]]} at position {bad[0]}: "
            "ids must be 0 to 2**31 - 1; leave padding out"
        )
    return document.astype(np.int64)

"""The memory of the cached tier: which experts confident tokens took, by the exact last ids, for a limited time.

Letters: B sequences, T positions, N = B T, L layers, K experts per token, C ids per context, S sets, W ways.

The cache is set-associative: a context may be held in any of the W ways of one set, which its hash names; the ids
are stored and compared, so a collision can evict but never misroute. A way holds the decisions of all layers,
each with its own time stamp. A context that reaches back before the start of its sequence is neither found
nor stored.

Time is a clock of int32 milliseconds with any origin, which wraps around every 49.7 days: an age is the difference
to `now` modulo 2^32. Ages end at `HORIZON`: anything older counts as that old. Every `insert` moves the stamps behind
the horizon up to it, one elementwise pass over the stamps, so an old decision never wraps around to look young again,
as long as no two inserts in a row are more than 37 days (2^32 - 2^30 ms) apart.

All sequences share one cache, or each has its own: then every leaf has an axis B in front (`each`), and what one
sequence is given depends on no other.

`lookup` and `insert` are pure functions. `insert` takes a whole batch at once, as if its positions came in
row-major order:

- Of equal contexts the last position with anything to store counts; the earlier ones are ignored.
- A context that is present is updated in place, in the layers that it has something for.
- Then the others come in, in order, each into the oldest way of its set (the one whose youngest decision is oldest,
  the first of equal ones; a way without decisions is older than any). Of more newcomers than ways, the last W stay.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from varjax.keys import NONE, hash_words
from varjax.routing import Routing
from varjax.transfer import to_device

NOTHING = -1  # in place of the experts of a decision that is not there
HORIZON = 1 << 30  # ms, 12.4 days: the greatest age, and so the longest TTL


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ContextCache:
    """The decisions of at most S * W contexts."""

    ids: Array  # int32 [S, W, C], NONE in a free way
    experts: Array  # int16 [S, W, L, K], NOTHING where no decision is
    weights: Array  # float32 [S, W, L, K]
    stamp: Array  # int32 [S, W, L], ms, when the decision was made


def init(cache_size: int, context_length: int, num_layers: int, top_k: int, ways: int = 4) -> ContextCache:
    """An empty cache.

    Args:
        cache_size: contexts, rounded up to whole sets (at least one).
        context_length: C.
        num_layers: L.
        top_k: K.
        ways: W.

    Returns:
        A cache on the device.
    """
    shape = (max(1, -(-cache_size // ways)), ways)
    return ContextCache(
        ids=to_device(np.full((*shape, context_length), NONE, np.int32)),
        experts=to_device(np.full((*shape, num_layers, top_k), NOTHING, np.int16)),
        weights=to_device(np.zeros((*shape, num_layers, top_k), np.float32)),
        stamp=to_device(np.zeros((*shape, num_layers), np.int32)),
    )


def each(cache: ContextCache, batch_size: int, kept: Array | None = None) -> ContextCache:
    """A cache for each of B sequences, all as large as `cache`, empty unless the sequence keeps the one that it has.

    Args:
        cache: one cache, or one for each sequence.
        batch_size: B.
        kept: bool [B], sequences that keep their own; None: none does. With it `cache` has one for each of B sequences.

    Returns:
        A cache whose leaves have an axis B in front.
    """
    if kept is not None:
        return _renewed(cache, kept)
    *_, num_sets, ways, length = cache.ids.shape
    num_layers, top_k = cache.experts.shape[-2:]
    empty = init(num_sets * ways, length, num_layers, top_k, ways)
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (batch_size, *leaf.shape)), empty)


@jax.jit
def _renewed(cache: ContextCache, kept: Array) -> ContextCache:
    """A cache for each sequence, empty where it is not kept."""
    empty = each(cache, len(kept))
    return jax.tree.map(lambda old, new: jnp.where(kept.reshape(-1, *[1] * (old.ndim - 1)), old, new), cache, empty)


def is_each(cache: ContextCache) -> bool:
    """Whether every sequence has a cache of its own.

    Args:
        cache: one cache, or one for each sequence.

    Returns:
        False for one that all share.
    """
    return cache.ids.ndim == 4


def lookup(cache: ContextCache, contexts: Array, now: Array, ttl: Array) -> tuple[Array, Routing]:
    """Decisions younger than `ttl` for each context.

    Args:
        cache: one for all sequences, or one for each.
        contexts: int32 [B, T, C], from `keys.contexts`.
        now: int32 [], ms, on the clock that `insert` was given.
        ttl: int32 [], ms, at most HORIZON.

    Returns:
        hit bool [L, B, T], and Routing [L, B, T, K], which means something only where `hit`.
    """
    if is_each(cache):
        found = jax.vmap(lambda own, row: lookup(own, row[None], now, ttl), out_axes=1)(cache, contexts)
        return jax.tree.map(lambda leaf: leaf[:, :, 0], found)
    there, experts, weights, stamp = _held(cache, contexts)
    hit = there & (since(stamp, now) < ttl)
    return jnp.moveaxis(hit, -1, 0), Routing(
        jnp.moveaxis(experts.astype(jnp.int32), -2, 0), jnp.moveaxis(weights, -2, 0)
    )


def age(cache: ContextCache, contexts: Array, now: Array) -> Array:
    """How old the decision for each context is.

    Args:
        cache: one for all sequences.
        contexts: int32 [B, T, C], from `keys.contexts`.
        now: int32 [], ms, on the clock that `insert` was given.

    Returns:
        int32 [L, B, T], ms since each layer's decision was made, at most HORIZON; -1 where there is none.
    """
    there, _, _, stamp = _held(cache, contexts)
    return jnp.moveaxis(jnp.where(there, since(stamp, now), -1), -1, 0)


def insert(cache: ContextCache, contexts: Array, routing: Routing, allowed: Array, now: Array) -> ContextCache:
    """Store the allowed decisions, stamped `now`.

    Args:
        cache: one for all sequences, or one for each.
        contexts: int32 [B, T, C].
        routing: [L, B, T, K], all slots in use.
        allowed: bool [L, B, T], decisions to store.
        now: int32 [], ms, not before any earlier insert's and less than 37 days after the last.

    Returns:
        The cache afterwards.
    """
    if is_each(cache):

        def one(own: ContextCache, row: Array, taken: Routing, may: Array) -> ContextCache:
            return insert(own, row[None], jax.tree.map(lambda leaf: leaf[:, None], taken), may[:, None], now)

        return jax.vmap(one, in_axes=(0, 0, 1, 1))(cache, contexts, routing, allowed)
    keys = contexts.reshape(-1, contexts.shape[-1])  # [N, C]
    decided, experts, weights = (
        jnp.moveaxis(leaf, 0, 2).reshape(len(keys), *leaf.shape[:1], *leaf.shape[3:])
        for leaf in (allowed, routing.experts.astype(cache.experts.dtype), routing.weights)
    )  # [N, L], [N, L, K], [N, L, K]
    storable = jnp.any(decided, axis=-1) & (keys[:, 0] != NONE)
    cache = replace(cache, stamp=now - since(cache.stamp, now))  # none is behind the horizon

    if len(keys) == 1:
        return _insert_one(cache, keys, experts, weights, decided, storable, now)
    bucket, position, way = _writers(cache, keys, storable)
    way, fresh, writes = _places(cache, bucket, way, now)
    rows = _merged(
        held=jax.tree.map(lambda leaf: leaf[bucket, way], cache),
        fresh=fresh,
        ids=keys[position],
        experts=experts[position],
        weights=weights[position],
        decided=decided[position],
        now=now,
    )
    here = (jnp.where(writes, bucket, len(cache.ids)), way)  # out of bounds where nothing is written
    return jax.tree.map(lambda leaf, row: leaf.at[here].set(row, mode="drop", unique_indices=True), cache, rows)


def _writers(cache: ContextCache, keys: Array, storable: Array) -> tuple[Array, Array, Array]:
    """The positions that may write, one for each distinct context: its last.

    Returns:
        bucket, position, way int32 [N], sorted by bucket and position. Way W says that the context is not
        present; bucket S (these come last) that the position writes nothing.
    """
    num_sets, ways, length = cache.ids.shape
    bucket = jnp.where(storable, _bucket(cache, keys), num_sets)
    bucket, *columns, position = lax.sort((bucket, *keys.T, _iota(len(keys))), num_keys=1 + length)
    keys = jnp.stack(columns, axis=-1)

    repeated = (bucket[1:] == bucket[:-1]) & jnp.all(keys[1:] == keys[:-1], axis=-1)
    bucket = bucket.at[:-1].set(jnp.where(repeated, num_sets, bucket[:-1]))
    way, present = _find(cache, bucket, keys)
    bucket, position, way = lax.sort((bucket, position, jnp.where(present, way, ways)), num_keys=2)
    return bucket, position, way


def _places(cache: ContextCache, bucket: Array, way: Array, now: Array) -> tuple[Array, Array, Array]:
    """Where the writers `bucket` and `way`, int32 [N] from `_writers`, write.

    Returns:
        way int32 [N]; fresh bool [N], a newcomer; writes bool [N], False for those that lose their place.
    """
    num_sets, ways, _ = cache.ids.shape
    fresh = (way == ways) & (bucket < num_sets)

    # How many newcomers each set takes, and which of them each one is.
    seen = jnp.cumsum(fresh, dtype=jnp.int32)
    edge = bucket[1:] != bucket[:-1]
    first = jnp.concatenate([jnp.ones(1, bool), edge])
    final = jnp.concatenate([edge, jnp.ones(1, bool)])
    before = lax.cummax(jnp.where(first, seen - fresh.astype(jnp.int32), 0))
    until = lax.cummin(jnp.where(final, seen, len(bucket)), reverse=True)
    taken = jnp.minimum(until - before, ways)
    turn = taken - 1 - (until - seen)  # the newcomer's number in its set, negative for those pushed out again

    # Ways from the oldest to the newest, after the updates in place.
    updated = jnp.zeros((num_sets, ways), bool).at[bucket, way].set(True, mode="drop")[bucket]
    age = jnp.where(updated, 0, _way_age(cache, bucket, now))  # [N, W]
    number = _iota(ways)
    earlier = (number[None, :] < number[:, None])[None]
    older = (age[:, None, :] > age[:, :, None]) | ((age[:, None, :] == age[:, :, None]) & earlier)
    rank = jnp.sum(older, axis=-1, dtype=jnp.int32)  # [N, W]

    chosen = jnp.argmax(rank == turn[:, None], axis=-1).astype(jnp.int32)
    own = jnp.take_along_axis(rank, jnp.minimum(way, ways - 1)[:, None], axis=-1)[:, 0]
    writes = (bucket < num_sets) & jnp.where(fresh, turn >= 0, own >= taken)
    return jnp.where(fresh, chosen, way), fresh, writes


def _insert_one(
    cache: ContextCache, ids: Array, experts: Array, weights: Array, decided: Array, storable: Array, now: Array
) -> ContextCache:
    """`insert` of one context, N = 1: there is nothing to sort, and one row is read and written."""
    bucket = _bucket(cache, ids)
    way, present = _find(cache, bucket, ids)
    way = jnp.where(present, way, jnp.argmax(_way_age(cache, bucket, now), axis=-1).astype(jnp.int32))

    def place(leaf: Array) -> tuple[Array, ...]:
        return (bucket[0], way[0], *[jnp.int32(0)] * (leaf.ndim - 2))

    held = jax.tree.map(lambda leaf: lax.dynamic_slice(leaf, place(leaf), (1, 1, *leaf.shape[2:]))[0], cache)
    rows = _merged(held, ~present, ids, experts, weights, decided, now)
    rows = jax.tree.map(lambda new, old: jnp.where(storable[0], new, old), rows, held)
    return jax.tree.map(lambda leaf, row: lax.dynamic_update_slice(leaf, row[None], place(leaf)), cache, rows)


def _merged(
    held: ContextCache, fresh: Array, ids: Array, experts: Array, weights: Array, decided: Array, now: Array
) -> ContextCache:
    """Rows [N] to be written: what was decided, over what is held there unless it belongs to another context.

    `held` are rows of the cache; `fresh` bool [N], the context is a newcomer in its row; `ids` int32 [N, C], `experts`
    int16 and `weights` float32 [N, L, K]; `decided` bool [N, L], the layers that have something to store.
    """
    blank = jnp.where(fresh[:, None, None], NOTHING, held.experts)  # an update leaves the other layers alone
    return ContextCache(
        ids=ids,
        experts=jnp.where(decided[..., None], experts, blank),
        weights=jnp.where(decided[..., None], weights, held.weights),
        stamp=jnp.where(decided, now, held.stamp),
    )


def _bucket(cache: ContextCache, contexts: Array) -> Array:
    """int32 [...]: the set of each context int32 [..., C]."""
    return (hash_words(contexts) % jnp.uint32(cache.ids.shape[0])).astype(jnp.int32)


def _find(cache: ContextCache, bucket: Array, contexts: Array) -> tuple[Array, Array]:
    """int32 [...], bool [...]: the way that holds each context, and whether there is one."""
    ways = cache.ids.shape[1]
    same = jnp.all(cache.ids[bucket] == contexts[..., None, :], axis=-1)  # [..., W]
    way = jnp.min(jnp.where(same, _iota(ways), ways), axis=-1)
    return jnp.minimum(way, ways - 1), way < ways


def _held(cache: ContextCache, contexts: Array) -> tuple[Array, Array, Array, Array]:
    """bool [B, T, L], whether there is a decision for the context, and its experts, weights and stamp."""
    bucket = _bucket(cache, contexts)
    way, present = _find(cache, bucket, contexts)
    experts = cache.experts[bucket, way]
    there = present[..., None] & (experts[..., 0] != NOTHING)
    return there, experts, cache.weights[bucket, way], cache.stamp[bucket, way]


def since(stamp: Array, now: Array | np.int32) -> Array:
    """The time that has passed since a stamp.

    Args:
        stamp: int32 [...], ms.
        now: int32 [], ms.

    Returns:
        int32 [...], ms, from 0 to HORIZON.
    """
    return jnp.minimum((now - stamp).astype(jnp.uint32), jnp.uint32(HORIZON)).astype(jnp.int32)


def _way_age(cache: ContextCache, bucket: Array, now: Array) -> Array:
    """int32 [..., W]: ms since the youngest decision of each way of the sets; beyond HORIZON where there is none."""
    there = cache.experts[bucket][..., 0] != NOTHING  # [..., W, L]
    return jnp.min(jnp.where(there, since(cache.stamp[bucket], now), HORIZON + 1), axis=-1)


def _iota(length: int) -> Array:
    return jnp.arange(length, dtype=jnp.int32)

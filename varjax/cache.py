"""The cached tier's memory: which experts confident tokens took, by the exact last ids, for a limited time.

Letters: B sequences, T positions, N = B T, L layers, K experts per token, C ids per context, S sets, W ways.

The cache is set-associative: a context may lie in any of the W ways of one set, which its hash names; the ids
are stored and compared, so a collision can evict but never misroute. A way holds the decisions of all layers,
each with its own time stamp. A context that reaches back before the start of its sequence is neither found
nor stored.

`lookup` and `insert` are pure functions. `insert` takes a whole batch at once, as if its positions came in
row-major order:

- Of equal contexts the last position with anything to store counts; the earlier ones are forgotten.
- A context that is present is updated in place, in the layers that it has something for.
- Then the others come in, in order, each into the oldest way of its set (that with the earliest latest stamp,
  the first such way). Of more newcomers than ways, the last W stay.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array, lax

from varjax.keys import NONE, hash_words
from varjax.routing import Routing

NEVER = -jnp.inf  # the stamp of a decision that is not there


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ContextCache:
    """The decisions of at most S * W contexts."""

    ids: Array  # int32 [S, W, C], NONE in a free way
    experts: Array  # int16 [S, W, L, K]
    weights: Array  # float32 [S, W, L, K]
    stamp: Array  # float32 [S, W, L], seconds, when the decision was made; NEVER where there is none


def init(cache_size: int, context_length: int, num_layers: int, top_k: int, ways: int = 4) -> ContextCache:
    """An empty cache for `cache_size` contexts, rounded up to whole sets (one at least)."""
    shape = (max(1, -(-cache_size // ways)), ways)
    return ContextCache(
        ids=jnp.full((*shape, context_length), NONE, jnp.int32),
        experts=jnp.zeros((*shape, num_layers, top_k), jnp.int16),
        weights=jnp.zeros((*shape, num_layers, top_k), jnp.float32),
        stamp=jnp.full((*shape, num_layers), NEVER, jnp.float32),
    )


def lookup(cache: ContextCache, contexts: Array, now: Array, ttl: Array) -> tuple[Array, Routing]:
    """Decisions younger than `ttl` for each context.

    Args:
        contexts: int32 [B, T, C], from `keys.contexts`.
        now: float32 [], seconds on the clock that `insert` was given.
        ttl: float32 [], seconds.

    Returns:
        hit bool [L, B, T], and Routing [L, B, T, K], which means something only where `hit`.
    """
    bucket = _bucket(cache, contexts)
    way, present = _find(cache, bucket, contexts)
    hit = present[..., None] & (now - cache.stamp[bucket, way] < ttl)
    experts = cache.experts[bucket, way].astype(jnp.int32)
    return jnp.moveaxis(hit, -1, 0), Routing(
        jnp.moveaxis(experts, -2, 0), jnp.moveaxis(cache.weights[bucket, way], -2, 0)
    )


def age(cache: ContextCache, contexts: Array, now: Array) -> Array:
    """float32 [L, B, T]: seconds since each layer's decision was made, expired or not; infinite where there is none.

    Args:
        contexts: int32 [B, T, C], from `keys.contexts`.
        now: float32 [], seconds on the clock that `insert` was given.
    """
    bucket = _bucket(cache, contexts)
    way, present = _find(cache, bucket, contexts)
    since = jnp.where(present[..., None], now - cache.stamp[bucket, way], jnp.inf)
    return jnp.moveaxis(since, -1, 0)


def insert(cache: ContextCache, contexts: Array, routing: Routing, allowed: Array, now: Array) -> ContextCache:
    """Stores the allowed decisions, stamped `now`.

    Args:
        contexts: int32 [B, T, C].
        routing: [L, B, T, K], all slots in use.
        allowed: bool [L, B, T], decisions to store.
        now: float32 [], seconds, not before any stamp in the cache.
    """
    keys = contexts.reshape(-1, contexts.shape[-1])  # [N, C]
    decided, experts, weights = (
        jnp.moveaxis(leaf, 0, 2).reshape(len(keys), *leaf.shape[:1], *leaf.shape[3:])
        for leaf in (allowed, routing.experts.astype(cache.experts.dtype), routing.weights)
    )  # [N, L], [N, L, K], [N, L, K]
    storable = jnp.any(decided, axis=-1) & (keys[:, 0] != NONE)

    bucket, position, way = _writers(cache, keys, storable)
    way, fresh, writes = _places(cache, bucket, way, now)

    decided, experts, weights = decided[position], experts[position], weights[position]
    keep = ~decided & ~fresh[:, None]  # an update leaves the other layers' decisions alone
    here = (jnp.where(writes, bucket, len(cache.ids)), way)  # out of bounds where nothing is written
    stamp = jnp.where(decided, now, jnp.where(fresh[:, None], NEVER, cache.stamp[bucket, way]))
    experts = jnp.where(keep[..., None], cache.experts[bucket, way], experts)
    weights = jnp.where(keep[..., None], cache.weights[bucket, way], weights)
    return ContextCache(
        ids=_put(cache.ids, here, keys[position]),
        experts=_put(cache.experts, here, experts),
        weights=_put(cache.weights, here, weights),
        stamp=_put(cache.stamp, here, stamp),
    )


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
    """Where the writers write.

    Args:
        bucket, way: int32 [N], from `_writers`.

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
    age = jnp.where(updated, now, jnp.max(cache.stamp[bucket], axis=-1))  # [N, W]
    number = _iota(ways)
    older = (age[:, None, :] < age[:, :, None]) | ((age[:, None, :] == age[:, :, None]) & (number < number[:, None]))
    rank = jnp.sum(older, axis=-1, dtype=jnp.int32)  # [N, W]

    chosen = jnp.argmax(rank == turn[:, None], axis=-1).astype(jnp.int32)
    own = jnp.take_along_axis(rank, jnp.minimum(way, ways - 1)[:, None], axis=-1)[:, 0]
    writes = (bucket < num_sets) & jnp.where(fresh, turn >= 0, own >= taken)
    return jnp.where(fresh, chosen, way), fresh, writes


def _bucket(cache: ContextCache, contexts: Array) -> Array:
    """int32 [...]: the set of each context int32 [..., C]."""
    return (hash_words(contexts) % jnp.uint32(cache.ids.shape[0])).astype(jnp.int32)


def _find(cache: ContextCache, bucket: Array, contexts: Array) -> tuple[Array, Array]:
    """int32 [...], bool [...]: the way in which each context lies, and whether it lies anywhere."""
    same = jnp.all(cache.ids[bucket] == contexts[..., None, :], axis=-1)  # [..., W]
    return jnp.argmax(same, axis=-1).astype(jnp.int32), jnp.any(same, axis=-1)


def _put(array: Array, places: tuple[Array, Array], values: Array) -> Array:
    return array.at[places].set(values, mode="drop", unique_indices=True)


def _iota(length: int) -> Array:
    return jnp.arange(length, dtype=jnp.int32)

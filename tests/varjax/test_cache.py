"""The functional cache against a plain Python one: random streams, tiny caches, many collisions, a clock that wraps."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varjax import cache as context_cache
from varjax.cache import HORIZON, NOTHING
from varjax.keys import NONE, hash_words
from varjax.routing import Routing

LAYERS, TOP_K, EXPERTS, LENGTH = 2, 2, 200, 2
TTL = 10  # ms
WRAP = 1 << 32  # ms, after which the clock reads the same

insert = jax.jit(context_cache.insert)
lookup = jax.jit(context_cache.lookup)


class SlowCache:
    """What `varjax.cache` means: a list of ways per set, one context at a time, and a clock of any size."""

    def __init__(self, sets: int, ways: int):
        # A way is (key or None, {layer: (stamp, experts, weights)}).
        self.sets = [[(None, {}) for _ in range(ways)] for _ in range(sets)]

    def ways_of(self, key):
        return self.sets[SET_OF[key] % len(self.sets)]

    def get(self, key, layer, now, ttl):
        for held, decisions in self.ways_of(key):
            if held == key and layer in decisions and min(now - decisions[layer][0], HORIZON) < ttl:
                return decisions[layer][1:]
        return None

    def put(self, keys, decisions, now):
        """keys [N], decisions [N] of {layer: (experts, weights)}."""
        latest = {}
        for key, decision in zip(keys, decisions, strict=True):
            if decision and NONE not in key:
                latest.pop(key, None)  # a key moves to the place of its last occurrence
                latest[key] = {layer: (now, *what) for layer, what in decision.items()}
        newcomers = []
        for key, decision in latest.items():
            ways = self.ways_of(key)
            present = [w for w, (held, _) in enumerate(ways) if held == key]
            if present:
                ways[present[0]] = (key, ways[present[0]][1] | decision)
            else:
                newcomers.append((key, decision))
        for ways in self.sets:
            mine = [entry for entry in newcomers if self.ways_of(entry[0]) is ways][-len(ways) :]
            age = [min((min(now - d[0], HORIZON) for d in decisions.values()), default=np.inf) for _, decisions in ways]
            by_age = sorted(range(len(ways)), key=lambda w: (-age[w], w))
            for way, entry in zip(by_age, mine, strict=False):
                ways[way] = entry


SET_OF = {(i, j): int(hash_words(np.array((i, j), np.int32))) for i in (NONE, *range(8)) for j in (NONE, *range(8))}


def reading(now: int) -> np.int32:
    """What a wrapping clock shows."""
    return np.uint32(now % WRAP).astype(np.int32)


def assert_same_contents(ids, experts, weights, ages, slow, now):
    """Every way of every set: ids, decisions and ages, exactly."""
    for s, ways in enumerate(slow.sets):
        for w, (key, decisions) in enumerate(ways):
            assert ids[s, w].tolist() == list(key or (NONE,) * LENGTH)
            assert set(decisions) == {layer for layer in range(LAYERS) if experts[s, w, layer, 0] != NOTHING}
            for layer, (stamp, chosen, weight) in decisions.items():
                assert ages[s, w, layer] == min(now - stamp, HORIZON)
                assert experts[s, w, layer].tolist() == chosen
                assert weights[s, w, layer].tolist() == weight


@partial(jax.jit, static_argnames=("sets", "ways"))
@partial(jax.vmap, in_axes=(0, None, None))  # over sequences
def run_sequences(operations, sets, ways):
    """What each look-up found, and the cache behind each insert, of [operations, ...] in a row."""

    def one(cache, operation):
        contexts, experts, weights, allowed, now, ttl = operation
        hit, found = context_cache.lookup(cache, contexts, now, ttl)
        cache = context_cache.insert(cache, contexts, Routing(experts, weights), allowed, now)
        return cache, (hit, found.experts, found.weights, cache)

    return jax.lax.scan(one, context_cache.init(sets * ways, LENGTH, LAYERS, TOP_K, ways), operations)[1]


def random_operations(rng, sequences, steps, batch, length):
    """Few contexts, so that they repeat and collide, and some that reach back too far; true times, and TTLs."""
    shape = (sequences, steps, batch, length)
    vocabulary = rng.choice([2, 3, 6], (sequences, 1, 1, 1, 1))
    contexts = (rng.integers(0, 6, (*shape, LENGTH)) % vocabulary).astype(np.int32)
    contexts[rng.random(shape) < 0.1, 0] = NONE
    choice = (sequences, steps, LAYERS, batch, length)
    experts = rng.integers(0, EXPERTS, (*choice, TOP_K)).astype(np.int32)
    weights = rng.random((*choice, TOP_K)).astype(np.float32)
    allowed = rng.random(choice) < rng.choice([0.2, 0.8, 1.0], (sequences, steps, 1, 1, 1))
    # Mostly milliseconds; now and then a pause of days, up to the longest that is allowed.
    pause = rng.choice([0, 1, 6, HORIZON // 2, HORIZON - 1, WRAP - HORIZON - 1], (sequences, steps), p=PAUSES)
    now = rng.integers(0, WRAP, (sequences, 1)) + np.cumsum(pause, axis=1)
    ttl = rng.choice([0, TTL, HORIZON], (sequences, steps), p=[0.1, 0.6, 0.3]).astype(np.int32)
    return contexts, experts, weights, allowed, now, ttl


PAUSES = [0.3, 0.25, 0.25, 0.1, 0.05, 0.05]


@pytest.mark.parametrize(("batch", "length", "steps"), [(1, 1, 16), (2, 4, 4)])
@pytest.mark.parametrize(("sets", "ways"), [(1, 1), (1, 4), (3, 2), (2, 4)])
def test_the_cache_equals_the_slow_one(sets, ways, batch, length, steps):
    """1,250 sequences of each of the eight kinds: 10,000 in all."""
    rng = np.random.default_rng([sets, ways, batch])
    operations = random_operations(rng, 1250, steps, batch, length)
    contexts, experts, weights, allowed, now, ttl = operations
    hit, *found, cache = jax.tree.map(np.asarray, run_sequences((*operations[:4], reading(now), ttl), sets, ways))
    ages = np.minimum((reading(now)[..., None, None, None] - cache.stamp).astype(np.uint32), HORIZON)
    hits = evictions = 0
    for n in range(len(now)):
        slow = SlowCache(sets, ways)
        for step in range(steps):
            at, moment = (n, step), int(now[n, step])
            keys = [tuple(key) for key in contexts[at].reshape(-1, LENGTH).tolist()]
            decisions = [{} for _ in keys]
            for layer, b, t in np.ndindex(LAYERS, batch, length):
                here = (*at, layer, b, t)
                held = slow.get(keys[b * length + t], layer, moment, int(ttl[at]))
                assert hit[here] == (held is not None)
                if held is not None:
                    assert tuple(part[here].tolist() for part in found) == held
                    hits += 1
                if allowed[here]:
                    decisions[b * length + t][layer] = experts[here].tolist(), weights[here].tolist()
            before = {key for ways_ in slow.sets for key, _ in ways_ if key}
            slow.put(keys, decisions, moment)
            evictions += len(before - {key for ways_ in slow.sets for key, _ in ways_})
            assert_same_contents(cache.ids[at], cache.experts[at], cache.weights[at], ages[at], slow, moment)
    assert hits > 1000 and evictions > 1000
    assert (now[:, -1] // WRAP > now[:, 0] // WRAP).sum() > 100  # clocks that wrapped around on the way


def single(value: int, layer_allowed=(True, True), experts=(1, 2)):
    """One context (value, value) with the same decision in the allowed layers."""
    contexts = jnp.full((1, 1, LENGTH), value, jnp.int32)
    decision = jnp.broadcast_to(jnp.asarray(experts, jnp.int32), (LAYERS, 1, 1, TOP_K))
    routing = Routing(decision, jnp.full(decision.shape, 0.5, jnp.float32))
    return contexts, routing, jnp.asarray(layer_allowed)[:, None, None]


def hits(cache, value, now):
    found, _ = lookup(cache, single(value)[0], reading(now), np.int32(TTL))
    return found[:, 0, 0].tolist()


def test_each_layer_expires_by_itself():
    cache = context_cache.init(4, LENGTH, LAYERS, TOP_K)
    cache = insert(cache, *single(5, (True, True)), np.int32(0))
    cache = insert(cache, *single(5, (True, False)), np.int32(8))
    assert hits(cache, 5, 9) == [True, True]
    assert hits(cache, 5, 10) == [True, False]  # at the age of one TTL a decision is gone
    assert hits(cache, 5, 18) == [False, False]


def test_the_age_of_a_decision_is_that_of_its_layer_and_goes_on_after_the_ttl():
    def ages(value, now):
        return context_cache.age(cache, single(value)[0], reading(now))[:, 0, 0].tolist()

    cache = context_cache.init(4, LENGTH, LAYERS, TOP_K)
    cache = insert(cache, *single(5, (True, False)), np.int32(3))
    assert ages(5, 4) == [1, -1]  # nothing was decided in layer 1
    cache = insert(cache, *single(5, (False, True)), np.int32(8))
    assert ages(5, 23) == [20, 15]
    assert ages(5, 8 + HORIZON) == [HORIZON, HORIZON]
    assert ages(6, 23) == [-1, -1]


def test_a_full_set_evicts_its_oldest_way():
    cache = context_cache.init(4, LENGTH, LAYERS, TOP_K)  # one set
    for now, value in enumerate([1, 2, 3, 4, 1, 5]):  # 1 is refreshed before 5 comes
        cache = insert(cache, *single(value), reading(now))
    assert [all(hits(cache, value, 6)) for value in (1, 2, 3, 4, 5)] == [True, False, True, True, True]


def test_an_old_decision_never_looks_young_again():
    """Stamped at 0 and never touched, while other contexts come in for more than the clock's 49.7 days."""
    cache = insert(context_cache.init(8, LENGTH, LAYERS, TOP_K), *single(5), np.int32(0))
    assert all(hits(cache, 5, 0))
    for now in range(0, 2 * WRAP, WRAP // 4):
        cache = insert(cache, *single(1), reading(now))
    assert not any(hits(cache, 5, 2 * WRAP))
    assert context_cache.age(cache, single(5)[0], reading(2 * WRAP))[:, 0, 0].tolist() == [HORIZON, HORIZON]


def test_a_size_that_is_no_multiple_of_the_ways_is_rounded_up():
    assert context_cache.init(1001, LENGTH, LAYERS, TOP_K).ids.shape == (251, 4, LENGTH)
    assert context_cache.init(0, LENGTH, LAYERS, TOP_K).ids.shape == (1, 4, LENGTH)


def test_the_second_step_compiles_nothing():
    cache = insert(context_cache.init(8, LENGTH, LAYERS, TOP_K), *single(1), np.int32(0))
    before = insert._cache_size()
    for value in range(3):
        cache = insert(cache, *single(value), np.int32(value))
    assert insert._cache_size() == before

"""The functional cache against a plain Python one: random streams, tiny caches, many collisions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from varjax import cache as context_cache
from varjax.keys import NONE, hash_words
from varjax.routing import Routing

LAYERS, TOP_K, EXPERTS, LENGTH = 2, 2, 200, 2
TTL = 10.0

insert = jax.jit(context_cache.insert)
lookup = jax.jit(context_cache.lookup)


class SlowCache:
    """What `varjax.cache` means: a list of ways per set, one context at a time."""

    def __init__(self, sets: int, ways: int):
        # A way is (key or None, {layer: (stamp, experts, weights)}).
        self.sets = [[(None, {}) for _ in range(ways)] for _ in range(sets)]

    def ways_of(self, key):
        return self.sets[int(hash_words(np.array(key, np.int32))) % len(self.sets)]

    def get(self, key, layer, now):
        for held, decisions in self.ways_of(key):
            if held == key and layer in decisions and now - decisions[layer][0] < TTL:
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
            age = [max((d[0] for d in decisions.values()), default=-np.inf) for _, decisions in ways]
            by_age = sorted(range(len(ways)), key=lambda w: (age[w], w))
            for way, entry in zip(by_age, mine, strict=False):
                ways[way] = entry


def random_step(rng, batch, length, vocabulary):
    contexts = rng.integers(0, vocabulary, size=(batch, length, LENGTH)).astype(np.int32)
    contexts[rng.random((batch, length)) < 0.1, 0] = NONE
    shape = (LAYERS, batch, length)
    experts = rng.integers(0, EXPERTS, size=(*shape, TOP_K)).astype(np.int32)
    weights = rng.random((*shape, TOP_K)).astype(np.float32)
    return contexts, experts, weights, rng.random(shape) < rng.choice([0.2, 0.8, 1.0])


def as_oracle_input(contexts, experts, weights, allowed):
    keys = [tuple(key) for key in contexts.reshape(-1, LENGTH).tolist()]
    decisions = []
    for b, t in np.ndindex(contexts.shape[:2]):
        decisions.append(
            {
                layer: (experts[layer, b, t].tolist(), weights[layer, b, t].tolist())
                for layer in range(LAYERS)
                if allowed[layer, b, t]
            }
        )
    return keys, decisions


def assert_same_contents(cache, slow):
    """Every way of every set: ids, decisions and stamps, exactly."""
    host = jax.tree.map(np.asarray, cache)
    for s, w in np.ndindex(host.ids.shape[:2]):
        key, decisions = slow.sets[s][w]
        assert host.ids[s, w].tolist() == list(key or (NONE,) * LENGTH)
        assert set(decisions) == {layer for layer in range(LAYERS) if host.stamp[s, w, layer] > -np.inf}
        for layer, (stamp, experts, weights) in decisions.items():
            assert host.stamp[s, w, layer] == np.float32(stamp)
            assert host.experts[s, w, layer].tolist() == experts
            assert host.weights[s, w, layer].tolist() == weights


@pytest.mark.parametrize(("sets", "ways"), [(1, 1), (1, 4), (3, 2), (4, 4)])
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), vocabulary=st.sampled_from([2, 3, 6]))
def test_the_cache_equals_the_slow_one(sets, ways, seed, vocabulary):
    rng = np.random.default_rng(seed)
    cache = context_cache.init(sets * ways, LENGTH, LAYERS, TOP_K, ways)
    assert cache.ids.shape == (sets, ways, LENGTH)
    slow = SlowCache(sets, ways)
    now = 0.0
    for _ in range(6):
        batch, length = [(1, 1), (2, 8)][rng.integers(2)]
        contexts, experts, weights, allowed = random_step(rng, batch, length, vocabulary)
        now += float(rng.choice([0.0, 1.0, 6.0]))

        hit, found = jax.tree.map(np.asarray, lookup(cache, contexts, jnp.float32(now), jnp.float32(TTL)))
        for layer, b, t in np.ndindex(hit.shape):
            held = slow.get(tuple(contexts[b, t].tolist()), layer, now)
            assert hit[layer, b, t] == (held is not None)
            if held is not None:
                assert (found.experts[layer, b, t].tolist(), found.weights[layer, b, t].tolist()) == held

        routing = Routing(jnp.asarray(experts), jnp.asarray(weights))
        cache = insert(cache, contexts, routing, allowed, jnp.float32(now))
        slow.put(*as_oracle_input(contexts, experts, weights, allowed), now)
        assert_same_contents(cache, slow)


def single(value: int, layer_allowed=(True, True), experts=(1, 2)):
    """One context (value, value) with the same decision in the allowed layers."""
    contexts = jnp.full((1, 1, LENGTH), value, jnp.int32)
    decision = jnp.broadcast_to(jnp.asarray(experts, jnp.int32), (LAYERS, 1, 1, TOP_K))
    routing = Routing(decision, jnp.full(decision.shape, 0.5, jnp.float32))
    return contexts, routing, jnp.asarray(layer_allowed)[:, None, None]


def hits(cache, value, now):
    found, _ = lookup(cache, single(value)[0], jnp.float32(now), jnp.float32(TTL))
    return found[:, 0, 0].tolist()


def test_each_layer_expires_by_itself():
    cache = context_cache.init(4, LENGTH, LAYERS, TOP_K)
    cache = insert(cache, *single(5, (True, True)), jnp.float32(0.0))
    cache = insert(cache, *single(5, (True, False)), jnp.float32(8.0))
    assert hits(cache, 5, 9.0) == [True, True]
    assert hits(cache, 5, 10.0) == [True, False]  # at the age of one TTL a decision is gone
    assert hits(cache, 5, 18.0) == [False, False]


def test_the_age_of_a_decision_is_that_of_its_layer_and_goes_on_after_the_ttl():
    def ages(value, now):
        return context_cache.age(cache, single(value)[0], jnp.float32(now))[:, 0, 0].tolist()

    cache = context_cache.init(4, LENGTH, LAYERS, TOP_K)
    cache = insert(cache, *single(5, (True, False)), jnp.float32(3.0))
    assert ages(5, 4.0) == [1.0, np.inf]  # nothing was decided in layer 1
    cache = insert(cache, *single(5, (False, True)), jnp.float32(8.0))
    assert ages(5, 23.0) == [20.0, 15.0]
    assert ages(6, 23.0) == [np.inf, np.inf]


def test_a_full_set_evicts_its_oldest_way():
    cache = context_cache.init(4, LENGTH, LAYERS, TOP_K)  # one set
    for now, value in enumerate([1, 2, 3, 4, 1, 5]):  # 1 is refreshed before 5 comes
        cache = insert(cache, *single(value), jnp.float32(now))
    assert [all(hits(cache, value, 6.0)) for value in (1, 2, 3, 4, 5)] == [True, False, True, True, True]


def test_a_size_that_is_no_multiple_of_the_ways_is_rounded_up():
    assert context_cache.init(1001, LENGTH, LAYERS, TOP_K).ids.shape == (251, 4, LENGTH)
    assert context_cache.init(0, LENGTH, LAYERS, TOP_K).ids.shape == (1, 4, LENGTH)


def test_the_second_step_compiles_nothing():
    cache = insert(context_cache.init(8, LENGTH, LAYERS, TOP_K), *single(1), jnp.float32(0.0))
    before = insert._cache_size()
    for value in range(3):
        cache = insert(cache, *single(value), jnp.float32(value))
    assert insert._cache_size() == before

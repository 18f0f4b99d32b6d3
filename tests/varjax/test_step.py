"""Plan and commit over whole streams: tiers, precedence, padding, chunks, counters, no recompilation."""

import typing
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import varjax
from varjax.config import LayerPolicy, VARConfig
from varjax.errors import InputError
from varjax.keys import NONE
from varjax.routing import CACHED, FAST, LEARNED, NO_ROW, resolve
from varjax.step import Counters, Settings, WideCount, begin, commit, init, plan, summary, timestamp
from varjax.table import build_table, fast_plan

LAYERS, EXPERTS, TOP_K = 3, 5, 2
CONFIG = VARConfig(
    frequency_threshold=10,
    entropy_threshold=0.6,
    confidence_threshold=0.5,
    cache_size=64,
    cache_ttl_seconds=10.0,
    context_window_size=3,
    mass_threshold=0.7,
    default=LayerPolicy(experts_kept=1, use_answers=False, ngram_orders=(1, 2)),
    cache_layers=(1, 2),
)
SETTINGS = Settings.of(CONFIG, LAYERS)

plan_jit = jax.jit(plan)
commit_jit = jax.jit(commit, donate_argnums=0)


@pytest.fixture(scope="module")
def table(random_stats):
    return build_table(CONFIG, random_stats(np.random.default_rng(8), LAYERS, EXPERTS), top_k=TOP_K, keep_shapes=True)


def router(token_ids: np.ndarray) -> np.ndarray:
    """Gate probabilities float32 [L, B, T, E] that depend on the token alone: some sure, some not."""
    by_token = np.random.default_rng(1).dirichlet(np.full(EXPERTS, 0.4), size=(LAYERS, 16))
    return by_token[:, token_ids].astype(np.float32)


def run_step(table, state, token_ids, now, mask=None, how=SETTINGS):
    """One step with a model that is nothing but routers -> plan, what ran, state."""
    token_ids = jnp.asarray(token_ids, jnp.int32)
    probs = jnp.asarray(router(np.asarray(token_ids)))
    planned = plan_jit(table, state, token_ids, timestamp(now), how, mask)
    routing = jax.vmap(lambda p, layer: resolve(p, TOP_K, layer)[0])(probs, planned)
    state = commit_jit(state, planned, token_ids, routing, probs, timestamp(now), how, mask)
    return jax.tree.map(np.asarray, planned), jax.tree.map(np.asarray, routing), state


def test_what_was_learned_with_confidence_is_remembered_with_enough_experts(table):
    ids = np.array([[8, 9, 10, 11, 12, 13, 14, 15]])  # the table knows none of them
    sure = router(ids).max(-1) >= CONFIG.confidence_threshold
    first, learned, state = run_step(table, init(table, CONFIG, 1), ids, 0.0)
    assert (first.tier == LEARNED).all()

    second, _, state = run_step(table, begin(state), ids, 9.0)
    expected = sure & np.array([False, True, True])[:, None, None]  # layer 0 is not cached
    expected[:, :, :2] = False  # contexts that reach back before the start
    assert expected.any() and not expected[1:, :, 2:].all()
    np.testing.assert_array_equal(second.tier, np.where(expected, CACHED, LEARNED))
    assert (second.row == NO_ROW).all()
    for at in np.argwhere(expected):
        at = tuple(at)
        np.testing.assert_array_equal(second.routing.experts[at], learned.experts[at])
        np.testing.assert_array_equal(second.routing.weights[at], learned.weights[at])
        assert second.experts_kept[at] == (1 if learned.weights[at][0] >= CONFIG.mass_threshold else 2)
    assert (second.experts_kept[~expected] == TOP_K).all()
    assert (second.routing.experts[~expected] == EXPERTS).all()

    third, _, state = run_step(table, begin(state), ids, 10.0)  # a cached decision does not renew itself
    assert (third.tier == LEARNED).all()


def test_a_clock_without_a_reading_is_refused():
    for now in (float("nan"), float("inf")):
        with pytest.raises(InputError, match=f"now={now}: expected finite seconds"):
            timestamp(now)


def test_milliseconds_wrap_around_and_only_differences_count(table):
    assert [int(timestamp(s)) for s in (0.0, 1.5, 2**31 / 1000, 2**32 / 1000 + 1)] == [0, 1500, -(2**31), 1000]
    ids = np.array([[8, 9, 10, 11, 12, 13, 14, 15]])
    for origin in (0.0, (2**31 - 3000) / 1000, 3600e3):  # the second wraps around between the steps
        _, _, state = run_step(table, init(table, CONFIG, 1), ids, origin)
        for later, remembered in ((9.999, True), (10.0, False)):
            again, _, state = run_step(table, begin(state), ids, origin + later)
            assert (again.tier == CACHED).any() == remembered


def test_fast_wins_over_cached(table):
    ids = np.array([[0, 1, 2, 3, 0, 1, 2, 3]])
    without_table = replace(table, eligible=jnp.zeros_like(table.eligible))
    _, _, state = run_step(without_table, init(table, CONFIG, 1), ids, 0.0)
    only_cached, _, state = run_step(without_table, begin(state), ids, 1.0)
    both, _, _ = run_step(table, begin(state), ids, 2.0)
    fast = np.asarray(fast_plan(table, jnp.asarray(contexts_of(ids, 2))).tier) == FAST
    cached = only_cached.tier == CACHED
    assert (fast & cached).any() and (~fast & cached).any()
    np.testing.assert_array_equal(both.tier, np.where(fast, FAST, np.where(cached, CACHED, LEARNED)))


def contexts_of(ids: np.ndarray, length: int) -> np.ndarray:
    padded = np.concatenate([np.full((len(ids), length - 1), NONE), ids], axis=1)
    return np.stack([padded[:, i : i + ids.shape[1]] for i in range(length)], axis=-1).astype(np.int32)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_padding_changes_nothing_wherever_it_stands(table, seed):
    """The same sequence in one piece, and in two pieces with padding left, right and in between."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 6, size=(1, 8))
    whole, _, state = run_step(table, init(table, CONFIG, 1), ids, 0.0)

    pieces = []
    piecewise = init(table, CONFIG, 1)
    no_cache = Settings.of(replace(CONFIG, cache_layers=()), LAYERS)
    for start in (0, 4):
        place = np.sort(rng.permutation(8)[:4])
        token_ids, mask = rng.integers(0, 6, size=(1, 8)), np.zeros((1, 8), bool)
        token_ids[0, place], mask[0, place] = ids[0, start : start + 4], True
        part, _, piecewise = run_step(table, piecewise, token_ids, 0.0, mask, no_cache)
        assert (part.tier[:, ~mask] == LEARNED).all()
        pieces.append(jax.tree.map(lambda leaf, place=place: leaf[:, :, place], replace(part, rules=None)))
    joined = jax.tree.map(lambda *parts: np.concatenate(parts, axis=2), *pieces)
    for ours, theirs in zip(jax.tree.leaves(joined), jax.tree.leaves(replace(whole, rules=None)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(piecewise.recent, ids[:, -2:])
    for ours, theirs in zip(jax.tree.leaves(piecewise.counters), jax.tree.leaves(state.counters), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_padding_is_not_remembered_and_an_empty_row_keeps_its_past(table):
    ids = np.arange(16).reshape(2, 8)
    _, _, state = run_step(table, init(table, CONFIG, 2), ids, 0.0, np.arange(8) < np.array([[8], [5]]))
    np.testing.assert_array_equal(state.recent, [[6, 7], [11, 12]])
    remembered = set(map(tuple, np.asarray(state.cache.ids).reshape(-1, 3).tolist())) - {(NONE,) * 3}
    assert remembered and remembered <= {(i, i + 1, i + 2) for i in (*range(6), 8, 9, 10)}

    _, _, state = run_step(table, state, ids, 1.0, np.zeros((2, 8), bool))
    np.testing.assert_array_equal(state.recent, [[6, 7], [11, 12]])
    assert int(np.asarray(state.counters.tokens).sum()) == LAYERS * 13
    np.testing.assert_array_equal(begin(state, batch_size=3).recent, np.full((3, 2), NONE))


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_counters_equal_a_slow_count(table, seed):
    rng = np.random.default_rng(seed)
    state = init(table, CONFIG, 2)
    tokens, agreements, active = np.zeros((3, LAYERS, 3), int)
    for now in range(3):
        ids, mask = rng.integers(0, 6, size=(2, 8)), rng.random((2, 8)) < 0.8
        planned, routing, state = run_step(table, state, ids, float(now), mask)
        best = router(ids).argmax(-1)
        for l, (b, t) in ((l, at) for l in range(LAYERS) for at in np.argwhere(mask)):
            tier = planned.tier[l, b, t]
            tokens[l, tier] += 1
            agreements[l, tier] += tier == LEARNED or planned.routing.experts[l, b, t, 0] == best[l, b, t]
            active[l, tier] += (routing.experts[l, b, t] < EXPERTS).sum()
    np.testing.assert_array_equal(state.counters.tokens, tokens)
    np.testing.assert_array_equal(state.counters.agreements, agreements)
    np.testing.assert_array_equal(state.counters.active, active)

    shares = summary(state.counters, TOP_K)
    for part in [shares, *shares["layers"]]:
        assert sum(part["tiers"].values()) == pytest.approx(1)
        assert part["hit_rate"] == pytest.approx(1 - part["tiers"]["learned"])
        assert part["experts_per_token"] == pytest.approx(part["experts_share"] * TOP_K)
    assert shares["tokens"] == tokens.sum()
    planned_tokens = tokens[:, :2].sum()
    assert shares["mispredictions"] == pytest.approx(1 - agreements[:, :2].sum() / max(planned_tokens, 1))
    assert shares["experts_per_token"] == pytest.approx(active.sum() / tokens.sum())


def test_a_summary_before_the_first_token():
    shares = summary(Counters._zero(LAYERS), TOP_K)
    assert (shares["tokens"], shares["hit_rate"], shares["experts_per_token"]) == (0, 0.0, 0.0)
    assert shares["tiers"] == {"fast": 0.0, "cached": 0.0, "learned": 0.0}
    assert len(shares["layers"]) == LAYERS


def test_without_a_cache_there_are_two_tiers(table):
    config = replace(CONFIG, cache_size=0)
    state = init(table, config, 1)
    assert state.cache is None
    assert state.recent.shape == (1, 1)  # the table looks back two ids
    ids, how = np.array([[0, 1, 2, 3, 3, 2, 1, 0]]), Settings.of(config, LAYERS)
    for now in range(2):
        planned, _, state = run_step(table, begin(state), ids, float(now), None, how)
        assert set(np.unique(planned.tier)) == {FAST, LEARNED}


@pytest.mark.parametrize("cache_size", [0, 64])
def test_order_0_plans_every_real_token_and_nothing_else(random_stats, cache_size):
    """As the simple alternatives do. It predicts nothing, so nothing it does is a misprediction."""
    policy = LayerPolicy(experts_kept=1, use_answers=False, ngram_orders=(0,))
    config = replace(CONFIG, default=policy, cache_size=cache_size)
    table = build_table(config, random_stats(np.random.default_rng(8), LAYERS, EXPERTS), top_k=TOP_K)
    ids, mask = np.arange(16).reshape(2, 8), np.random.default_rng(0).random((2, 8)) < 0.7
    state, how = init(table, config, 2), Settings.of(config, LAYERS)
    for now in range(2):
        planned, routing, state = run_step(table, state, ids, float(now), mask, how)
        np.testing.assert_array_equal(planned.tier, np.where(np.broadcast_to(mask, (LAYERS, 2, 8)), FAST, LEARNED))
        assert ((routing.experts[:, mask] < EXPERTS).sum(-1) == 1).all()
    shares = summary(state.counters, TOP_K)
    assert (shares["hit_rate"], shares["mispredictions"], shares["experts_per_token"]) == (1.0, 0.0, 1.0)


def test_the_second_step_and_another_policy_compile_nothing(random_stats):
    stats = random_stats(np.random.default_rng(8), LAYERS, EXPERTS)
    others = [
        replace(CONFIG, default=LayerPolicy(experts_kept=0, use_answers=False, gate_ratio=0.4)),
        replace(CONFIG, frequency_threshold=2, confidence_threshold=0.9, mass_threshold=0.5, cache_ttl_seconds=1.0),
        replace(CONFIG, layers={0: None}, cache_layers=None),
        replace(CONFIG, default=LayerPolicy(experts_kept=2, use_answers=False, gate_mass=0.7, ngram_orders=(0,))),
    ]
    state = init(build_table(CONFIG, stats, top_k=TOP_K, keep_shapes=True), CONFIG, 1)
    ids = np.array([[0, 1, 9, 3, 11, 8, 9, 2]])
    compiled = None
    for now, config in enumerate([CONFIG, CONFIG, *others]):
        how = Settings.of(config, LAYERS)
        _, _, state = run_step(
            build_table(config, stats, top_k=TOP_K, keep_shapes=True), state, ids, float(now), None, how
        )
        sizes = (plan_jit._cache_size(), commit_jit._cache_size())
        assert compiled in (None, sizes)
        compiled = sizes


@pytest.mark.parametrize("already", [2**31 - 3, 2**32 - 3, 7 * 2**32 - 1])
def test_counters_pass_the_end_of_their_words_and_go_on(table, already):
    """8 tokens and 5 of padding, after so many that int32 or uint32 would wrap around."""

    def counted():
        return WideCount(*(jnp.full((LAYERS, 3), part, jnp.uint32) for part in (already % 2**32, already // 2**32)))

    state = replace(init(table, CONFIG, 1), counters=Counters(counted(), counted(), counted()))
    ids, mask = np.arange(13)[None] % 7, jnp.arange(13)[None] >= 5
    _, _, state = run_step(table, state, ids, 0.0, mask)

    tokens = np.asarray(state.counters.tokens)
    assert tokens.dtype == np.int64 and (tokens.sum(axis=1) == 3 * already + 8).all()
    assert (np.asarray(state.counters.active).sum(axis=1) - 3 * already <= 8 * TOP_K).all()
    shares = summary(state.counters, TOP_K)
    assert shares["tokens"] == LAYERS * (3 * already + 8)
    assert shares["tiers"]["fast"] == pytest.approx(1 / 3, rel=1e-8)
    assert shares["experts_per_token"] == pytest.approx(1, rel=1e-8)


def test_wide_counts_equal_whole_numbers_of_any_size():
    rng = np.random.default_rng(0)
    counts = WideCount._zero((5,))
    whole = np.zeros(5, np.int64)
    add = jax.jit(WideCount.plus)
    for _ in range(40):
        more = rng.integers(0, 2**31, size=5)
        counts, whole = add(counts, jnp.asarray(more, jnp.int32)), whole + more
        np.testing.assert_array_equal(counts, whole)
    assert whole.min() > 2**33 and add._cache_size() == 1


@pytest.mark.parametrize("function", [varjax.plan, varjax.commit, varjax.init, varjax.Auditor.__init__])
def test_what_a_public_function_takes_and_gives_is_public(function):
    hints = typing.get_type_hints(function).values()
    ours = {hint.__name__ for hint in hints if isinstance(hint, type) and hint.__module__.startswith("varjax.")}
    assert ours and ours <= set(varjax.__all__)


def test_caches_of_their_own_give_each_sequence_what_it_gets_alone(table):
    rng = np.random.default_rng(5)
    texts, now = rng.integers(8, 11, (4, 3, 8)), (0.0, 4.0, 9.0, 14.0)  # calls, sequences, positions

    def run(rows, shared):
        state, found = init(table, CONFIG, len(rows), shared_cache=shared), []
        for text, moment in zip(texts, now, strict=True):
            state = begin(state, kept=None if shared else jnp.ones(len(rows), bool))
            planned, _, state = run_step(table, state, text[rows], moment)
            found.append(planned)
        return found, state.counters

    together, counted = run([0, 1, 2], shared=False)
    alone = [run([row], shared=True) for row in range(3)]
    for call, planned in enumerate(together):
        for row, (found, _) in enumerate(alone):
            jax.tree.map(
                lambda ours, theirs, row=row: np.testing.assert_array_equal(ours[:, row], theirs[:, 0]),
                replace(planned, rules=None),
                replace(found[call], rules=None),
            )
    hits = np.stack([(planned.tier == CACHED).any(axis=(0, 2)) for planned in together])
    assert not hits[0].any() and hits.any(axis=0).all()
    summed = jax.tree.map(lambda *one: sum(np.asarray(leaf) for leaf in one), *(counters for _, counters in alone))
    jax.tree.map(np.testing.assert_array_equal, counted, summed)
    assert not (run([0, 1, 2], shared=True)[0][1].tier == together[1].tier).all()  # neighbors teach a shared one


def test_a_new_sequence_finds_a_cache_of_its_own_empty(table):
    ids = np.array([[8, 9, 10, 11, 12, 13, 14, 15]] * 2)
    _, _, state = run_step(table, init(table, CONFIG, 2, shared_cache=False), ids, 0.0)
    second, _, state = run_step(table, begin(state, kept=jnp.array([True, False])), ids, 1.0)
    assert (second.tier == CACHED).any(axis=(0, 2)).tolist() == [True, False]
    third, _, _ = run_step(table, begin(state, batch_size=2), ids, 2.0)
    assert (third.tier == LEARNED).all()

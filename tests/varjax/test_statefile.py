"""A saved state goes on as if nothing had stopped, is whole or not there, and is refused where it does not belong."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from varjax import cache as context_cache
from varjax import statefile
from varjax.cache import since
from varjax.config import LayerPolicy, VARConfig
from varjax.routing import top_k
from varjax.step import Counters, Settings, VARState, commit, init, plan, timestamp
from varjax.table import build_table

LAYERS, EXPERTS, TOP_K = 3, 5, 2
CONFIG = VARConfig(
    frequency_threshold=10,
    entropy_threshold=0.6,
    confidence_threshold=0.5,
    cache_size=16,
    cache_ttl_seconds=0.3,
    context_window_size=2,
    default=LayerPolicy(experts_kept=1, use_answers=False, ngram_orders=(1, 2)),
)
ABOUT = {"fingerprint": "abc", "cache_size": 16}
WITHOUT = replace(
    CONFIG, cache_size=0, default=LayerPolicy(experts_kept=1, use_answers=False)
)  # `recent` is empty, [B, 0]


def table_of(random_stats, config):
    return build_table(config, random_stats(np.random.default_rng(8), LAYERS, EXPERTS), top_k=TOP_K)


@jax.jit
def step(table, state, ids, probs, now, settings):
    planned = plan(table, state, ids, now, settings)
    return planned, commit(state, planned, ids, top_k(probs, TOP_K), probs, now, settings)


def run(table, config, state, times, origin):
    """One step of random ids at each of `times`, in seconds -> plans, state."""
    plans = []
    for time in times:
        rng = np.random.default_rng(round(time * 100))
        ids = jnp.asarray(rng.integers(0, 7, (2, 4)), jnp.int32)
        probs = jnp.asarray(rng.dirichlet(np.full(EXPERTS, 0.4), (LAYERS, 2, 4)), jnp.float32)
        planned, state = step(table, state, ids, probs, timestamp(origin + time), Settings.of(config, LAYERS))
        plans.append(planned)
    return plans, state


def same(ours, theirs):
    return all(
        a.dtype == b.dtype and np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    )


@pytest.mark.parametrize("config", [CONFIG, WITHOUT])
def test_what_goes_on_after_loading_equals_never_having_stopped(random_stats, tmp_path, config):
    """On a clock that began elsewhere, with decisions that expire on the way, and in the middle of the texts."""
    table = table_of(random_stats, config)
    times = np.arange(24) * 0.05
    plans, whole = run(table, config, init(table, config, 2), times, origin=0.0)
    assert config is WITHOUT or sum(int((part.tier == 1).sum()) for part in plans[12:]) > 5

    origin = 0.0
    _, state = run(table, config, init(table, config, 2), times[:6], origin)
    for first, next_origin in ((6, -1e5), (12, 7e4), (18, 4e6)):
        piece = times[first : first + 6]
        statefile.save(tmp_path, state, origin + piece[0], ABOUT)
        origin = next_origin
        state = statefile.load(tmp_path, init(table, config, 1), origin + piece[0], ABOUT)
        ours, state = run(table, config, state, piece, origin)
        assert same(ours, plans[first : first + 6])
    assert same(state.counters, whole.counters) and same(state.recent, whole.recent)
    if config is CONFIG:
        now = times[-1]
        assert same(
            replace(state.cache, stamp=since(state.cache.stamp, timestamp(origin + now))),
            replace(whole.cache, stamp=since(whole.cache.stamp, timestamp(now))),
        )


def test_a_state_that_does_not_belong_here_is_refused_in_one_error(random_stats, tmp_path):
    table = table_of(random_stats, CONFIG)
    state, now = init(table, CONFIG, 2), 0.0
    statefile.save(tmp_path, state, now, ABOUT)

    def refused(like, about, *named):
        with pytest.raises(ValueError) as error:
            statefile.load(tmp_path, like, now, about)
        assert str(error.value).startswith(f"{tmp_path}: ") and "begin with a new state" in str(error.value)
        for text in named:
            assert text in str(error.value)

    refused(state, ABOUT | {"fingerprint": "xyz"}, "fingerprint is abc (here xyz)")
    larger = init(table, replace(CONFIG, cache_size=32, context_window_size=3), 1)
    refused(
        larger, ABOUT | {"cache_size": 32}, "cache_size is 16 (here 32)", "cache.ids is int32[4, 4, 2] (here int32[8"
    )
    refused(init(table, replace(CONFIG, cache_size=0), 1), ABOUT, "cache.ids is int32[4, 4, 2] (here None)")
    assert same(statefile.load(tmp_path, init(table, CONFIG, 5), now, ABOUT), state)


def test_another_format_and_what_is_no_state_are_refused(random_stats, tmp_path, monkeypatch):
    table = table_of(random_stats, CONFIG)
    state, now = init(table, CONFIG, 2), 0.0
    with pytest.raises(FileNotFoundError, match=r"nowhere: no state was saved"):
        statefile.load(tmp_path / "nowhere", state, now, ABOUT)
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty: no state was saved"):
        statefile.load(tmp_path / "empty", state, now, ABOUT)
    (tmp_path / "file").write_text("text")
    with pytest.raises(NotADirectoryError, match="is a file"):
        statefile.save(tmp_path / "file", state, now, ABOUT)

    with ocp.CheckpointManager(tmp_path / "other") as manager:
        manager.save(1, args=ocp.args.StandardSave({"a": np.ones(2)}))
    with pytest.raises(ValueError, match=r"other: a state of format 1, expected 2"):
        statefile.load(tmp_path / "other", state, now, ABOUT)

    monkeypatch.setattr(statefile, "FORMAT", 3)
    statefile.save(tmp_path / "newer", state, now, ABOUT)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="a state of format 3, expected 2"):
        statefile.load(tmp_path / "newer", state, now, ABOUT)


def test_a_truncated_state_is_an_error_that_names_its_file(tmp_path):
    statefile.save(tmp_path, small_state(3), np.int32(0), ABOUT)
    file = tmp_path / statefile.FILE
    content = file.read_bytes()
    for end in (0, 5, 100, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:end])
        with pytest.raises(ValueError, match=r"state\.safetensors: .* damaged.*; restore the file"):
            statefile.load(tmp_path, small_state(0), np.int32(0), ABOUT)


KILLED = """
import os, sys
import numpy as np
from varjax import checksums, statefile
from tests.varjax.test_statefile import ABOUT, small_state

checksums._seal = lambda path: os._exit(9)  # the arrays are on the disk, their checksum is not
statefile.save(sys.argv[1], small_state(7), np.int32(0), ABOUT)
"""


def small_state(value: int) -> VARState:
    cache = context_cache.init(8, 2, LAYERS, TOP_K)
    counters = jax.tree.map(lambda leaf: leaf + np.uint32(value), Counters._zero(LAYERS))
    return VARState(replace(cache, ids=cache.ids + value), jnp.full((2, 1), value, jnp.int32), counters)


def test_a_save_that_is_killed_leaves_the_state_before(tmp_path):
    now = np.int32(0)
    statefile.save(tmp_path, small_state(3), now, ABOUT)
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path], cwd=Path(__file__).parents[2], timeout=60)
    assert done.returncode == 9
    assert len(list(tmp_path.iterdir())) == 2  # the beginnings of the second lie next to the first
    assert same(statefile.load(tmp_path, small_state(0), now, ABOUT), small_state(3))
    statefile.save(tmp_path, small_state(5), now, ABOUT)
    assert same(statefile.load(tmp_path, small_state(0), now, ABOUT), small_state(5))
    assert set(tmp_path.iterdir()) == {tmp_path / statefile.FILE}

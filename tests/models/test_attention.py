"""Attention against jax.nn's: whole texts and continued ones, padding, windows, blocks in parts, memory.

The kernel for GPUs is interpreted here, and lowered.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import attention, attention_pallas
from models.attention import Sight, attend
from models.decoder import Network
from models.experts import _pallas_engine, get_engine
from models.kv_cache import KVCache
from models.parameters import init_params, prepare
from tests.lowering import lowered_for_cuda


def random(*shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def inputs(batch, length, slots, dtype=jnp.float32, heads=6, groups=2, size=8):
    queries = random(batch, length, heads, size, dtype=dtype)
    keys, values = (random(batch, groups, slots, size, seed=seed, dtype=dtype) for seed in (1, 2))
    return queries, keys, values


def sight(batch, length, slots, offset, window):
    """With padding before the first text and after the last one."""
    real = np.ones((batch, slots), bool)
    real[0, :2], real[-1, -2:] = False, False
    positions = np.maximum(np.cumsum(real, axis=1) - 1, 0).astype(np.int32)
    first = 0 if offset is None else offset
    queries = positions[:, first : first + length]
    at = None if offset is None else jnp.int32(offset)
    return Sight(jnp.asarray(queries), jnp.asarray(positions), jnp.asarray(real), at, window)


def expected(queries, keys, values, seen: Sight):
    """What jax.nn computes under a mask that is spelled out."""
    first = 0 if seen.offset is None else int(seen.offset)
    slots, length = keys.shape[2], queries.shape[1]
    mask = (np.arange(slots)[None] <= np.arange(length)[:, None] + first) & np.asarray(seen.real)[:, None]
    if seen.window is not None:
        mask &= np.asarray(seen.keys)[:, None] > np.asarray(seen.queries)[:, :, None] - seen.window
    with jax.numpy_dtype_promotion("standard"):
        out = jax.nn.dot_product_attention(
            queries, keys.swapaxes(1, 2), values.swapaxes(1, 2), mask=jnp.asarray(mask[:, None])
        )
    return np.asarray(out, np.float32), mask.any(-1)  # a query without any key has no right value


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(
    ("length", "slots", "offset", "parts"),
    [(7, 7, None, 1), (150, 150, None, 1), (150, 150, None, 3), (1, 30, 12, 1), (11, 30, 12, 1), (11, 30, 12, 3)],
)
def test_it_agrees_with_jax(monkeypatch, batch, window, length, slots, offset, parts):
    given, seen = inputs(batch, length, slots), sight(batch, length, slots, offset, window)
    calls = []
    if parts > 1:  # of a block of 64 queries or less, with 6 heads
        monkeypatch.setattr(attention, "SCORES_BYTES", 4 * 6 * batch * slots * (min(length, 64) // parts))
        divide = attention.in_parts
        monkeypatch.setattr(attention, "in_parts", lambda *given, **named: calls.append(1) or divide(*given, **named))
    out = np.asarray(jax.jit(partial(attend))(*given, seen))
    assert bool(calls) == (parts > 1)
    wanted, sees = expected(*given, seen)
    np.testing.assert_allclose(out[sees], wanted[sees], atol=2e-6)
    assert np.isfinite(out).all()


def test_parts_change_neither_results_nor_gradients(monkeypatch):
    given, seen = inputs(2, 40, 40), sight(2, 40, 40, None, 9)

    def loss(queries, keys, values):
        return jnp.sum(jnp.square(attend(queries, keys, values, seen)))

    whole = jax.value_and_grad(loss, (0, 1, 2))(*given)
    monkeypatch.setattr(attention, "SCORES_BYTES", 4 * 12 * 40 * 7)
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), jax.value_and_grad(loss, (0, 1, 2))(*given), whole
    )


def test_scores_are_float32_where_the_rest_is_not():
    given, seen = inputs(2, 20, 20, jnp.bfloat16), sight(2, 20, 20, None, None)
    wide = [one.astype(jnp.float32) for one in given]
    (wanted, sees), out = expected(*wide, seen), attend(*given, seen)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32)[sees], wanted[sees], atol=0.03)


@pytest.mark.parametrize("offset", [None, 0])
def test_a_long_text_fits(offset):
    """Mixtral's heads in bfloat16, compiled and not run: all scores at once would take 137 GB, and 3 are too many."""
    length = 32768
    shapes = [(1, length, 32, 128), (1, 8, length, 128), (1, 8, length, 128)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    positions, real = (jax.ShapeDtypeStruct((1, length), kind) for kind in (jnp.int32, bool))
    at = None if offset is None else jax.ShapeDtypeStruct((), jnp.int32)
    compiled = jax.jit(attend).lower(*arrays, Sight(positions, positions, real, at, None)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 3e9


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize(
    ("batch", "slots", "offset", "heads"),
    [(2, 30, 12, (6, 2)), (3, 300, 200, (6, 2)), (1, 300, 299, (16, 16)), (2, 200, 190, (64, 2))],
    ids=["one block", "blocks out of use", "one query head each", "many"],
)
def test_the_kernel_of_one_token_agrees_with_jax(batch, slots, offset, heads, window):
    """Parts without a slot that is seen are among them, and blocks beyond the end of the cache."""
    given = inputs(batch, 1, slots, heads=heads[0], groups=heads[1], size=16)
    seen = sight(batch, 1, slots, offset, window)
    tile = attention_pallas._tile_of(16, 4)
    unused = (offset // tile + 1) * tile  # slots from here on are not read
    keys, values = (one.at[:, :, unused:].set(jnp.nan) for one in given[1:])
    out = np.asarray(jax.jit(partial(attention_pallas.attend, interpret=True))(given[0], keys, values, seen))
    wanted, sees = expected(*given, seen)
    np.testing.assert_allclose(out[sees], wanted[sees], atol=2e-6)


def test_the_kernel_gives_numbers_where_nothing_is_seen():
    given, seen = inputs(2, 1, 100, size=16), sight(2, 1, 100, 80, None)
    out = attention_pallas.attend(*given, dataclasses.replace(seen, real=seen.real.at[0].set(False)), interpret=True)
    (wanted, _) = expected(*given, seen)
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out[1], wanted[1], atol=2e-6)


def test_the_kernel_reads_bfloat16():
    given, seen = inputs(2, 1, 100, jnp.bfloat16, size=16), sight(2, 1, 100, 80, None)
    out = attention_pallas.attend(*given, seen, interpret=True)
    (wanted, sees) = expected(*(one.astype(jnp.float32) for one in given), seen)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32)[sees], wanted[sees], atol=0.03)


def test_the_decoder_uses_the_kernel_of_its_engine(tiny_config, monkeypatch):
    config, calls = dataclasses.replace(tiny_config, head_dim=16), []
    call = attention_pallas.pl.pallas_call
    monkeypatch.setattr(
        attention_pallas.pl, "pallas_call", lambda *given, **named: calls.append(named["name"]) or call(*given, **named)
    )
    params, ids = init_params(config, jax.random.key(0)), random_ids(config, 2, 9)
    logits = []
    for engine in (get_engine("blocks"), _pallas_engine(interpret=True)):
        network, prepared = Network(config, engine), prepare(params, engine)
        kv = KVCache.empty(config, 2, 64, jnp.float32)
        kv = network.forward(prepared, ids[:, :8], kv=kv).kv
        assert "attend" not in calls
        logits.append(network.forward(prepared, ids[:, 8:], kv=kv).logits)
    assert calls.count("attend") == config.num_layers
    np.testing.assert_allclose(*logits, rtol=1e-4, atol=1e-4)


def random_ids(config, batch, length):
    return jax.random.randint(jax.random.key(3), (batch, length), 0, config.vocab_size, jnp.int32)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(("heads", "groups", "size"), [(32, 8, 128), (16, 16, 128), (16, 4, 256), (9, 3, 64)])
def test_the_kernel_is_lowered_for_cuda_at_real_sizes(heads, groups, size, dtype):
    arrays = [(8, 1, heads, size), (8, groups, 4096, size), (8, groups, 4096, size)]
    positions, real = (jax.ShapeDtypeStruct((8, 4096), kind) for kind in (jnp.int32, bool))
    first = jax.ShapeDtypeStruct((8, 1), jnp.int32)
    seen = Sight(first, positions, real, jax.ShapeDtypeStruct((), jnp.int32), None)
    given = [jax.ShapeDtypeStruct(shape, dtype) for shape in arrays]
    stages, numbers = 3, attention_pallas._tile_of(size, given[0].dtype.itemsize) * size
    assert stages * 2 * numbers * given[0].dtype.itemsize < 99 << 10  # of shared memory, the least of any GPU of today
    _, text = lowered_for_cuda(attention_pallas.attend, *given, seen)
    assert text.count("gpu.triton") == 1 and 'name = "attend"' in text

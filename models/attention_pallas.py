"""Attention of one new token per sequence over a key/value cache, in one kernel for NVIDIA GPUs.

Letters: B sequences, S slots of the cache, H query heads, G key/value heads, R = H / G query heads of each, d head_dim,
P parts of the cache.

A step of decoding is limited by memory bandwidth: all processors of a GPU must read, and only slots that are in use.
Each key/value head of a sequence has P programs, each with a part of the slots in use (split along the keys as in
Flash-Decoding, Dao et al. 2023). A program keeps the largest score, the sum of the weights and the weighted sum of the
values as it goes (online softmax, Milakov and Gimelshein 2018, arXiv 1805.02867). XLA puts the parts together.

Scores, sums and softmax are float32, as in `models.attention`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from models import attention
from models.attention import MASKED, Sight
from models.triton import PROGRAMS, backend

_TILE_BYTES = 1 << 14  # of the keys that a program reads at a time, so that three of them and as many values fit
_ROWS = 16  # the fewest that Triton multiplies


def attend(queries: jax.Array, keys: jax.Array, values: jax.Array, sight: Sight, interpret: bool = False) -> jax.Array:
    """Compute attention, as `models.attention.attend` does.

    The kernel is for one new token per sequence over a cache, and for heads of 16, 32, 64, ... numbers. Other calls are
    passed on. It has no gradients.

    Args:
        queries: [B, T, H, d], rotated.
        keys: [B, G, S, d], rotated.
        values: [B, G, S, d].
        sight: what each query may see.
        interpret: run the kernel as JAX operations, on any device and slowly, for tests.

    Returns:
        [B, T, H, d].
    """
    size, groups = keys.shape[3], keys.shape[1]
    fits = size >= 16 and size & (size - 1) == 0  # the sizes of Triton's arrays
    if sight.offset is None or queries.shape[1] > 1 or not fits:
        return attention.attend(queries, keys, values, sight)
    batch, slots, each = len(queries), keys.shape[2], queries.shape[2] // groups
    rows, tile = max(_ROWS, pl.next_power_of_2(each)), _tile_of(size, keys.dtype.itemsize)
    parts = min(pl.cdiv(PROGRAMS, batch * groups), pl.cdiv(slots, tile))
    shape = batch * groups, parts, rows
    run = pl.pallas_call(
        partial(_kernel, groups=groups, each=each, slots=slots, tile=tile),
        [jax.ShapeDtypeStruct(one, jnp.float32) for one in ((*shape, size), shape, shape)],
        grid=shape[:2],
        compiler_params=backend.CompilerParams(num_warps=4, num_stages=3),
        name="attend",
        interpret=interpret,
    )
    heads = [one.reshape(batch * groups, -1, size) for one in (queries, keys, values)]
    seen = sight.mask(0, 1, slots)[:, 0].astype(jnp.int8)  # XLA computes it once for all layers
    sums, totals, most = run(*heads, seen, jnp.reshape(sight.offset + 1, 1))
    weights = jnp.exp(most - most.max(1, keepdims=True))  # of the parts
    out = jnp.sum(weights[..., None] * sums, axis=1) / jnp.sum(weights * totals, axis=1)[..., None]
    return out[:, :each].reshape(queries.shape).astype(values.dtype)


def _tile_of(size: int, itemsize: int) -> int:
    """The slots of the cache that a program reads at a time; Triton multiplies at least 16."""
    return min(max(_TILE_BYTES // (size * itemsize), _ROWS), 64)


def _kernel(
    queries: Any,
    keys: Any,
    values: Any,
    seen: Any,
    length: Any,
    sums: Any,
    totals: Any,
    most: Any,
    *,
    groups: int,
    each: int,
    slots: int,
    tile: int,
) -> None:
    """One key/value head of a sequence, and one part of the slots in use.

    Reads queries [B * G, R, d], keys and values [B * G, S, d], `seen` int8[B, S] and `length` int32[1]. Writes, as
    float32, the `sums` [B * G, P, rows, d] of weighted values, the `totals` [B * G, P, rows] of the weights, and the
    largest scores, `most`, of the same shape.
    """
    head, part, parts = pl.program_id(0), pl.program_id(1), pl.num_programs(1)
    rows, size = sums.shape[2:]
    row, column = jnp.arange(rows, dtype=jnp.int32), jnp.arange(size, dtype=jnp.int32)
    index = jnp.broadcast_to(row[:, None], (rows, size)), jnp.broadcast_to(column, (rows, size))
    query = backend.load(queries.at[head, *index], mask=index[0] < each, other=0)
    blocks = pl.cdiv(length[0], tile)  # in use

    def step(index: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        total, weight, highest = state
        slot = index * tile + jnp.arange(tile, dtype=jnp.int32)
        there = slot < slots
        place = pl.ds(index * tile, tile)
        mask = jnp.broadcast_to(there[:, None], (tile, size))
        key = backend.load(keys.at[head, place, :], mask=mask, other=0)
        scores = jnp.dot(query, key.T, preferred_element_type=jnp.float32) * size**-0.5
        visible = backend.load(seen.at[head // groups, place], mask=there, other=0) != 0
        scores = jnp.where(visible[None, :], scores, MASKED)
        higher = jnp.maximum(highest, scores.max(1))
        shrink, weights = jnp.exp(highest - higher), jnp.exp(scores - higher[:, None])
        value = backend.load(values.at[head, place, :], mask=mask, other=0)
        added = jnp.dot(weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
        return total * shrink[:, None] + added, weight * shrink + weights.sum(1), higher

    start = (jnp.zeros((rows, size), jnp.float32), jnp.zeros(rows, jnp.float32), jnp.full(rows, MASKED, jnp.float32))
    first, last = part * blocks // parts, (part + 1) * blocks // parts
    sums[head, part], totals[head, part], most[head, part] = jax.lax.fori_loop(first, last, step, start)

"""Scaled dot-product attention with grouped key/value heads, for whole texts and for continued ones.

Letters: B sequences, T queries, S keys, H query heads, G key/value heads, R = H / G query heads of each, d head_dim.

Keys and values are [B, G, S, d]: the positions of each head are contiguous, as the products need them. With positions
first (`jax.nn.dot_product_attention`), a step of decoding would transpose the whole key/value cache. Scores and softmax
are float32. What a query may see follows from positions and padding (`Sight`). Masks and scores are computed for one
block of queries at a time, so the memory grows with the length of a text and not with its square.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from models.parts import in_parts

BLOCKS = 8  # of the queries of a whole text, at most
SCORES_BYTES = 1 << 28  # of one block of scores; blocks with more are computed in parts, one after the other
MASKED = 0.7 * float(jnp.finfo(jnp.float32).min)  # finite, so that a row without any key stays free of NaN


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sight:
    """Which keys the queries of a call may see."""

    queries: jax.Array  # int32[B, T], the position of each in its text
    keys: jax.Array  # int32[B, S]
    real: jax.Array  # bool[B, S], false at padding
    offset: Any  # int32[], the slot of the first query; None: whole texts, S = T
    window: int | None = dataclasses.field(metadata={"static": True})  # keys that a query sees, its own included

    def mask(self, start: Any, count: int, keys: int) -> jax.Array:
        """Tell what some queries see.

        Args:
            start: the first of them, which may be traced.
            count: how many there are.
            keys: of how many keys, from the first one on.

        Returns:
            bool[B, count, keys].
        """
        slots = jnp.arange(count, dtype=jnp.int32) + start + (0 if self.offset is None else self.offset)
        seen = (jnp.arange(keys, dtype=jnp.int32)[None] <= slots[:, None])[None] & self.real[:, None, :keys]
        if self.window is not None:
            queries = jax.lax.dynamic_slice_in_dim(self.queries, start, count, axis=1)
            seen &= self.keys[:, None, :keys] > queries[:, :, None] - self.window
        return seen


def attend(queries: jax.Array, keys: jax.Array, values: jax.Array, sight: Sight) -> jax.Array:
    """Compute attention.

    The queries of a whole text are processed in at most 8 blocks of at least 64, each with the keys up to its own end,
    so nearly half of the scores are never computed.

    Args:
        queries: [B, T, H, d], rotated.
        keys: [B, G, S, d], rotated.
        values: [B, G, S, d].
        sight: what each query may see.

    Returns:
        [B, T, H, d].
    """
    batch, length, heads, size = queries.shape
    grouped = queries.reshape(batch, length, keys.shape[1], -1, size)
    whole = sight.offset is None
    rows = max(-(-length // BLOCKS), 64) if whole else length
    blocks = []
    for start in range(0, length, rows):
        end = min(start + rows, length)
        seen = end if whole else keys.shape[2]
        blocks.append(_block(grouped[:, start:end], keys[:, :, :seen], values[:, :, :seen], sight, start))
    return jnp.concatenate(blocks, axis=1).reshape(batch, length, heads, size)


def _block(queries: jax.Array, keys: jax.Array, values: jax.Array, sight: Sight, start: int) -> jax.Array:
    """Attention [B, t, G, R, d] of the queries from `start` on to all keys given."""
    batch, length, groups, each, _ = queries.shape
    seen = keys.shape[2]
    rows = min(max(SCORES_BYTES // (4 * batch * groups * each * seen), 1), length)
    if rows == length:
        return _scored(queries, keys, values, sight.mask(start, length, seen))
    rows = -(-length // -(-length // rows))  # equal parts

    @jax.checkpoint
    def part(first: jax.Array) -> jax.Array:
        own = jax.lax.dynamic_slice_in_dim(queries, first, rows, axis=1)
        return _scored(own, keys, values, sight.mask(first + start, rows, seen))

    return in_parts(part, queries, rows, axis=1)


def _scored(queries: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array) -> jax.Array:
    """Attention [B, t, G, R, d] under a mask bool[B, t, S]."""
    # For one token of one sequence, XLA on a GPU would transpose keys that come second, the whole cache in every step.
    # Elsewhere the keys come second, so that the softmax runs along the last axis and in one kernel.
    if queries.shape[:2] == (1, 1):
        by_key = _product(keys, queries, ((3,), (4,)), ((0, 1), (0, 2)))  # [B, G, S, 1, R]
        scores = jnp.moveaxis(by_key, 2, -1)
    else:
        scores = _product(queries, keys, ((4,), (3,)), ((0, 2), (0, 1)))  # [B, G, t, R, S]
    scores = jnp.where(mask[:, None, :, None], scores * queries.shape[-1] ** -0.5, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    out = _product(weights, values, ((4,), (2,)), ((0, 1), (0, 1))).astype(values.dtype)  # [B, G, t, R, d]
    return out.swapaxes(1, 2)


def _product(one: jax.Array, other: jax.Array, contracted: Any, batched: Any) -> jax.Array:
    """`lax.dot_general` that gives float32; axes of both operands are contracted, then others are batched."""
    return jax.lax.dot_general(one, other, (contracted, batched), preferred_element_type=jnp.float32)

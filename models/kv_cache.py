"""The key/value cache of the decoder: arrays in, arrays out.

Letters: B sequences, T new positions, S capacity, G key/value heads.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from models.config import MoEConfig
from models.placement import ONE_DEVICE, Placement

AXES = ("batch", None, "kv_heads", None)  # of keys and values


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the positions so far. All sequences fill the same slots; `mask` tells padding apart."""

    keys: list[jax.Array]  # one [B, S, G, head_dim] per layer, with experts or without, rotated
    values: list[jax.Array]  # likewise
    mask: jax.Array  # bool[B, S], a real token stands in this slot
    positions: jax.Array  # int32[B, S], its position in its own text
    length: jax.Array  # int32[], slots in use

    @classmethod
    def empty(
        cls,
        config: MoEConfig,
        batch_size: int,
        capacity: int,
        dtype: jnp.dtype,
        placement: Placement = ONE_DEVICE,
    ) -> KVCache:
        """A cache for `capacity` positions (slots), padding included."""
        shape = (batch_size, capacity, config.num_kv_heads, config.head_dim)
        where, everywhere = placement.sharding(shape, *AXES), placement.sharding(())
        return cls(
            keys=[_zeros(shape, dtype, where) for _ in range(config.depth)],
            values=[_zeros(shape, dtype, where) for _ in range(config.depth)],
            mask=_zeros(shape[:2], bool, everywhere),
            positions=_zeros(shape[:2], jnp.int32, everywhere),
            length=_zeros((), jnp.int32, everywhere),
        )

    def store(self, layer: int, keys: jax.Array, values: jax.Array) -> KVCache:
        """With the newest slots of one layer written; `extend` must have made room for them before."""
        nothing = jnp.int32(0)
        start = (nothing, self.length - keys.shape[1], nothing, nothing)
        new_keys, new_values = list(self.keys), list(self.values)
        new_keys[layer] = jax.lax.dynamic_update_slice(self.keys[layer], keys, start)
        new_values[layer] = jax.lax.dynamic_update_slice(self.values[layer], values, start)
        return dataclasses.replace(self, keys=new_keys, values=new_values)

    def constrain(self, placement: Placement) -> KVCache:
        """The cache inside a jitted function, where `empty` put it."""
        keys, values = ([placement.constrain(one, *AXES) for one in layers] for layers in (self.keys, self.values))
        return KVCache(keys, values, *placement.whole((self.mask, self.positions, self.length)))


def _zeros(shape: tuple[int, ...], dtype: Any, where: NamedSharding | None) -> jax.Array:
    """Made on the device: outside of `jit` the zero itself would be sent there."""
    return jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=where)(shape, jnp.dtype(dtype))


def extend(kv: KVCache, mask: jax.Array) -> tuple[KVCache, jax.Array]:
    """Take T more slots into use; returns the cache and the new tokens' positions int32[B, T].

    A position counts the real tokens before it, so padding on either side leaves the text's own numbering alone.
    """
    before = kv.mask.sum(axis=1, dtype=jnp.int32)
    positions = jnp.maximum(before[:, None] + jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
    start = (jnp.int32(0), kv.length)
    kv = dataclasses.replace(
        kv,
        mask=jax.lax.dynamic_update_slice(kv.mask, mask, start),
        positions=jax.lax.dynamic_update_slice(kv.positions, positions, start),
        length=kv.length + mask.shape[1],
    )
    return kv, positions


def visible(
    query_positions: jax.Array,
    key_positions: jax.Array,
    key_mask: jax.Array,
    window: int | None,
    offset: jax.Array | int,
) -> jax.Array:
    """bool[B, T, S]: which keys a query may look at.

    Args:
        query_positions: int32[B, T].
        key_positions: int32[B, S].
        key_mask: bool[B, S], false for padding and for slots not yet in use.
        window: keys within reach of a query, itself included; None = all before it.
        offset: slot of the first query.
    """
    queries, keys = query_positions.shape[1], key_positions.shape[1]
    causal = jnp.arange(keys, dtype=jnp.int32)[None, :] <= jnp.arange(queries, dtype=jnp.int32)[:, None] + offset
    seen = causal[None] & key_mask[:, None, :]
    if window is not None:
        seen &= key_positions[:, None, :] > query_positions[:, :, None] - window
    return seen

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

AXES = ("batch", "kv_heads", None, None)  # names of the axes of keys and values


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the positions so far. All sequences fill the same slots; `mask` marks the real tokens."""

    keys: list[jax.Array]  # [B, G, S, head_dim] for each layer, with experts or without, rotated
    values: list[jax.Array]  # [B, G, S, head_dim] for each layer
    mask: jax.Array  # bool[B, S], whether the slot holds a real token
    positions: jax.Array  # int32[B, S], the token's position in its own text
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
        """Make a cache without positions.

        Args:
            config: the architecture.
            batch_size: number of sequences B.
            capacity: slots S, padding included.
            dtype: of keys and values.
            placement: the devices.

        Returns:
            The cache.
        """
        shape = (batch_size, config.num_kv_heads, capacity, config.head_dim)
        where, everywhere = placement.sharding(shape, *AXES), placement.sharding(())
        return cls(
            keys=[_zeros(shape, dtype, where) for _ in range(config.depth)],
            values=[_zeros(shape, dtype, where) for _ in range(config.depth)],
            mask=_zeros((batch_size, capacity), bool, everywhere),
            positions=_zeros((batch_size, capacity), jnp.int32, everywhere),
            length=_zeros((), jnp.int32, everywhere),
        )

    def store(self, layer: int, keys: jax.Array, values: jax.Array) -> KVCache:
        """Write the newest T slots of one layer, for which `extend` has made room.

        Args:
            layer: position among all layers.
            keys: [B, G, T, head_dim], rotated.
            values: [B, G, T, head_dim].

        Returns:
            The new cache.
        """
        nothing = jnp.int32(0)
        start = (nothing, nothing, self.length - keys.shape[2], nothing)  # `length` already counts these slots
        new_keys, new_values = list(self.keys), list(self.values)
        new_keys[layer] = jax.lax.dynamic_update_slice(self.keys[layer], keys, start)
        new_values[layer] = jax.lax.dynamic_update_slice(self.values[layer], values, start)
        return dataclasses.replace(self, keys=new_keys, values=new_values)

    def constrain(self, placement: Placement) -> KVCache:
        """Keep the cache divided over devices as `empty` made it, inside a jitted function.

        Args:
            placement: the devices.

        Returns:
            The constrained cache.
        """
        keys, values = ([placement.constrain(one, *AXES) for one in layers] for layers in (self.keys, self.values))
        return KVCache(keys, values, *placement.whole((self.mask, self.positions, self.length)))


def roomy(positions: int) -> int:
    """Round a capacity up, so that caches of many capacities have few shapes to compile for.

    Args:
        positions: that are needed.

    Returns:
        At least 64; beyond that, at most a quarter more than is needed, a multiple of an eighth of a power of two.
    """
    step = max((1 << (positions - 1).bit_length()) // 8, 16)
    return max(-(-positions // step) * step, 64)


def _zeros(shape: tuple[int, ...], dtype: Any, where: NamedSharding | None) -> jax.Array:
    """Zeros made on the device; outside of `jit` the number 0 would be sent there."""
    return jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=where)(shape, jnp.dtype(dtype))

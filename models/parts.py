"""A large array computed part by part, where all of it at once would take too much memory on the way."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


def in_parts(part: Callable[[jax.Array], jax.Array], x: jax.Array, rows: int, axis: int) -> jax.Array:
    """Compute an array part by part, one after the other, to bound the memory.

    Args:
        part: gives the rows from a first one int32[] on; called with every multiple of `rows`, except that the last
            part ends where the array does, and repeats rows of the one before.
        x: any array of the result's shape and dtype. The result begins as a copy of it: as zeros, it would depend on
            nothing, and XLA would hold those of all layers from the start of a program.
        rows: of a part.
        axis: that is divided.

    Returns:
        The array.
    """
    length = x.shape[axis]

    def add(index: jax.Array, out: jax.Array) -> jax.Array:
        first = jnp.minimum(index * rows, length - rows)
        return jax.lax.dynamic_update_slice_in_dim(out, part(first), first, axis)

    return jax.lax.fori_loop(np.int32(0), np.int32(-(-length // rows)), add, x)

"""Counts beyond 2^32 in programs without 64-bit integers: two words and a carry.

JAX has no 64-bit integers unless a process asks for them (`JAX_ENABLE_X64`), and a service counts past 2^31 within
days. A count here is two uint32 words; on the host it is an int64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from varjax.transfer import to_device


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class WideCount:
    """Counts from 0 to 2^64 - 1, `high * 2^32 + low`. `np.asarray` of it gives int64, exact up to 2^63 - 1."""

    low: Array  # uint32 [...]
    high: Array  # uint32 [...]

    @classmethod
    def zero(cls, shape: tuple[int, ...]) -> WideCount:
        """All counts 0; two arrays, so that each can be donated."""
        return cls(*to_device((np.zeros(shape, np.uint32), np.zeros(shape, np.uint32))))

    def plus(self, more: Array) -> WideCount:
        """The counts with `more` added. Pure, fit for jit.

        Args:
            more: int32 or uint32 [...], none of them negative.
        """
        low = self.low + more.astype(jnp.uint32)
        return WideCount(low, self.high + (low < self.low).astype(jnp.uint32))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """int64 [...] on the host."""
        low, high = (np.asarray(word).astype(np.int64) for word in jax.device_get((self.low, self.high)))
        return np.asarray((high << 32) | low, dtype)

"""Arrays that go from the host to the device, explicitly, as `jax_transfer_guard` wants it.

JAX moves NumPy arrays and Python numbers to the device wherever they meet a device array. A process that forbids this
(`JAX_TRANSFER_GUARD=disallow`), to find transfers in its hot path, allows what is asked for by `jax.device_put`.
"""

from __future__ import annotations

from typing import Any

import jax


def to_device(tree: Any) -> Any:
    """A pytree of NumPy arrays as arrays on the device, with memory of their own, so that they can be donated."""
    return jax.device_put(tree, may_alias=False)

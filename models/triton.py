"""What the kernels for NVIDIA GPUs share (`models.experts_pallas`, `models.attention_pallas`).

They use the Triton backend of Pallas, which supports Ampere and Hopper; jax 0.11 and later call it deprecated.
"""

from __future__ import annotations

import re
from typing import Any

import jax

try:
    from jax.experimental.pallas import triton as backend
except ImportError:  # a jax without it: `obstacle` says so
    backend = None  # type: ignore[assignment]

PROGRAMS = 264  # that fill a GPU: two for each processor of an H100
CAPABILITY = (8, 0)  # lowest compute capability: Ampere, which multiplies bfloat16


def obstacle(device: Any) -> str | None:
    """Tell why the kernels cannot run on a device.

    Args:
        device: a `jax.Device`.

    Returns:
        The reason; None: they can run.
    """
    capability = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))
    if backend is None:
        return f"jax {jax.__version__} has no Triton backend for Pallas"
    if capability is None:
        return f"{device.device_kind} is not an NVIDIA GPU"
    if tuple(map(int, capability.groups())) < CAPABILITY:
        least = ".".join(map(str, CAPABILITY))
        return f"{device.device_kind} has compute capability {capability[0]}; it needs {least} or more"
    return None

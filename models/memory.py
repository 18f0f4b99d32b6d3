"""Check whether the parameters of a model fit on its devices, before any are read.

The memory of a forward pass is not predicted here; it depends on the batch.
"""

from __future__ import annotations

import math
import os

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from models.config import MoEConfig
from models.parameters import param_shapes, param_shardings
from models.placement import DATA, MODEL, MeshError, Placement
from varjax.errors import InputError


def parameter_bytes(config: MoEConfig, dtype: str, placement: Placement) -> int:
    """How much memory the parameters take on each device.

    Args:
        config: the architecture.
        dtype: of the parameters.
        placement: the devices that they are divided over.

    Returns:
        Bytes.
    """
    shapes = jax.tree.leaves(param_shapes(config, jnp.dtype(dtype)))
    shardings = jax.tree.leaves(param_shardings(config, placement), is_leaf=lambda leaf: leaf is None)
    own = (
        leaf.shape if where is None else where.shard_shape(leaf.shape)
        for leaf, where in zip(shapes, shardings, strict=True)
    )
    return sum(map(math.prod, own)) * jnp.dtype(dtype).itemsize


def device_bytes(device: jax.Device) -> float:
    """How much memory a device lets JAX use.

    Args:
        device: any device.

    Returns:
        Bytes; for a CPU, those of the machine; infinity for another device that does not tell.
    """
    if device.platform == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return (device.memory_stats() or {}).get("bytes_limit", math.inf)


def check_memory(config: MoEConfig, dtype: str, placement: Placement, limit: float) -> None:
    """Refuse a model whose parameters are larger than its devices.

    Args:
        config: the architecture.
        dtype: of the parameters.
        placement: the devices that they are divided over.
        limit: bytes of the smallest device.

    Raises:
        InputError: with the two sizes, and what would fit.
    """
    needed = parameter_bytes(config, dtype, placement)
    if needed <= limit:
        return
    fitting = []
    if dtype != "bfloat16" and (size := parameter_bytes(config, "bfloat16", placement)) <= limit:
        fitting.append(f"dtype bfloat16 ({_gb(size)})")
    for devices in (2, 4, 8):  # of one machine
        mesh = AbstractMesh((1, devices), (DATA, MODEL))
        try:
            size = parameter_bytes(config, dtype, Placement.of(config, mesh))
        except MeshError:
            break
        if size <= limit:
            fitting.append(f"{devices} devices with mesh {MODEL}={devices} ({_gb(size)} on each)")
            break
    advice = " or ".join(fitting) or "a device with more memory"
    raise InputError(
        f"the parameters take {_gb(needed)} on each device in {dtype}, but the smallest device has {_gb(limit)}; what "
        f"fits: {advice}"
    )


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"

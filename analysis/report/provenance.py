"""Where a result comes from, and JSON result files that are written whole or not at all."""

import dataclasses
import math
import platform
import shlex
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from varjax import checksums

_DISTRIBUTIONS = ("varjax", "jax", "jaxlib", "flax", "numpy", "transformers")


def provenance(*, seed: int | None = None, **extra: Any) -> dict[str, Any]:
    """What every result file says about its making: versions, device, time, command line and seed.

    `extra` adds what the caller knows, such as `model`, `dataset` or `config` with their hashes.
    """
    device = jax.devices()[0]
    return {
        "versions": {"python": platform.python_version()} | {name: version_of(name) for name in _DISTRIBUTIONS},
        "platform": platform.platform(),
        "backend": device.platform,  # cpu, gpu, tpu
        "device": device.device_kind,
        "device_count": jax.device_count(),
        "time_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "seed": seed,
        **extra,
    }


def write_json(path: str | Path, obj: Any) -> None:
    """Write `obj`, a mapping or a dataclass, as readable JSON with a checksum, whole or not at all.

    `varjax.checksums.read_json` reads it back and verifies it.

    Dataclasses become objects; NumPy and JAX arrays and scalars, lists and numbers; paths, strings. JSON
    knows no infinities and no NaN: they become null.

    Raises:
      TypeError: something else is in `obj`; names where.
    """
    checksums.write_json(path, _plain(obj))


def hash_json(obj: Any) -> str:
    """SHA-256 of `obj`'s JSON as `write_json` would convert it, in any order of keys."""
    return checksums.digest_of(_plain(obj))


def version_of(distribution: str) -> str | None:
    """The installed version of a distribution; None: it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _plain(obj: Any, where: str = "$") -> Any:
    """`obj` in dicts, lists, strings, finite numbers, booleans and None; `where` is its JSON path."""
    if obj is None or isinstance(obj, str | bool | int):
        return obj
    if isinstance(obj, float):
        return obj if math.isfinite(obj) else None
    if isinstance(obj, Path):
        return str(obj)
    if isinstance(obj, np.generic | np.ndarray | jax.Array):
        return _plain(np.asarray(obj).tolist(), where)
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        fields = ((field.name, getattr(obj, field.name)) for field in dataclasses.fields(obj))
        return {name: _plain(value, f"{where}.{name}") for name, value in fields}
    if isinstance(obj, Mapping):
        return {str(key): _plain(value, f"{where}.{key}") for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [_plain(value, f"{where}[{i}]") for i, value in enumerate(obj)]
    raise TypeError(f"{where}: {type(obj).__name__} has no JSON form; give numbers, strings, lists or dicts")

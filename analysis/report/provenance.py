"""The origin of a result, and JSON result files that are written whole or not at all."""

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
from varjax.config import VARConfig

NOT_FINITE = "not finite"  # the only field of an exact infinity or NaN
_DISTRIBUTIONS = ("varjax", "jax", "jaxlib", "flax", "numpy", "transformers")


def provenance(*, seed: int | None = None, **extra: Any) -> dict[str, Any]:
    """Describe how a result was made.

    Args:
        seed: of the random numbers; None: none were drawn.
        extra: what the caller knows, such as `model`, `dataset` or `config` with their hashes.

    Returns:
        Fields for a result file: versions, device, time, command line, seed and `extra`.
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
    """Write readable JSON with a checksum, whole or not at all. `varjax.checksums.read_json` reads it.

    Dataclasses become objects, arrays and scalars of NumPy and JAX become lists and numbers, paths become strings, and
    infinities and NaN, which JSON does not have, become null.

    Args:
        path: the file to write.
        obj: a mapping or a dataclass.

    Raises:
        TypeError: `obj` holds something else; the message names where.
    """
    checksums.write_json(path, plain(obj))


def hash_json(obj: Any) -> str:
    """Hash what `write_json` would write.

    Args:
        obj: a mapping or a dataclass.

    Returns:
        SHA-256, which does not depend on the order of keys.
    """
    return checksums.digest_of(plain(obj))


def version_of(distribution: str) -> str | None:
    """Look up the installed version of a package.

    Args:
        distribution: its name in the package index.

    Returns:
        The version; None: it is not installed.
    """
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def plain(obj: Any, exact: bool = False, where: str = "$") -> Any:
    """Convert a value to what JSON holds.

    Args:
        obj: a dataclass, named tuple, container, array, path, number, string, or None.
        exact: convert it so that `analysis.steps.restored` can read it back; otherwise infinities and NaN become None.
        where: the JSON path of the value, for error messages.

    Returns:
        Dicts, lists, strings, finite numbers, booleans and None.

    Raises:
        TypeError: a value has no JSON form; the message names where.
    """
    if obj is None or isinstance(obj, str | bool | int):
        return obj
    if isinstance(obj, float):
        return obj if math.isfinite(obj) else {NOT_FINITE: str(obj)} if exact else None
    if isinstance(obj, Path):
        return str(obj)
    if exact and isinstance(obj, VARConfig):
        return obj.to_json()
    if exact and isinstance(obj, np.ndarray):
        values = plain(obj.ravel().tolist(), exact, f"{where}.values")
        return {"dtype": obj.dtype.str, "shape": list(obj.shape), "values": values}
    if isinstance(obj, np.generic | np.ndarray | jax.Array):
        return plain(np.asarray(obj).tolist(), exact, where)
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        obj = {field.name: getattr(obj, field.name) for field in dataclasses.fields(obj) if field.init or not exact}
    if exact and hasattr(obj, "_asdict"):
        obj = obj._asdict()
    if isinstance(obj, Mapping):
        return {str(key): plain(value, exact, f"{where}.{key}") for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [plain(value, exact, f"{where}[{i}]") for i, value in enumerate(obj)]
    raise TypeError(f"{where}: {type(obj).__name__} has no JSON form; give numbers, strings, lists or dicts")

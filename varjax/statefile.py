"""A `VARState` on disk, so that a service or a long evaluation can continue in another process.

    save(path, state, now, about)
    state = load(path, like, now, about)

`path` is a folder with one file, `state.safetensors`, which is sealed (`varjax.checksums`). A save is whole or not at
all: until the new state is complete, the folder holds the one before. Ages are kept, not the stamps of the cache,
because the clock of another process has another origin; no time passes while nothing runs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from varjax import checksums
from varjax.cache import since
from varjax.errors import InputError, Library
from varjax.files import replacing
from varjax.step import VARState, timestamp

safetensors = Library("safetensors")

FORMAT = 2  # 1 was a folder of orbax's, with counters of 32 bits and without a checksum
FILE = "state.safetensors"
_since, _before = jax.jit(since), jax.jit(jnp.subtract)
_FIX = "restore the file, or begin with a new state"


def save(path: str | Path, state: VARState, now: float, about: Mapping[str, Any]) -> None:
    """Write a state into a folder, in place of the one before; returns when it is on disk.

    Args:
        path: the folder.
        state: it stays valid.
        now: seconds, on the clock that the state was committed by.
        about: text, numbers and None by name that `load` has to find again, such as the model's fingerprint.

    Raises:
        NotADirectoryError: `path` is a file.
    """
    if Path(path).is_file():
        raise NotADirectoryError(f"{path} is a file; a state is saved in a folder of its own, give another path")
    if state.cache is not None:
        state = replace(
            state, cache=replace(state.cache, stamp=_since(state.cache.stamp, jax.device_put(timestamp(now))))
        )
    arrays = {name: np.ascontiguousarray(array) for name, array in jax.device_get(_arrays(state)).items()}
    noted = {"format": FORMAT, "about": dict(about), "arrays": _described(arrays)}
    with replacing(Path(path) / FILE) as part:
        checksums.write_safetensors(part, arrays, {"varjax": json.dumps(noted)})


def load(path: str | Path, like: VARState, now: float, about: Mapping[str, Any]) -> VARState:
    """The state that `save` wrote, with as many sequences as it had.

    Args:
        path: the folder.
        like: a state of the same model and cache (`varjax.step.init`), with any number of sequences.
        now: seconds, on the clock of the steps to come.
        about: as given to `save`.

    Returns:
        The state.

    Raises:
        FileNotFoundError: no state was saved there.
        InputError: a damaged file, another format, another `about` or other arrays; everything that differs is named.
    """
    file = Path(path) / FILE
    if not file.is_file():
        if any(Path(path).glob("*/_CHECKPOINT_METADATA")):
            raise InputError(f"{path}: a state of format 1, expected {FORMAT}; begin with a new state")
        raise FileNotFoundError(f"{path}: no state was saved in this folder; save one there first or correct the path")
    checksums.verify(file, _FIX, required=True)
    try:
        with safetensors.safe_open(file, framework="numpy") as opened:
            noted = json.loads((opened.metadata() or {})["varjax"])
            values = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise InputError(f"{file}: not a saved VAR state ({error!r}); give the folder that one was saved in") from error
    expected = _described(_arrays(like))
    _check(path, noted, about, expected)
    state = jax.tree.unflatten(jax.tree.structure(like), jax.device_put([values[name] for name in expected]))
    if state.cache is None:
        return state
    return replace(state, cache=replace(state.cache, stamp=_before(jax.device_put(timestamp(now)), state.cache.stamp)))


def _arrays(state: VARState) -> dict[str, Array]:
    """Every array of the state by its name, in the order of the leaves."""
    leaves, _ = jax.tree.flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _described(arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {name: {"shape": list(array.shape), "dtype": str(array.dtype)} for name, array in arrays.items()}


def _check(path: str | Path, noted: Any, about: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raises InputError naming what differs; `recent` may hold any number of sequences."""
    if noted.get("format") != FORMAT:
        raise InputError(f"{path}: a state of format {noted.get('format')}, expected {FORMAT}; begin with a new state")
    saved = {name: _one(array, name) for name, array in noted["arrays"].items()} | noted["about"]
    wanted = {name: _one(array, name) for name, array in expected.items()} | dict(about)
    different = [
        f"{name} is {saved.get(name)} (here {wanted.get(name)})"
        for name in dict.fromkeys([*about, *wanted, *saved])
        if saved.get(name) != wanted.get(name)
    ]
    if different:
        raise InputError(
            f"{path}: the state of another model or config: {', '.join(different)}; "
            "use those that it was saved with, or begin with a new state"
        )


def _one(array: Mapping[str, Any], name: str) -> str:
    shape = ["any", *array["shape"][1:]] if name == "recent" else array["shape"]
    return f"{array['dtype']}[{', '.join(map(str, shape))}]"

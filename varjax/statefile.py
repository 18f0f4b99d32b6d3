"""A `VARState` on disk, so that a service or a long evaluation goes on in another process as if it had never stopped.

    save(path, state, now, about)
    state = load(path, like, now, about)

`path` is a folder that orbax writes. A save is whole or not at all: until the new state is complete, the folder holds
the one before. Ages are kept, not the stamps of the cache, because the clock of another process begins elsewhere; so
time stands still while nothing runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax import Array

from varjax.cache import since
from varjax.errors import InputError
from varjax.files import named_errors
from varjax.step import VARState

FORMAT = 1


def save(path: str | Path, state: VARState, now: np.int32, about: Mapping[str, Any]) -> None:
    """Write `state` into the folder `path`, in place of the one before; back when it is on disk.

    Args:
        state: not spent.
        now: int32 [], ms, on the clock that the state was committed by.
        about: text, numbers and None by name: what `load` has to find again, such as the model's fingerprint.

    Raises:
        NotADirectoryError: `path` is a file.
    """
    if Path(path).is_file():
        raise NotADirectoryError(f"{path} is a file; a state is saved in a folder of its own, give another path")
    if state.cache is not None:
        state = replace(state, cache=replace(state.cache, stamp=since(state.cache.stamp, now)))
    arrays = _arrays(state)
    noted = {"format": FORMAT, "about": dict(about), "arrays": _described(arrays)}
    values = {name: np.asarray(array) for name, array in arrays.items() if array.size}  # orbax takes no empty ones
    Path(path).mkdir(parents=True, exist_ok=True)
    with named_errors(path), _manager(path) as manager:
        items = ocp.args.Composite(arrays=ocp.args.StandardSave(values), noted=ocp.args.JsonSave(noted))
        manager.save((manager.latest_step() or 0) + 1, args=items)


def load(path: str | Path, like: VARState, now: np.int32, about: Mapping[str, Any]) -> VARState:
    """The state that `save` wrote, with as many sequences as it had.

    Args:
        like: a state of the same model and cache (`varjax.step.init`), with any number of sequences.
        now: int32 [], ms, on the clock of the steps to come.
        about: as given to `save`.

    Raises:
        FileNotFoundError: no state was saved there.
        InputError: another format, another `about` or other arrays; everything that differs is named.
    """
    with _manager(path) as manager:
        newest = manager.latest_step() if Path(path).is_dir() else None
        if newest is None:
            raise FileNotFoundError(f"{path}: no state was saved in this folder; save one there first or mend the path")
        try:
            noted = manager.restore(newest, args=ocp.args.Composite(noted=ocp.args.JsonRestore()))["noted"]
        except (KeyError, ValueError, FileNotFoundError) as error:
            raise InputError(
                f"{path}: not a saved VAR state ({error}); give the folder that one was saved in"
            ) from error
        expected = _described(_arrays(like))
        _check(path, noted, about, expected)
        blank = {name: np.empty(saved["shape"], saved["dtype"]) for name, saved in noted["arrays"].items()}
        target = ocp.args.StandardRestore({name: array for name, array in blank.items() if array.size})
        values = manager.restore(newest, args=ocp.args.Composite(arrays=target))["arrays"]
    leaves = [jnp.asarray(values.get(name, blank[name])) for name in expected]
    state = jax.tree.unflatten(jax.tree.structure(like), leaves)
    if state.cache is None:
        return state
    return replace(state, cache=replace(state.cache, stamp=now - state.cache.stamp))


def _manager(path: str | Path) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(max_to_keep=1, create=False, enable_async_checkpointing=False)
    return ocp.CheckpointManager(Path(path).resolve(), options=options)


def _arrays(state: VARState) -> dict[str, Array]:
    """Every array of the state by its name, in the order of the leaves."""
    leaves, _ = jax.tree.flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _described(arrays: Mapping[str, Array]) -> dict[str, Any]:
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

"""Checkpoints of a long run, so that a killed one ends as if it had never stopped.

A checkpoint is a pytree of host arrays and whole numbers with the number of batches that are in it, written by orbax:
one that was not finished is never read. A folder of checkpoints belongs to one run, told by what decides its result.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp

from varjax.errors import InputError
from varjax.files import named_errors, replacing

T = TypeVar("T")


class CheckpointMismatchError(InputError):
    """The checkpoints in a folder belong to another run: says what differs and what to do."""


def resumed(path: Path, run: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `note` noted beside this run; None if there is nothing.

    Args:
        run: what JSON can hold and what decides the result: model, data, settings.

    Raises:
        CheckpointMismatchError: another run's note lies there.
    """
    if not path.exists():
        return None
    noted = json.loads(path.read_text())
    there, here = (dict(_leaves(one)) for one in (noted["run"], json.loads(json.dumps(run))))
    different = [
        f"{name} = {there.get(name)} (here {here.get(name)})"
        for name in dict.fromkeys([*there, *here])
        if there.get(name) != here.get(name)
    ]
    if different:
        raise CheckpointMismatchError(
            f"{path.parent} holds the checkpoints of a run with {', '.join(different)}; give the same arguments to "
            "resume it, another --output to keep it, or delete that folder to begin anew"
        )
    return noted["beside"]


def note(path: Path, run: Mapping[str, Any], beside: Mapping[str, Any]) -> None:
    """Note which run the checkpoints beside `path` belong to, and what a resumed one has to know."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps({"run": run, "beside": beside}, indent=2) + "\n")


class Checkpoints:
    """The checkpoints of one pass; a context manager."""

    def __init__(self, folder: Path):
        """`folder` is made if it does not exist."""
        options = ocp.CheckpointManagerOptions(max_to_keep=1)
        self._manager = ocp.CheckpointManager(folder.resolve(), options=options)

    def newest(self, like: T) -> tuple[int, T] | None:
        """The number of batches in the newest checkpoint, and its value; None if there is none.

        Args:
            like: any value of the same structure; its arrays may have other shapes.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        saved = self._manager.restore(step, args=ocp.args.StandardRestore())
        leaves, structure = jax.tree.flatten(like)
        restored = [int(saved[str(i)]) if np.ndim(leaf) == 0 else saved[str(i)] for i, leaf in enumerate(leaves)]
        return step, jax.tree.unflatten(structure, restored)

    def save(self, batches: int, value: Any) -> None:
        """Replace the checkpoint by one with so many batches in it; back when it is on disk.

        Args:
            value: a pytree of arrays, none of them empty, and whole numbers.
        """
        leaves = {str(i): np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(value))}
        with named_errors(self._manager.directory):
            self._manager.save(batches, args=ocp.args.StandardSave(leaves))
            self._manager.wait_until_finished()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()


def _leaves(tree: Any, name: str = "") -> list[tuple[str, Any]]:
    """Every value that is no object, under its path."""
    if not isinstance(tree, dict):
        return [(name, tree)]
    return [leaf for key, value in tree.items() for leaf in _leaves(value, f"{name}.{key}".lstrip("."))]

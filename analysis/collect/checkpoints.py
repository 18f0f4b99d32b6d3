"""Checkpoints of a long run, so that a killed one ends as if it had never stopped.

A checkpoint is a pytree of host arrays and whole numbers with the number of batches that are in it, in a safetensors
file that is sealed (`varjax.checksums`): one that was not finished or was damaged is never used. A folder of
checkpoints belongs to one run, told by what decides its result.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from varjax import checksums
from varjax.errors import InputError
from varjax.files import replacing

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
    noted = checksums.read_json(path, f"delete {path.parent} to begin anew")
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
    checksums.write_json(path, {"run": run, "beside": beside})


class Checkpoints:
    """The checkpoints of one pass."""

    def __init__(self, folder: Path):
        """`folder` is made with the first checkpoint."""
        self._path = folder / "checkpoint.safetensors"

    def newest(self, like: T) -> tuple[int, T] | None:
        """The number of batches in the newest checkpoint, and its value; None if there is none.

        Args:
            like: any value of the same structure; its arrays may have other shapes.

        Raises:
            InputError: the checkpoint was damaged, or holds another structure.
        """
        if not self._path.is_file():
            return None
        fix = f"delete {self._path.parent} to begin anew"
        checksums.verify(self._path, fix, required=True)
        leaves, structure = jax.tree.flatten(like)
        try:
            with safe_open(self._path, framework="numpy") as file:
                batches = int((file.metadata() or {})["batches"])
                saved = [file.get_tensor(str(number)) for number in range(len(leaves))]
        except (SafetensorError, KeyError, ValueError) as error:
            raise InputError(f"{self._path}: not a checkpoint of this version ({error!r}); {fix}") from error
        restored = [int(one) if np.ndim(leaf) == 0 else one for leaf, one in zip(leaves, saved, strict=True)]
        return batches, jax.tree.unflatten(structure, restored)

    def save(self, batches: int, value: Any) -> None:
        """Replace the checkpoint by one with so many batches in it; back when it is on disk.

        Args:
            value: a pytree of arrays and whole numbers.
        """
        leaves = jax.device_get(jax.tree.leaves(value))
        arrays = {str(number): np.asarray(leaf, order="C") for number, leaf in enumerate(leaves)}
        with replacing(self._path) as temporary:
            checksums.write_safetensors(temporary, arrays, {"batches": str(batches)})


def _leaves(tree: Any, name: str = "") -> list[tuple[str, Any]]:
    """Every value that is no object, under its path."""
    if not isinstance(tree, dict):
        return [(name, tree)]
    return [leaf for key, value in tree.items() for leaf in _leaves(value, f"{name}.{key}".lstrip("."))]

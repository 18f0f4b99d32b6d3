"""Checkpoints of a long run, so that a killed run ends as if it had never stopped.

A checkpoint is a pytree of host arrays and integers with the number of batches in it, in a safetensors file that is
sealed (`varjax.checksums`): an unfinished or damaged one is never used. A folder of checkpoints belongs to one run,
which is identified by everything that decides its result.
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
    """The checkpoints in a folder belong to another run: the message says what differs and what to do."""


def resumed(path: Path, run: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read the note of a run that is to be resumed.

    Args:
        path: the file that `note` wrote.
        run: what decides the result: model, data, settings; JSON values.

    Returns:
        What a resumed run has to know; None: nothing was saved.

    Raises:
        CheckpointMismatchError: it is the note of another run.
    """
    if not path.exists():
        return None
    noted = checksums.read_json(path, f"delete {path.parent} to start over")
    there, here = (dict(_leaves(one)) for one in (noted["run"], json.loads(json.dumps(run))))
    different = [
        f"{name} = {there.get(name)} (here {here.get(name)})"
        for name in dict.fromkeys([*there, *here])
        if there.get(name) != here.get(name)
    ]
    if different:
        raise CheckpointMismatchError(
            f"{path.parent} holds the checkpoints of a run with {', '.join(different)}; give the same arguments to "
            "resume it, another --output to keep it, or delete that folder to start over"
        )
    return noted["beside"]


def note(path: Path, run: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Note which run a folder of checkpoints belongs to.

    Args:
        path: a file in that folder.
        run: see `resumed`.
        known: what a resumed run has to know.
    """
    checksums.write_json(path, {"run": run, "beside": known})


class Checkpoints:
    """The checkpoints of one pass; only the newest is kept."""

    def __init__(self, folder: Path):
        """Choose the folder.

        Args:
            folder: made with the first checkpoint.
        """
        self._path = folder / "checkpoint.safetensors"

    def newest(self, like: T) -> tuple[int, T] | None:
        """Read the newest checkpoint.

        Args:
            like: any value of the same structure; its arrays may have other shapes.

        Returns:
            The number of batches in it, and its value; None: there is none.

        Raises:
            InputError: the checkpoint was damaged, or has another structure.
        """
        if not self._path.is_file():
            return None
        fix = f"delete {self._path.parent} to start over"
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
        """Replace the checkpoint. Returns when the new one is on disk.

        Args:
            batches: number of batches in it.
            value: a pytree of arrays and integers.
        """
        leaves = jax.device_get(jax.tree.leaves(value))
        arrays = {str(number): np.asarray(leaf, order="C") for number, leaf in enumerate(leaves)}
        with replacing(self._path) as temporary:
            checksums.write_safetensors(temporary, arrays, {"batches": str(batches)})


def _leaves(tree: Any, name: str = "") -> list[tuple[str, Any]]:
    """Every value that is not an object, under its path."""
    if not isinstance(tree, dict):
        return [(name, tree)]
    return [leaf for key, value in tree.items() for leaf in _leaves(value, f"{name}.{key}".lstrip("."))]

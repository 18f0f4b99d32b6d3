"""Checkpoints of a long pass, so that a killed run ends as if it had never stopped.

A checkpoint is a pytree of host arrays and whole numbers with the number of batches that are in it, written by orbax:
one that was not finished is never read. The checkpoints of a folder belong to one run, told by what decides its result.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp

T = TypeVar("T")


class CheckpointMismatchError(ValueError):
    """The checkpoints in a folder belong to another run: says what differs and what to do."""


class Checkpoints:
    """The checkpoints of one pass in one folder; a context manager."""

    def __init__(self, folder: Path, run: Mapping[str, Any]):
        """
        Args:
            folder: made if it does not exist.
            run: what JSON can hold and what decides the result: model, data, settings.
        """
        self.folder = folder.resolve()
        self.run = json.loads(json.dumps(run))  # as it will come back: tuples are lists
        here = jax.process_index()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=1,
            create=False,
            # Every process keeps checkpoints of its own and waits for none.
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                primary_host=here, active_processes={here}, barrier_sync_key_prefix=f"process{here}"
            ),
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def newest(self, like: T) -> tuple[int, T] | None:
        """The number of batches in the newest checkpoint, and its value; None if there is none.

        Args:
            like: any value of the same structure; its arrays may have other shapes.

        Raises:
            CheckpointMismatchError: the folder belongs to another run.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        about = self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))["run"]
        different = sorted(name for name in {*about, *self.run} if about.get(name) != self.run.get(name))
        if different:
            there, here = ({name: run.get(name) for name in different} for run in (about, self.run))
            raise CheckpointMismatchError(
                f"{self.folder}: the checkpoints there belong to a run with {there}, this one has {here}; "
                "give the same arguments to resume, another --output, or delete the folder to begin anew"
            )
        saved = self._manager.restore(step, args=ocp.args.Composite(value=ocp.args.StandardRestore()))["value"]
        leaves, structure = jax.tree.flatten(like)
        restored = [int(saved[str(i)]) if np.ndim(leaf) == 0 else saved[str(i)] for i, leaf in enumerate(leaves)]
        return step, jax.tree.unflatten(structure, restored)

    def save(self, batches: int, value: Any) -> None:
        """Replace the checkpoint by one with so many batches in it; back when it is on disk.

        Args:
            value: a pytree of arrays, none of them empty, and whole numbers.
        """
        leaves = {str(i): np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(value))}
        parts = {"value": ocp.args.StandardSave(leaves), "run": ocp.args.JsonSave(self.run)}
        self._manager.save(batches, args=ocp.args.Composite(**parts))
        self._manager.wait_until_finished()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

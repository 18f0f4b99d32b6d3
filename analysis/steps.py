"""Steps of a long command. What each of them measured stays on disk until the command has written its report.

    with finished_steps(output, run) as steps:
        found = steps.do("search", Search, lambda: search(subject))
        write_report(lambda: report(found), output, extra={"search": found})

A command that ended early, in a later step or in its report, reads the finished steps back when it is run again.

Values are dataclasses, named tuples, containers and arrays, saved as JSON and read back by their declared types.
"""

from __future__ import annotations

import contextlib
import dataclasses
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from analysis.checkpoints import note, resumed
from analysis.report.output import Output
from analysis.report.provenance import NOT_FINITE, plain
from varjax import checksums
from varjax.config import VARConfig
from varjax.files import remove

Found = TypeVar("Found")

_STARTED = "run.json"  # in the folder of the steps


class Steps:
    """The steps of one run.

    Args:
        folder: for their files.
        run: everything that decides what the steps find, such as arguments, model and data.

    Raises:
        CheckpointMismatchError: the folder holds the steps of another run.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any]):
        self._folder, self._run = folder, plain(run, exact=True)
        self._noted = resumed(folder / _STARTED, self._run) is not None
        self.finished: list[str] = []  # names

    def do(self, name: str, kind: Any, work: Callable[[], Found]) -> Found:
        """Do a step, or read back what an earlier run of the same command found.

        Args:
            name: of the step, and of its file.
            kind: the declared type of what is found, such as a dataclass or `list[Point]`.
            work: does the step.

        Returns:
            What was found.

        Raises:
            InputError: the file of the step was damaged.
        """
        path = self._folder / f"{name}.json"
        if path.is_file():
            print(f"{name}: read back from {path}")
        else:
            found = work()
            if not self._noted:
                note(self._folder / _STARTED, self._run, {})
                self._noted = True
            checksums.write_json(path, {"found": plain(found, exact=True)})
        self.finished.append(name)
        saved = checksums.read_json(path, f"delete {self._folder} to start over", required=True)
        return restored(kind, saved["found"])  # always, so that it makes no difference whether a run was interrupted


@contextlib.contextmanager
def finished_steps(output: Output, run: Mapping[str, Any]) -> Iterator[Steps]:
    """Keep the steps of a command in a folder, which is removed when the command ends well.

    Args:
        output: where the command writes; steps are in its folder `STEM_steps`.
        run: as of `Steps`.

    Yields:
        The steps.

    Raises:
        CheckpointMismatchError: the folder holds the steps of another run.
    """
    folder = output.folder / f"{output.stem}_steps"
    steps = Steps(folder, run)
    try:
        yield steps
    except Exception as error:
        if steps.finished:
            finished = ", ".join(steps.finished)
            error.add_note(f"What is finished ({finished}) is kept in {folder}: the same command goes on from there.")
        raise
    if steps.finished:
        remove(folder)


def restored(kind: Any, saved: Any) -> Any:
    """Read a value that `analysis.report.provenance.plain` made plain with `exact`.

    Args:
        kind: its declared type.
        saved: the plain value.

    Returns:
        The value.
    """
    origin, given = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(saved, dict) and saved.keys() == {NOT_FINITE}:
        return float(saved[NOT_FINITE])
    if saved is None or origin is typing.Literal:
        return saved
    if kind is Any:
        if isinstance(saved, dict):
            return {name: restored(Any, value) for name, value in saved.items()}
        return [restored(Any, value) for value in saved] if isinstance(saved, list) else saved
    if origin in (typing.Union, types.UnionType):
        kinds = [one for one in given if one is not type(None)]
        if len(kinds) > 1:  # such as a number or several
            kinds = [one for one in kinds if (typing.get_origin(one) is not None) == isinstance(saved, list)]
        return restored(kinds[0], saved) if len(kinds) == 1 else saved
    if kind is VARConfig:
        return VARConfig.from_json(saved)
    if kind is np.ndarray:
        return np.array(restored(Any, saved["values"]), saved["dtype"]).reshape(saved["shape"])
    if isinstance(kind, type) and (dataclasses.is_dataclass(kind) or hasattr(kind, "_fields")):
        hints = typing.get_type_hints(kind)
        return kind(**{name: restored(hints[name], value) for name, value in saved.items()})
    if origin is tuple and given[-1] is not Ellipsis:
        return tuple(restored(one, value) for one, value in zip(given, saved, strict=True))
    if origin is not None and issubclass(origin, Mapping):
        return {name: restored(given[1], value) for name, value in saved.items()}
    if origin is not None:  # a sequence of one kind of values
        values = (restored(given[0], value) for value in saved)
        return list(values) if origin is list else tuple(values)
    return kind(saved)  # a number or a string

"""The files that a table is built from: routing statistics and, where the policy uses answers, the experts' answers.

`experiments/01_routing_analysis.py` writes both into one folder, the answers under the name `answers_next_to` gives.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from varjax import answersfile, checksums
from varjax.errors import InputError

ENTRY = "table"  # the entry of a saved config that names the files, see `VARConfig.save`
_SUFFIX, _FORMER_SUFFIX = ".answers.safetensors", ".residuals.safetensors"


@dataclass(frozen=True)
class TableFiles:
    """Paths of the files of a table. `find` checks them."""

    routing_stats: str  # Parquet, see `varjax.statsfile`
    answers: str | None = None  # safetensors, see `varjax.answersfile`; None: nothing stands in for experts left out

    @classmethod
    def find(cls, routing_stats: str | os.PathLike[str], answers: str | os.PathLike[str] | None = None) -> TableFiles:
        """The files, after a check that they exist and belong together. Only their headers are read.

        Args:
            routing_stats: path of the statistics.
            answers: path of the answers; None: the file next to the statistics, if there is one.

        Returns:
            The paths of both files.

        Raises:
            FileNotFoundError: one of the files does not exist.
            InputError: the first is not a Parquet file, or the answers belong to other statistics.
        """
        stats = Path(routing_stats)
        if not stats.is_file():
            raise FileNotFoundError(f"{stats}: no such file; collect routing statistics first, or correct the path")
        with stats.open("rb") as file:
            if file.read(4) != b"PAR1":
                raise InputError(f"{stats}: not a Parquet file; expected what the collection of statistics wrote")
        if answers is None:
            neighbor = answers_next_to(stats)
            answers = neighbor if neighbor.is_file() else None
        if answers is not None:
            answersfile.check_statistics(Path(answers), stats)
        return cls(str(stats), None if answers is None else os.fspath(answers))

    def digest(self) -> str:
        """A name for the contents of the files, in any folder; `VARConfig.digest` takes it.

        Returns:
            The SHA-256 of the SHA-256 of each file, as hexadecimal digits.

        Raises:
            OSError: a file cannot be read.
        """
        return checksums.digest_of([path and checksums.digest_of_file(path) for path in asdict(self).values()])


def answers_next_to(routing_stats: str | os.PathLike[str]) -> Path:
    """Where the answers that belong to a statistics file are kept.

    Args:
        routing_stats: path of the statistics.

    Returns:
        `<stem>.answers.safetensors` in the same folder, or a file that an earlier version wrote there as
        `<stem>.residuals.safetensors`, if only that exists.
    """
    stats = Path(routing_stats)
    path, former = (stats.with_name(stats.stem + suffix) for suffix in (_SUFFIX, _FORMER_SUFFIX))
    return former if former.is_file() and not path.is_file() else path


def saved_files(var_config: str | os.PathLike[str]) -> TableFiles | None:
    """The files that a saved config names, so that a command needs only `--var_config`.

    Args:
        var_config: a file that `VARConfig.save` wrote, or an earlier version, which kept the paths among the settings.

    Returns:
        The paths; a file that does not exist is looked for in the folder of the config, so that the folder may move. A
        name without a folder is looked for there first. None if the config names no statistics.

    Raises:
        InputError: the file is not JSON, was damaged, or names files by something other than text.
        OSError: it cannot be read.
    """
    fields = checksums.read_json(var_config, "restore it, or save the config again", required=False)
    try:
        named = named_files(fields)
    except InputError as error:
        raise InputError(f"{var_config}: {error}") from error
    if named is None:
        return None

    def located(path: str) -> str:
        folder = Path(var_config).parent
        places = [Path(path), folder / path, folder / Path(path).name]
        if Path(path).name == path:  # the working directory may hold another file of that name
            places.reverse()
        return next((str(place) for place in places if place.is_file()), path)

    return TableFiles(located(named.routing_stats), named.answers and located(named.answers))


def named_files(fields: Mapping[str, Any]) -> TableFiles | None:
    """The files that the fields of a saved config name.

    Args:
        fields: from JSON.

    Returns:
        The paths as they are written there; None if there are none.

    Raises:
        InputError: they are not text.
    """
    former = {"routing_stats": fields.get("routing_stats"), "answers": fields.get("residuals")}
    named = fields.get(ENTRY) or former
    if not isinstance(named, Mapping) or not all(isinstance(named.get(name), str | None) for name in former):
        raise InputError(f"{ENTRY}={named!r}: expected the paths routing_stats and answers; save the config again")
    stats: str | None = named.get("routing_stats")
    return None if stats is None else TableFiles(stats, named.get("answers"))

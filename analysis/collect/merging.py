"""Results of several runs of Phase 1 as one: parts of a corpus read at different times, or by several processes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from varjax import answers, answersfile, stats, statsfile
from varjax.errors import InputError
from varjax.tablefiles import answers_next_to

SAME = ("fingerprint", "top_k", "vocab_size", "layers")  # what the parts must agree in


def merge_files(paths: Sequence[Path], output: Path, about: dict[str, Any]) -> tuple[stats.RoutingStats, list[Path]]:
    """Write the statistics of all parts together, and their answers if every part has some.

    Counts are exact, moments up to float64 rounding. A key that only some parts admitted carries those parts'
    occurrences alone. Documents that two parts both hold count twice: nobody can tell from the files.

    Args:
        paths: statistics files, at least two.
        output: the statistics file to write; answers go beside it.
        about: added to the metadata.

    Returns:
        The statistics, and the parts that lack answers: unless there are none, none were written.

    Raises:
        InputError: the parts are of different models, their orders, layers or experts differ, or the answers of a
            part belong to other statistics.
    """
    if len(paths) < 2:
        raise InputError(f"merging needs at least two statistics files, got {[str(path) for path in paths]}")
    read = [statsfile.read(path) for path in paths]
    metas = [meta for _, meta in read]
    for path, meta in zip(paths, metas, strict=True):
        for name in SAME:
            if meta.get(name) != metas[0].get(name):
                raise InputError(
                    f"{path}: {name} is {meta.get(name)}, but {metas[0].get(name)} in {paths[0]}; "
                    "only statistics of the same layers of the same model merge"
                )
    without = [path for path in paths if not answers_next_to(path).is_file()]
    for path in [] if without else paths:
        answersfile.check_statistics(answers_next_to(path), path)
    rows = [] if without else [answersfile.read(answers_next_to(path))[0] for path in paths]
    try:
        together = reduce(stats.merge, (part for part, _ in read))
        answered = reduce(answers.merge, rows) if rows else None
    except InputError as error:
        raise InputError(f"{', '.join(map(str, paths))}: {error}") from error

    strings = reduce(dict.__or__, (statsfile.token_strings(path) for path in paths))
    meta = {name: metas[0][name] for name in ("model", *SAME) if name in metas[0]} | about
    meta["merged"] = [
        {"file": str(path), "provenance": part.get("provenance")} for path, part in zip(paths, metas, strict=True)
    ]
    answers_next_to(output).unlink(missing_ok=True)  # those of other statistics, if any
    filled = reduce(dict.__or__, (part["filled"] for part in metas))
    statsfile.write(output, together, meta | {"filled": filled}, strings)
    if answered is not None:
        answersfile.write(answers_next_to(output), answered, meta | {"statistics": statsfile.identity(output)})
    return together, without

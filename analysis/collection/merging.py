"""Results of several runs of Phase 1 as one: parts of a corpus read at different times, or by several processes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from varjax import answers, answersfile, stats, statsfile
from varjax.config import residuals_beside

SAME = ("fingerprint", "top_k", "vocab_size")  # what the parts' models must agree in


def merge_files(paths: Sequence[Path], output: Path, about: dict[str, Any]) -> stats.RoutingStats:
    """Write the statistics of all parts together, and their residual rows if every part has some.

    Counts are exact, moments up to float64 rounding. A key that only some parts admitted carries those parts'
    occurrences alone. Documents that two parts both hold count twice: nobody can tell from the files.

    Args:
        paths: statistics files, at least two.
        output: the statistics file to write; residual rows go beside it.
        about: added to the metadata.

    Raises:
        ValueError: the parts are of different models, or their orders, layers, experts or rules differ.
    """
    if len(paths) < 2:
        raise ValueError(f"merging needs at least two statistics files, got {[str(path) for path in paths]}")
    read = [statsfile.read(path) for path in paths]
    metas = [meta for _, meta in read]
    for path, meta in zip(paths, metas, strict=True):
        for name in SAME:
            if meta.get(name) != metas[0].get(name):
                raise ValueError(
                    f"{path}: {name} is {meta.get(name)}, but {metas[0].get(name)} in {paths[0]}; "
                    "only statistics of the same model merge"
                )
    try:
        together = reduce(stats.merge, (part for part, _ in read))
    except ValueError as error:
        raise ValueError(f"{', '.join(map(str, paths))}: {error}") from error
    strings = reduce(dict.__or__, (statsfile.token_strings(path) for path in paths))
    meta = {name: metas[0][name] for name in ("model", *SAME) if name in metas[0]} | about
    meta["filled"] = reduce(dict.__or__, (part["filled"] for part in metas))
    meta["merged"] = [
        {"file": str(path), "provenance": part.get("provenance")} for path, part in zip(paths, metas, strict=True)
    ]
    statsfile.write(output, together, meta, strings)

    rows = [residuals_beside(path) for path in paths]
    if all(path.is_file() for path in rows):
        parts = [answersfile.read(path)[0] for path in rows]
        answersfile.write(residuals_beside(output), reduce(answers.merge, parts), meta)
    return together

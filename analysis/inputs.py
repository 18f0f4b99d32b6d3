"""The statistics and the config that a command finds by itself where they are not named.

The commands of this project leave them in a few places below `results/`, which `STATISTICS` and `CONFIGS` list. A
command takes the first one that is there, and says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from varjax.errors import InputError
from varjax.tablefiles import TableFiles, saved_files

STATISTICS = tuple(Path("results") / place / "routing_stats.parquet" for place in ("", "phase1", "demo"))
CONFIGS = (
    Path("results/phase3/best_config.json"),
    Path("results/phase2/var.var_config.json"),
    Path("results/demo/policy.var_config.json"),
)


def listed(places: Sequence[Path]) -> str:
    """The places for a help text."""
    return ", ".join(map(str, places))


def find_statistics(named: Path | None = None) -> Path:
    """The statistics that are named, or those in the first of `STATISTICS` that is there.

    Raises:
        InputError: none are named, and none are there.
    """
    if named is not None:
        return named
    found = _first("statistics", STATISTICS)
    if found is None:
        raise InputError(
            f"no routing statistics are named, and none of {listed(STATISTICS)} exists; run "
            "experiments/01_routing_analysis.py first, or name a file"
        )
    return found


def find_config(named: Path | None = None) -> Path | None:
    """The config that is named, or the first of `CONFIGS` that is there; None: there is none."""
    return _first("config", CONFIGS) if named is None else named


def table_files(routing_stats: Path | None, answers: Path | None = None, var_config: Path | None = None) -> TableFiles:
    """The files that a table is built from: those that are named, else those that the config was saved with.

    Args:
        routing_stats: the statistics.
        answers: the answers; None: those that the config names, if they are there, else those next to the statistics.
        var_config: a saved VARConfig.

    Returns:
        Their paths.

    Raises:
        FileNotFoundError: a file does not exist.
        InputError: no statistics are named, or the answers belong to others.
    """
    saved = None if var_config is None else saved_files(var_config)
    if routing_stats is None and saved is None:
        raise InputError(f"{var_config}: it names no routing statistics; give --routing_stats")
    if answers is None and saved is not None and saved.answers is not None:
        answers = Path(saved.answers) if routing_stats is None or Path(saved.answers).is_file() else None
    return TableFiles.find(routing_stats or Path(saved.routing_stats), answers)  # type: ignore[union-attr]


def _first(what: str, places: Sequence[Path]) -> Path | None:
    found = next((place for place in places if place.is_file()), None)
    if found is not None:
        print(f"{what}: {found}, since none is named")
    return found

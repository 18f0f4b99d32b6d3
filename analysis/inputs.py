"""The statistics and the config that a command uses where none are named: the first in the places listed here."""

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
    """List places in a help text.

    Args:
        places: `STATISTICS` or `CONFIGS`.

    Returns:
        Their names.
    """
    return ", ".join(map(str, places))


def find_statistics(named: Path | None = None) -> Path:
    """Find the statistics.

    Args:
        named: those that the user named; None: the first of `STATISTICS` that exists, which is printed.

    Returns:
        Their path.

    Raises:
        InputError: none are named, and none exist.
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
    """Find the config.

    Args:
        named: the one that the user named; None: the first of `CONFIGS` that exists, which is printed.

    Returns:
        Its path; None: there is none.
    """
    return _first("config", CONFIGS) if named is None else named


def table_files(routing_stats: Path | None, answers: Path | None = None, var_config: Path | None = None) -> TableFiles:
    """Find the files that a table is built from: those that are named, else those that the config was saved with.

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
    if routing_stats is None:
        if saved is None:
            raise InputError(f"{var_config}: it names no routing statistics; give --routing_stats")
        routing_stats = _there(saved.routing_stats, var_config, "--routing_stats")
        if answers is None and saved.answers is not None:
            answers = _there(saved.answers, var_config, "--answers")
    elif answers is None and saved is not None and saved.answers is not None and Path(saved.answers).is_file():
        answers = Path(saved.answers)
    return TableFiles.find(routing_stats, answers)


def _there(path: str, var_config: Path | None, option: str) -> Path:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{var_config}: it names {path}, which is not there; restore it, or give {option}")
    return Path(path)


def _first(what: str, places: Sequence[Path]) -> Path | None:
    found = next((place for place in places if place.is_file()), None)
    if found is not None:
        print(f"{what}: {found}, since none is named")
    return found

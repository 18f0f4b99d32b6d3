"""The configurations that a search hands on: the best ones within the limit, or, where there is none, the least bad.

`best_config.json` is a VARConfig, as `02_evaluate_var.py --var_config` takes it. `best_configs.json` holds the best few
with what was found of them, the surest first, as a validation tests them. Where no point is feasible the two files are
called `least_bad_config.json` and `least_bad_configs.json`, so that nobody takes them for more than they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from analysis.report.provenance import write_json
from tuning.points import Point, best, least_bad
from varjax import checksums
from varjax.config import VARConfig
from varjax.errors import InputError
from varjax.tablefiles import ENTRY, TableFiles, named_files, saved_files

KEPT = 5
MEASURED = "on the tune documents, by the very measurements that chose these configurations: they flatter them"


def write(
    folder: Path, points: Sequence[Point], limit: float, provenance: Mapping[str, Any], files: TableFiles
) -> bool:
    """Write the files, and take away those of an earlier run that no longer hold; returns whether any is feasible."""
    feasible = best(points, limit, KEPT)
    chosen = {"best": feasible, "least_bad": [] if feasible else least_bad(points, KEPT)}
    for name, found in chosen.items():
        one, several = (folder / f"{name}_{ending}.json" for ending in ("config", "configs"))
        if not found:
            one.unlink(missing_ok=True)
            several.unlink(missing_ok=True)
            continue
        VARConfig.from_json(found[0].config).save(one, files)
        configs = [
            {
                "name": f"trial {point.number}",
                "upper": point.outcome.upper,
                "speedup": point.outcome.speedup,
                "config": json.loads(point.config),
            }
            for point in sorted(found, key=lambda point: point.outcome.upper)
        ]
        about = {"limit": limit, "measured": MEASURED, ENTRY: asdict(files)}
        write_json(several, about | {"configs": configs, "provenance": provenance})
    return bool(feasible)


def read(path: Path) -> tuple[dict[str, VARConfig], TableFiles | None]:
    """The configurations of `best_configs.json` by name, or the one of a VARConfig's file, and their table's files.

    Raises:
        InputError: neither of the two.
        FileNotFoundError: there is no such file.
    """
    try:
        saved = json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not JSON ({error}); give best_configs.json of a search, or a VARConfig") from None
    if not isinstance(saved, dict) or "configs" not in saved:
        return {path.stem: VARConfig.load(path)}, saved_files(path)
    saved = checksums.read_json(path, "search again, or give a VARConfig")
    try:
        configs = {one["name"]: VARConfig.from_json(json.dumps(one["config"])) for one in saved["configs"]}
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{path}: a configuration lacks {error}; give best_configs.json as a search wrote it"
        ) from None
    first = saved["configs"][0]["config"] if configs else {}  # where an earlier version named the files
    return configs, saved_files(path) or named_files(first)

"""The trials of a search, the best of them, and the files that hand those on.

A point is feasible if the upper confidence limit of its perplexity increase is within the limit on quality. That guards
against noise but not against selection: the best of many points looks better than it is. What the chosen ones are worth
is measured on other documents (`tuning.validation`).

`best_config.json` is a VARConfig, as `02_evaluate_var.py --var_config` takes it; `best_configs.json` holds the best
few, the most certain first, as a validation tests them. Where no point is feasible, the files are called
`least_bad_config.json` and `least_bad_configs.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from analysis.report.provenance import write_json
from analysis.resampling import Estimate
from tuning.space import Values
from varjax import checksums
from varjax.config import VARConfig
from varjax.errors import InputError
from varjax.tablefiles import ENTRY, TableFiles, named_files, saved_files

PREDICTED = "predicted"  # takes the place of a phase where the speed-up follows from active assignments
KEPT = 5  # configurations in `best_configs.json`
MEASURED = "on the tune documents, by the measurements that chose these configurations, so they are optimistic"


@dataclass(frozen=True)
class Outcome:
    """One configuration on the tune documents."""

    degradation: float  # relative increase in perplexity per token, over the documents that were scored
    upper: float  # upper confidence limit of the degradation
    documents: int  # number of documents scored
    hopeless: bool  # scoring stopped early because the loss had certainly passed the limit
    experts_per_token: float  # mean over tokens and layers
    learned_share: float  # share of tokens and layers that the learned router decided
    speedups: Mapping[str, Estimate]  # by phase ("prefill", "decode"), or under PREDICTED
    speedup: float  # the objective: geometric mean of the speed-ups

    def within(self, limit: float) -> bool:
        """Whether the outcome is feasible.

        Args:
            limit: the largest acceptable relative increase in perplexity.

        Returns:
            True if all documents were scored and the upper confidence limit does not exceed `limit`.
        """
        return not self.hopeless and self.upper <= limit

    @property
    def predicted(self) -> bool:
        """Whether the speed-up was predicted from active assignments instead of measured."""
        return PREDICTED in self.speedups


@dataclass(frozen=True)
class Point:
    """One finished trial."""

    number: int  # of the trial
    values: Values  # its place in the search space
    config: VARConfig
    outcome: Outcome


def best(points: Sequence[Point], limit: float, count: int) -> list[Point]:
    """The fastest feasible points.

    Args:
        points: finished trials.
        limit: the largest acceptable relative increase in perplexity.
        count: the most points to return.

    Returns:
        Feasible points, fastest first, each configuration once.
    """
    feasible = [point for point in points if point.outcome.within(limit)]
    return _distinct(sorted(feasible, key=lambda point: (-point.outcome.speedup, point.number)), count)


def least_bad(points: Sequence[Point], count: int) -> list[Point]:
    """The points with the lowest upper confidence limits.

    Args:
        points: finished trials.
        count: the most points to return.

    Returns:
        Points by rising upper limit, those given up last, each configuration once.
    """
    return _distinct(sorted(points, key=lambda point: (point.outcome.hopeless, point.outcome.upper)), count)


def write_chosen(
    folder: Path, points: Sequence[Point], limit: float, files: TableFiles, provenance: Mapping[str, Any]
) -> None:
    """Write the chosen configurations, and delete files of an earlier run that no longer hold.

    Args:
        folder: where the files go.
        points: finished trials.
        limit: the largest acceptable relative increase in perplexity.
        files: of the table that all points share.
        provenance: what `best_configs.json` states about its origin.
    """
    feasible = best(points, limit, KEPT)
    for name, found in (("best", feasible), ("least_bad", [] if feasible else least_bad(points, KEPT))):
        one, several = folder / f"{name}_config.json", folder / f"{name}_configs.json"
        if not found:
            one.unlink(missing_ok=True)
            several.unlink(missing_ok=True)
            continue
        found[0].config.save(one, files)
        configs = [
            {
                "name": f"trial {point.number}",
                "upper": point.outcome.upper,
                "speedup": point.outcome.speedup,
                "config": json.loads(point.config.to_json()),
            }
            for point in sorted(found, key=lambda point: point.outcome.upper)
        ]
        about = {"limit": limit, "measured": MEASURED, ENTRY: asdict(files)}
        write_json(several, about | {"configs": configs, "provenance": provenance})


def read_chosen(path: Path) -> tuple[dict[str, VARConfig], TableFiles | None]:
    """Read the configurations to validate.

    Args:
        path: `best_configs.json` of a search, or a VARConfig file.

    Returns:
        The configurations by name, in the order of testing (a single one has the name of its file), and the files of
        their table; None: the file names none.

    Raises:
        InputError: the file is neither of the two, or is damaged.
        FileNotFoundError: the file does not exist.
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


def _distinct(points: Sequence[Point], count: int) -> list[Point]:
    by_config: dict[str, Point] = {}
    for point in points:
        by_config.setdefault(point.config.to_json(), point)
    return list(by_config.values())[:count]

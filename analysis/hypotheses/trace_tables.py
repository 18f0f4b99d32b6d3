"""Measures of a routing trace as tables of a report, and how they stand to the band of their permutation null.

Letters: L layers, O rows of a measure (context orders).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from analysis.report.report import Column, Table
from analysis.resampling import Measure


def verdict_above_null(measure: Measure) -> str:
    """PASS only if every figure that can be tested lies above the family-wise band."""
    if measure.null_high is None:
        return "reported"
    testable = ~np.isnan(measure.value) & ~np.isnan(measure.null_high)
    above = measure.value > measure.null_high
    return "not testable" if not testable.any() else "PASS" if np.all(above[testable]) else "FAIL"


def layers_above_null(measure: Measure, row: int) -> str:
    """In how many layers a row of the measure lies above the family-wise band."""
    if measure.null_high is None:
        return "no permutations were made, so there is no band"
    testable = ~np.isnan(measure.value[row]) & ~np.isnan(measure.null_high[row])
    above = testable & (measure.value[row] > measure.null_high[row])
    missing = int(np.sum(~testable))
    layers = f"{above.sum()} of {len(testable)} layers" + (f" ({missing} not testable)" if missing else "")
    return f"above the band in {layers}"


def measure_tables(
    measure: Measure, rows: Sequence[str], judge: bool = False, beside: tuple[str, np.ndarray] | None = None
) -> tuple[Table, ...]:
    """A table per row of the measure, a line per layer: value and interval and, with a null, the band and p.

    Args:
        judge: add a verdict, PASS above the band.
        beside: name and values [O, L] of another figure, to compare the value with.
    """
    names = ["value", "low", "high"] + ["null", "null_low", "null_high", "p"] * (measure.null is not None)
    form = ".4f" if measure.unit == "nats" else ".3f"
    columns = [Column("layer"), *(Column(name.replace("_", " "), form) for name in names)]
    if beside is not None:
        columns.append(Column(beside[0], form))
    judge = judge and measure.null_high is not None
    if judge:
        columns.append(Column("verdict"))
    made = []
    for index, row in enumerate(rows):
        numbers = np.stack([getattr(measure, name)[index] for name in names], axis=-1)  # [L, names]
        shown = numbers if beside is None else np.column_stack([numbers, beside[1][index]])
        body = [(layer, *line) for layer, line in enumerate(shown.tolist())]
        if judge:
            value, band = numbers[:, 0], numbers[:, names.index("null_high")]
            testable = ~np.isnan(value) & ~np.isnan(band)
            verdicts = np.where(testable, np.where(value > band, "PASS", "FAIL"), "not testable").tolist()
            body = [(*line, verdict) for line, verdict in zip(body, verdicts, strict=True)]
        made.append(Table(f"{measure.name} [{measure.unit}], {row}", tuple(columns), tuple(body)))
    return tuple(made)


def coverage_table(title: str, coverages: Sequence[Measure], rows: Sequence[str]) -> Table:
    """A line per row of the coverages: ids decide them, so that they are the same in every layer."""
    parts = [np.concatenate([getattr(one, part)[:, 0] for one in coverages]) for part in ("value", "low", "high")]
    columns = (Column("keys"), *(Column(name, ".3f") for name in ("value", "low", "high")))
    lines = np.stack(parts, axis=-1)[: len(rows)].tolist()
    return Table(title, columns, tuple((row, *line) for row, line in zip(rows, lines, strict=True)))

"""What the questions about a trace share: figures against permutations, their verdicts, tables and panels.

Letters: N tokens, D documents, L layers, O rows of a measure (context orders).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from analysis.questions import by_layer
from analysis.questions.data import TraceSettings
from analysis.report.figures import subplots
from analysis.report.report import Column, Table
from analysis.resampling import Measure, measure, permutation, ratio, ratio_with_interval
from analysis.traces.trace import Trace
from varjax.errors import NotTestableError
from varjax.progress import progress_bar

NULL = "Null: routing is shuffled among the tokens of each document."


def check_ranked(trace: Trace) -> None:
    """Raise NotTestableError if a trace does not say which of its experts is the first choice."""
    if not (trace.ranked or trace.top_k == 1):
        raise NotTestableError(
            "the trace's experts are not ranked, so the first choice is not known; record the trace with probabilities "
            "or with the experts best first (ranked)"
        )


def known_keys(contexts: np.ndarray, counted: np.ndarray, min_count: int) -> np.ndarray:
    """Number the contexts with enough evidence.

    Args:
        contexts: int64 [N], as `Trace.contexts` gives them.
        counted: bool [N], the tokens whose occurrences are evidence.
        min_count: occurrences that a key needs among them.

    Returns:
        int64 [N]: the key of each token from 0 on, -1 where it has too little evidence.
    """
    often = np.bincount(contexts[counted & (contexts >= 0)], minlength=int(contexts.max(initial=0)) + 1) >= min_count
    number = np.where(often, np.cumsum(often) - 1, -1)
    return np.where(contexts >= 0, number[contexts], -1)


def against_permutations(
    sums: Callable[[np.ndarray | slice], Mapping[str, np.ndarray]],
    totals: Mapping[str, np.ndarray],
    document: np.ndarray,
    settings: TraceSettings,
    label: str,
    progress: bool,
    unit: str = "share",
    limits: tuple[float, float] = (0.0, 1.0),
) -> dict[str, Measure]:
    """Compute figures that are ratios of sums over documents, with intervals, nulls and bands.

    Args:
        sums: takes an order of the tokens, int64 [N] or `slice(None)`; returns sums by name, float64 [D, O, L].
        totals: the denominators by the same names, float64 [D, O, L].
        document: [N], the document of each token.
        settings: permutations, bootstrap draws and their seed.
        label: of the progress bar.
        progress: show it on standard error.
        unit: of the figures.
        limits: the smallest and the largest possible value.

    Returns:
        The figures by name.
    """
    rng = np.random.default_rng(settings.seed)
    observed = sums(slice(None))
    null: dict[str, list[np.ndarray]] = {name: [] for name in observed}
    for _ in progress_bar(range(settings.permutations), unit="permutation", desc=label, show=progress):
        for name, one in sums(permutation(document, rng)).items():
            null[name].append(one.sum(axis=0))
    made = {}
    for name, one in observed.items():
        total = totals[name]
        permuted = ratio(np.reshape(null[name], (-1, *one.shape[1:])), total.sum(axis=0))
        value = ratio_with_interval(one, total, settings.samples, settings.seed)
        made[name] = measure(name, unit, *value, permuted, limits)
    return made


def mean(values: np.ndarray) -> float:
    """Average the values that are not NaN; NaN if there are none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def verdicts(one: Measure) -> np.ndarray:
    """Compare every figure with the upper end of its band.

    Args:
        one: a measure with a null.

    Returns:
        str [O, L]: PASS above the band, FAIL otherwise, or "not testable".
    """
    assert one.null_high is not None
    testable = ~np.isnan(one.value) & ~np.isnan(one.null_high)
    return np.where(testable, np.where(one.value > one.null_high, "PASS", "FAIL"), "not testable")


def layers_above(one: Measure, row: int) -> str:
    """Count the layers in which a row of a measure is above its band.

    Args:
        one: the measure.
        row: which of its rows.

    Returns:
        The number in words.
    """
    if one.null_high is None:
        return "no permutations were made, so there is no band"
    found = verdicts(one)[row].tolist()
    missing = found.count("not testable")
    return f"above the band in {found.count('PASS')} of {len(found)} layers" + by_layer.not_testable(missing)


def tables(
    one: Measure, rows: Sequence[str], judge: bool = False, extra: tuple[str, np.ndarray] | None = None
) -> list[Table]:
    """Make one table per row of a measure, with a line per layer.

    Args:
        one: the measure.
        rows: names of its first rows.
        judge: add a verdict, PASS above the band.
        extra: name and values [O, L] of another figure, as a column to compare with.

    Returns:
        The tables: value and interval and, with a null, its mean, band and p.
    """
    names = ["value", "low", "high"] + ["null", "null_low", "null_high", "p"] * (one.null is not None)
    form = ".4f" if one.unit == "nats" else ".3f"
    made = []
    for at, row in enumerate(rows):
        columns = {name.replace("_", " "): (getattr(one, name)[at], form) for name in names}
        if extra is not None:
            columns[extra[0]] = (extra[1][at], form)
        judged = verdicts(one)[at].tolist() if judge and one.null_high is not None else ()
        made.append(by_layer.table(f"{one.name} [{one.unit}], {row}", columns, verdicts=judged))
    return made


def coverage_table(title: str, coverage: Measure, rows: Sequence[str]) -> Table:
    """Make a table of coverages, which token ids decide, so that they are the same in every layer.

    Args:
        title: of the table.
        coverage: the measure.
        rows: names of its first rows.

    Returns:
        The table.
    """
    columns = (Column("keys"), *(Column(name, ".3f") for name in ("value", "low", "high")))
    lines = zip(rows, *(one[:, 0].tolist() for one in (coverage.value, coverage.low, coverage.high)), strict=False)
    return Table(title, columns, tuple(lines))


def panels(rows: int, columns: int, sharey: str | bool = "row") -> tuple[Figure, np.ndarray]:
    """Make a figure with panels over the layers.

    Args:
        rows: of panels.
        columns: of panels.
        sharey: as in `matplotlib`.

    Returns:
        The figure and its axes [rows, columns].
    """
    size = (max(3.2 * columns, 5.5), 2.2 * rows + 1.3)
    figure, axes = subplots(rows, columns, figsize=size, sharex=True, sharey=sharey, squeeze=False)
    figure.supxlabel("layer")
    return figure, axes


def plot(axis: Any, one: Measure, row: int) -> None:
    """Draw one row of a measure over the layers: dots with intervals, and the null as a dashed line in its band.

    Args:
        axis: of a figure.
        one: the measure.
        row: which of its rows.
    """
    layers = np.arange(one.value.shape[1])
    if one.null is not None and one.null_low is not None and one.null_high is not None:
        axis.fill_between(layers, one.null_low[row], one.null_high[row], color="0.8", linewidth=0)
        axis.plot(layers, one.null[row], color="0.5", linestyle="--", linewidth=1)
    value = one.value[row]
    # A percentile interval may not contain its own estimate; a bar cannot have a negative length.
    bars = np.maximum([value - one.low[row], one.high[row] - value], 0)
    axis.errorbar(layers, value, bars, color="0", marker="o", markersize=3, linewidth=0.8)
    axis.xaxis.get_major_locator().set_params(integer=True)

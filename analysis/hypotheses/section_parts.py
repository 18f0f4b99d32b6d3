"""What the sections of the tests on statistics are put together from: verdicts, tables per layer, recurring words.

Letters: L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from analysis.hypotheses.statistics_findings import Drawn
from analysis.report.report import Column, Table

Name = Callable[[int], str]  # the row of a key -> its name for people

_NAMED = 5  # keys that are named where some were left out


def layer_verdicts(
    passed: np.ndarray, untestable: Sequence[str], no_verdict: str = "", fails_stand: bool = False
) -> list[str]:
    """The verdict of each layer.

    Args:
        passed: bool [L]
        untestable: [L], why nothing can be said of a layer, or "".
        no_verdict: why the criterion cannot be judged in any layer, or "".
        fails_stand: a FAIL is one in spite of `no_verdict`.
    """
    verdicts = []
    for holds, reason in zip(passed, untestable, strict=True):
        withheld = bool(no_verdict) and (holds or not fails_stand)
        verdicts.append("not testable" if reason or withheld else "PASS" if holds else "FAIL")
    return verdicts


def judged(verdicts: Sequence[str], criterion: str, no_verdict: str = "") -> tuple[str, str]:
    """Verdict and outcome over layers [L]: PASS only if every layer that can be tested passes.

    Args:
        no_verdict: as in `layer_verdicts`.
    """
    testable = np.array([one != "not testable" for one in verdicts], bool)
    outcome = f"{criterion}: {verdicts.count('PASS')} of {len(verdicts)} layers{not_testable(testable)}"
    if no_verdict:
        outcome += f"; {no_verdict}"
    if not testable.any():
        return "not testable", outcome
    return ("FAIL" if "FAIL" in verdicts else "PASS"), outcome


def layer_table(
    columns: Sequence[str | tuple[str, str]],
    rows: zip,
    verdicts: Sequence[str] = (),
    title: str = "Per layer",
) -> Table:
    """One row per layer: its number, the figures, then ids used and left out, and the verdict if there is one."""
    heading = [Column(one) if isinstance(one, str) else Column(*one) for one in columns]
    heading += [Column("ids", ","), Column("left out", ",")]
    if verdicts:
        heading.append(Column("verdict"))
    body = []
    for layer, row in enumerate(rows):
        cells = [value.item() if isinstance(value, np.generic) else value for value in row]
        if verdicts:
            cells.append(verdicts[layer])
        body.append((layer, *cells))
    return Table(title, tuple(heading), tuple(body))


def lengths(rows: Sequence[np.ndarray]) -> list[int]:
    return [len(one) for one in rows]


def reasons(untestable: Sequence[str]) -> list[str]:
    """Why layers cannot be tested: a line per reason."""
    different = dict.fromkeys(reason for reason in untestable if reason)
    said = []
    for reason in different:
        layers = [str(layer) for layer, one in enumerate(untestable) if one == reason]
        where = f"layer{'s' * (len(layers) > 1)} {', '.join(layers)}"
        if len(layers) == len(untestable) > 1:
            where = "every layer"
        said.append(f"Not testable, {where}: {reason}.")
    return said


def left_out_words(
    left_out: Sequence[np.ndarray], figure: str, name: Name, what: str = "left out of this test alone"
) -> list[str]:
    """How many rows have NaN, and the names of the first few."""
    number = sum(map(len, left_out))
    if not number:
        return []
    keys = list(dict.fromkeys(int(row) for rows in left_out for row in rows))
    layers = sum(len(rows) > 0 for rows in left_out)
    named = ", ".join(name(key) for key in keys[:_NAMED]) + (", …" if len(keys) > _NAMED else "")
    return [f"{number:,} rows without a known {figure} in {layers} of {len(left_out)} layers, {what}: {named}."]


def interval_words(drawn: Drawn | None, otherwise: str) -> str:
    """What the intervals of a section are.

    Args:
        otherwise: said where documents are not known.
    """
    if drawn is None:
        return f"{otherwise} (token ids as if independent: documents are not known)."
    if drawn.documents < 2:
        return "No intervals: they draw documents, and there is only one."
    return (
        f"95 % intervals from {drawn.samples} bootstrap draws of the {drawn.documents:,} documents: the percentiles, "
        "moved so that the draws' mean is the figure."
    )


def not_testable(testable: np.ndarray) -> str:
    """In how many layers, or nothing if in none."""
    missing = int(np.sum(~testable))
    return f" ({missing} not testable)" if missing else ""

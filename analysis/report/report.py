"""A report of tests in one form, for people and for files: sections with a verdict, plain words, tables and figures.

A verdict is one of `VERDICTS`. PASS and FAIL belong to a criterion; `reported` says that there is none; `not testable`
that the data cannot answer; `not measured` that the data were not given.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from matplotlib.figure import Figure

VERDICTS = ("PASS", "FAIL", "reported", "not testable", "not measured")
UNKNOWN = "–"
_WIDTH = 110  # characters of a line of words


@dataclass(frozen=True)
class Column:
    """One column of a table."""

    name: str
    format: str = ""  # of its numbers, as in `f"{value:.3f}"`


@dataclass(frozen=True)
class Table:
    """Rows of plain values; a number that is not known is None or NaN."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Any, ...], ...]

    def cells(self) -> Iterator[list[str]]:
        """Every row as text."""
        for row in self.rows:
            yield [shown(value, column.format) for value, column in zip(row, self.columns, strict=True)]


@dataclass(frozen=True)
class ReportFigure:
    """A figure of a report, saved next to it as `name.png` and `name.pdf`, and what a reader must know about it."""

    name: str
    title: str
    read: str  # how to read it
    misleads: str  # when it misleads
    draw: Callable[[], Figure] | None = field(default=None, compare=False)  # None: it was saved before


@dataclass(frozen=True)
class Section:
    """One question, its answer, and what the answer rests on."""

    name: str  # short, for files
    title: str
    verdict: str  # one of VERDICTS
    outcome: str  # one line: what was found, beside the criterion where there is one
    words: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    figures: tuple[ReportFigure, ...] = ()

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise ValueError(f"section {self.name}: verdict {self.verdict!r}, expected one of {', '.join(VERDICTS)}")


@dataclass(frozen=True)
class Report:
    """Facts about the data, what holds for all tests, and the sections."""

    title: str
    facts: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    sections: tuple[Section, ...]


def shown(value: Any, form: str = "") -> str:
    """A value for people: unknown numbers as a dash, truth as yes and no."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return UNKNOWN
    if isinstance(value, bool):
        return "yes" if value else "no"
    return format(value, form) if form and not isinstance(value, str) else str(value)


def text(report: Report) -> str:
    """The report for a terminal or a text file; words are folded, tables are as wide as they are."""
    width = max((len(name) for name, _ in report.facts), default=0)
    lines = [report.title, "=" * len(report.title), ""]
    lines += [f"{name:<{width}}  {value}" for name, value in report.facts]
    lines += ["", *summary(report), ""]
    for number, section in enumerate(report.sections, 1):
        heading = f"{number}. {section.title}"
        lines += ["", heading, "-" * len(heading), *_wrapped(f"{section.verdict}: {section.outcome}")]
        for word in section.words:
            lines += _wrapped(word)
        for table in section.tables:
            lines += ["", *_table(table)]
    if report.notes:
        lines += ["", "", "For all of the above", "--------------------"]
        for note in report.notes:
            lines += _wrapped(f"- {note}")
    return "\n".join(lines) + "\n"


def summary(report: Report) -> list[str]:
    """One line per section."""
    title = max((len(section.title) for section in report.sections), default=0)
    verdict = max(map(len, VERDICTS))
    return [f"{one.title:<{title}}  {one.verdict:<{verdict}}  {one.outcome}" for one in report.sections]


def fields(report: Report) -> dict[str, Any]:
    """The report for `analysis.report.provenance.write_json`; table rows become objects."""
    return {
        "title": report.title,
        "facts": dict(report.facts),
        "notes": report.notes,
        "sections": {
            section.name: {
                "title": section.title,
                "verdict": section.verdict,
                "outcome": section.outcome,
                "words": section.words,
                "tables": [
                    {
                        "title": table.title,
                        "rows": [
                            {column.name: value for column, value in zip(table.columns, row, strict=True)}
                            for row in table.rows
                        ],
                    }
                    for table in section.tables
                ],
                "figures": [note.name for note in section.figures],
            }
            for section in report.sections
        },
    }


def _wrapped(words: str) -> list[str]:
    return textwrap.wrap(words, _WIDTH, subsequent_indent="  ")


def _table(table: Table) -> list[str]:
    """Aligned lines: the first column to the left, the others to the right."""
    cells = [[column.name for column in table.columns], *table.cells()]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [table.title] if table.title else []
    for row in cells:
        first, *rest = (
            f"{cell:<{w}}" if not i else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  " + "  ".join([first, *rest]).rstrip())
    return lines

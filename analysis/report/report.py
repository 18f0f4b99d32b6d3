"""A report in one form, for people and for files: sections with a verdict, plain words, tables and figures.

A verdict is one of `VERDICTS`. PASS and FAIL belong to a criterion; `reported` means that there is none, `not testable`
that the data cannot answer the question, `not measured` that the data were not given.
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
    """Rows of plain values; an unknown number is None or NaN."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Any, ...], ...]

    def cells(self) -> Iterator[list[str]]:
        """Format every row as text.

        Returns:
            One list of cells per row.
        """
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
    """One question, its answer, and the evidence for it."""

    name: str  # short, for files
    title: str
    verdict: str  # one of VERDICTS
    outcome: str  # one line: what was found, next to the criterion where there is one
    words: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    figures: tuple[ReportFigure, ...] = ()
    headline: str = ""  # the most important number with its unit, such as "+0.42 %", for the page of all runs

    def __post_init__(self) -> None:
        assert self.verdict in VERDICTS, f"section {self.name}: {self.verdict!r} is not one of {', '.join(VERDICTS)}"


@dataclass(frozen=True)
class Report:
    """Facts about the data, what holds for all tests, and the sections."""

    title: str
    facts: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    sections: tuple[Section, ...]


def shown(value: Any, form: str = "") -> str:
    """Format a value for people.

    Args:
        value: of a table's cell; None and NaN become a dash, truth values yes and no.
        form: format of a number, as in `Column.format`.

    Returns:
        The text.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return UNKNOWN
    if isinstance(value, bool):
        return "yes" if value else "no"
    return format(value, form) if form and not isinstance(value, str) else str(value)


def text(report: Report) -> str:
    """Lay the report out for a terminal or a text file.

    Args:
        report: the report.

    Returns:
        Lines of at most 110 characters, except tables, which keep their width.
    """
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
    """Summarize the report.

    Args:
        report: the report.

    Returns:
        One line per section: its title, verdict and outcome.
    """
    title = max((len(section.title) for section in report.sections), default=0)
    verdict = max(map(len, VERDICTS))
    return [f"{one.title:<{title}}  {one.verdict:<{verdict}}  {one.outcome}" for one in report.sections]


def fields(report: Report) -> dict[str, Any]:
    """Convert the report for `analysis.report.provenance.write_json`.

    Args:
        report: the report.

    Returns:
        Fields by name; sections by their names, table rows as objects.
    """

    def section(one: Section) -> dict[str, Any]:
        tables = [
            {"title": table.title, "rows": [dict(zip(names, row, strict=True)) for row in table.rows]}
            for table in one.tables
            for names in [[column.name for column in table.columns]]
        ]
        plain = {name: getattr(one, name) for name in ("title", "verdict", "outcome", "headline", "words")}
        return {**plain, "tables": tables, "figures": [figure.name for figure in one.figures]}

    sections = {one.name: section(one) for one in report.sections}
    return {"title": report.title, "facts": dict(report.facts), "notes": report.notes, "sections": sections}


def _wrapped(words: str) -> list[str]:
    return textwrap.wrap(words, _WIDTH, subsequent_indent="  ")


def _table(table: Table) -> list[str]:
    """Aligned lines: the first column to the left, the others to the right."""
    cells = [[column.name for column in table.columns], *table.cells()]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [table.title] if table.title else []
    for row in cells:
        aligned = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  " + "  ".join([row[0].ljust(widths[0]), *aligned[1:]]).rstrip())
    return lines

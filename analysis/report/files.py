"""A report as the files that people and programs read: text, JSON, a page, and the figures next to them.

Results come first: they are on disk before a summary, a figure or a page is made from them, so that an error in any of
these costs nothing but the report. `analysis.steps` keeps what was measured, for the same command to make the report.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from analysis.report.figures import save
from analysis.report.html import INDEX, is_foreign, page, write_index
from analysis.report.output import Output
from analysis.report.provenance import write_json
from analysis.report.report import Report, ReportFigure, fields, text
from varjax.files import replacing


def write_report(
    report: Report | Callable[[], Report],
    output: Output,
    name: str | None = None,
    *,
    extra: Mapping[str, Any] | None = None,
) -> Report:
    """Write a report as text, JSON and a page, and its figures, each file whole or not at all.

    If the report is yet to be made, its JSON file is first written with the results alone. Figures are drawn and saved
    one by one, since all of them together take much memory. In a directory the page of all runs
    (`analysis.report.index_page`) is written too; next to a named file it is only brought up to date.

    Args:
        report: the report, or a function that makes it from results which are all in `extra`.
        output: where the program writes.
        name: stem of the files of a report that is not the program's main one; None: `output.stem`.
        extra: more fields of the JSON file: results and provenance.

    Returns:
        The report with its figures marked as saved, so that it can be written again with more sections.
    """
    output.folder.mkdir(parents=True, exist_ok=True)
    stem = output.stem if name is None else name
    if isinstance(report, Report):
        return _write(report, output, stem, dict(extra or {}))
    results = output.folder / f"{stem}.json"
    write_json(results, dict(extra or {}))
    with after_results(results):
        return _write(report(), output, stem, dict(extra or {}))


@contextlib.contextmanager
def after_results(path: Path) -> Iterator[None]:
    """Make a summary or a report of results that are on disk; an error in here says that they are.

    Args:
        path: the file with the results.

    Yields:
        Nothing.
    """
    try:
        yield
    except Exception as error:
        error.add_note(
            f"The results are complete, in {path}; only their report was not made. The same command makes it, once the "
            "cause is removed."
        )
        raise


def _write(report: Report, output: Output, stem: str, extra: dict[str, Any]) -> Report:
    folder, prefix = output.folder, output.prefix
    named = _with_figures(report, lambda one: dataclasses.replace(one, name=f"{prefix}{one.name}"))
    with replacing(folder / f"{stem}.txt") as temporary:
        temporary.write_text(text(report), encoding="utf-8")
    write_json(folder / f"{stem}.json", fields(named) | extra)
    for figure in (one for section in report.sections for one in section.figures):
        if figure.draw is not None:
            save(figure.draw(), folder, f"{prefix}{figure.name}")
    listed = (not output.named or (folder / INDEX).is_file()) and not is_foreign(folder)
    names = [one.name for section in named.sections for one in section.figures]
    images = {name: (folder / f"{name}.png").read_bytes() for name in names}
    with replacing(folder / f"{stem}.html") as temporary:
        temporary.write_text(page(named, images, INDEX if listed else None), encoding="utf-8")
    if listed:
        write_index(folder)
    return _with_figures(report, lambda one: dataclasses.replace(one, draw=None))


def _with_figures(report: Report, change: Callable[[ReportFigure], ReportFigure]) -> Report:
    """The same report with every figure changed."""
    sections = (dataclasses.replace(one, figures=tuple(map(change, one.figures))) for one in report.sections)
    return dataclasses.replace(report, sections=tuple(sections))

"""A report as the files that people and programs read: text, JSON, a page, and the figures beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from analysis.report.figures import save
from analysis.report.html import write_html
from analysis.report.index_page import INDEX, is_foreign, write_index
from analysis.report.output import Output
from analysis.report.provenance import write_json
from analysis.report.report import Report, Section, fields, text
from varjax.files import replacing


def write_report(
    report: Report,
    folder: Path,
    name: str,
    *,
    prefix: str = "",
    index: bool = True,
    figures: Mapping[str, Figure] | None = None,
    earlier: Collection[str] = (),
    beside: Mapping[str, Any] | None = None,
) -> None:
    """Write `folder/name.txt`, `.json` and `.html`, and the figures, each whole or not at all.

    Args:
        prefix: what the names of the figures begin with, so that reports in one folder keep theirs apart.
        index: write the folder's page of all reports (`analysis.report.index_page`); False: only bring one that is
            there up to date.
        figures: by the names that the sections give them.
        earlier: names of figures that this run has saved in the folder before; they are on the page too.
        beside: what else stands in the JSON file, such as provenance.
    """
    folder.mkdir(parents=True, exist_ok=True)
    report = _with_prefix(report, prefix)
    for figure_name, figure in (figures or {}).items():
        save(figure, folder, f"{prefix}{figure_name}")
    drawn = {f"{prefix}{figure_name}" for figure_name in (*(figures or {}), *earlier)}
    for note in (one for section in report.sections for one in section.figures):
        if note.draw is not None and note.name not in drawn:
            save(note.draw(), folder, note.name)  # one by one: all of them together take much memory
            drawn.add(note.name)
    with replacing(folder / f"{name}.txt") as temporary:
        temporary.write_text(text(report), encoding="utf-8")
    write_json(folder / f"{name}.json", fields(report) | dict(beside or {}))
    listed = (index or (folder / INDEX).is_file()) and not is_foreign(folder)
    write_html(folder / f"{name}.html", report, drawn, INDEX if listed else None)
    if listed:
        write_index(folder)


def write_output(report: Report, output: Output, **rest: Any) -> None:
    """`write_report` where `--output` says; `rest` are its other arguments."""
    write_report(report, output.folder, output.stem, prefix=output.prefix, index=not output.named, **rest)


def _with_prefix(report: Report, prefix: str) -> Report:
    """The same report, with other names of its figures."""

    def renamed(section: Section) -> Section:
        notes = (dataclasses.replace(note, name=f"{prefix}{note.name}") for note in section.figures)
        return dataclasses.replace(section, figures=tuple(notes))

    return dataclasses.replace(report, sections=tuple(map(renamed, report.sections)))

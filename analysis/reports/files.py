"""A report as the files that people and programs read: text, JSON, a page, and the figures beside them."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from analysis.reports.figures import save
from analysis.reports.html import write_html
from analysis.reports.index_page import index_of, write_index
from analysis.reports.provenance import write_json
from analysis.reports.report import Report, fields, text
from varjax.files import replacing


def write_report(
    report: Report,
    folder: Path,
    name: str,
    *,
    figures: Mapping[str, Figure] | None = None,
    earlier: Collection[str] = (),
    beside: Mapping[str, Any] | None = None,
) -> None:
    """Write `folder/name.txt`, `.json` and `.html`, and the figures, each whole or not at all.

    The page of all runs (`analysis.reports.index_page`) is written anew.

    Args:
        figures: by the names that the sections give them.
        earlier: names of figures that this run has saved in the folder before; they are on the page too.
        beside: what else stands in the JSON file, such as provenance.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for figure_name, figure in (figures or {}).items():
        save(figure, folder, figure_name)
    with replacing(folder / f"{name}.txt") as temporary:
        temporary.write_text(text(report), encoding="utf-8")
    write_json(folder / f"{name}.json", fields(report) | dict(beside or {}))
    index = index_of(folder)
    drawn = {*(figures or {}), *earlier}
    write_html(folder / f"{name}.html", report, drawn, os.path.relpath(index, folder.resolve()))
    write_index(index)

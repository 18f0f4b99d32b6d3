"""A report as one self-contained HTML page: pictures inside, a small stylesheet, no scripts.

The one link that leads away is that to the page of all runs.
"""

from __future__ import annotations

import base64
from collections.abc import Collection, Mapping
from html import escape
from pathlib import Path
from urllib.parse import quote

from analysis.report.report import Report, ReportFigure, Section, Table
from varjax.files import replacing

GENERATOR = '<meta name="generator" content="varjax">'
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; color: #111 }
h1, h2 { line-height: 1.2 } h2 { margin-top: 2.5rem; border-top: 1px solid #bbb; padding-top: 1rem }
.scroll { overflow-x: auto; max-height: 34rem; overflow-y: auto; margin: 1rem 0 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px }
caption { text-align: left; font-weight: 600; padding: .3rem 0 }
th, td { padding: .15rem .6rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th:first-child, td:first-child { text-align: left } thead th { position: sticky; top: 0; background: #fff }
table.words td { white-space: normal; text-align: left; vertical-align: top; overflow-wrap: anywhere }
table.words td:first-child { min-width: 7rem }
.verdict { font-weight: 700; border: 1px solid #111; padding: 0 .4rem; white-space: nowrap }
.PASS { background: #111; color: #fff }
figure { margin: 1.5rem 0 } img { max-width: min(100%, 46rem); height: auto }
figcaption { font-size: 14px; max-width: 60rem }
.runs { display: grid; grid-template-columns: repeat(auto-fill, minmax(26rem, 1fr)); gap: 1.5rem }
.runs article { border: 1px solid #bbb; padding: 1rem } .runs img { max-height: 16rem }
.runs h2 { margin: 0; border: 0; padding: 0 }
"""


def write_html(path: Path, report: Report, drawn: Collection[str], index: str | None = None) -> None:
    """Write the page, whole or not at all.

    Args:
        drawn: figures whose PNG lies beside the page and is to be in it; others that the report names are left out,
            though a file of that name may lie there from another run.
        index: where the page of all runs lies, seen from this one; None: there is none.
    """
    named = {note.name for section in report.sections for note in section.figures}
    images = {name: (path.parent / f"{name}.png").read_bytes() for name in named & set(drawn)}
    with replacing(path) as temporary:
        temporary.write_text(page(report, images, index), encoding="utf-8")


def page(report: Report, images: Mapping[str, bytes], index: str | None = None) -> str:
    """The page as text.

    Args:
        images: name of a figure -> its PNG.
        index: as in `write_html`.
    """
    back = f'<p><a href="{escape(quote(index))}">all runs</a></p>' if index else ""
    overview = "".join(
        f'<tr><td><a href="#{escape(one.name)}">{escape(one.title)}</a></td><td>{badge(one.verdict)}</td>'
        f"<td>{escape(one.outcome)}</td></tr>"
        for one in report.sections
    )
    facts = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in report.facts)
    notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    rest = f"<h2>For all of the above</h2>\n<ul>{notes}</ul>" if notes else ""
    sections = "\n".join(_section(section, images) for section in report.sections)
    return document(
        report.title,
        f"""{back}
<table class="words">{facts}</table>
<h2>Results</h2>
<table class="words">{overview}</table>
{sections}
{rest}""",
    )


def document(title: str, body: str) -> str:
    """A page of the common style, as text; `body` is HTML."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
{GENERATOR}
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{body}
</body>
</html>
"""


def badge(verdict: str) -> str:
    """A verdict in a frame."""
    return f'<span class="verdict {escape(verdict.split()[0])}">{escape(verdict)}</span>'


def _section(section: Section, images: Mapping[str, bytes]) -> str:
    words = "".join(f"<p>{escape(one)}</p>" for one in section.words)
    figures = "".join(_figure(note, images[note.name]) for note in section.figures if note.name in images)
    tables = "".join(map(_table, section.tables))
    return (
        f'<h2 id="{escape(section.name)}">{escape(section.title)}</h2>'
        f"<p>{badge(section.verdict)} {escape(section.outcome)}</p>{words}{figures}{tables}"
    )


def _figure(note: ReportFigure, png: bytes) -> str:
    data = base64.b64encode(png).decode("ascii")
    return (
        f'<figure><img alt="{escape(note.title)}" src="data:image/png;base64,{data}"><figcaption>'
        f"<b>{escape(note.title)}.</b> {escape(note.read)} <b>When it misleads:</b> {escape(note.misleads)}"
        "</figcaption></figure>"
    )


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(column.name)}</th>" for column in table.columns)
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.cells())
    caption = f"<caption>{escape(table.title)}</caption>" if table.title else ""
    return f'<div class="scroll"><table>{caption}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'

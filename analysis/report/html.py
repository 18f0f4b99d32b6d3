"""A report as one self-contained HTML page: pictures inside, a small stylesheet, no scripts.

The only link to another file leads to the page of all runs.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from urllib.parse import quote

from analysis.report.report import Report, ReportFigure, Section, Table

GENERATOR = '<meta name="generator" content="varjax">'
_SYMBOLS = {"PASS": "✓", "FAIL": "✗"}  # verdicts are readable without their colors
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
.verdict { font-weight: 700; font-size: 15px; border: 1px solid #777; padding: 0 .4rem; white-space: nowrap }
.PASS { background: #1a7f37; border-color: #1a7f37; color: #fff }
.FAIL { background: #b42318; border-color: #b42318; color: #fff }
figure { margin: 1.5rem 0 } img { max-width: min(100%, 46rem); height: auto }
figcaption { font-size: 14px; max-width: 60rem }
.runs { display: grid; grid-template-columns: repeat(auto-fill, minmax(26rem, 1fr)); gap: 1.5rem }
.runs article { border: 1px solid #bbb; padding: 1rem } .runs img { max-height: 16rem }
.runs h2 { margin: 0; border: 0; padding: 0 }
.headline { font-size: 1.2rem; margin: .6rem 0 } .headline b { font-size: 2.2rem; line-height: 1.1 }
"""


def page(report: Report, images: Mapping[str, bytes], index: str | None = None) -> str:
    """Make the page of a report.

    Args:
        report: the report.
        images: name of a figure -> its PNG. Figures without one are left out.
        index: relative path of the page of all runs; None: there is none.

    Returns:
        HTML.
    """
    back = f'<p><a href="{escape(quote(index))}">all runs</a></p>' if index else ""
    links = ((f'<a href="#{escape(one.name)}">{escape(one.title)}</a>', one) for one in report.sections)
    overview = rows((link, badge(one.verdict), escape(one.outcome)) for link, one in links)
    facts = rows(map(escape, fact) for fact in report.facts)
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
    """Make a page in the common style.

    Args:
        title: plain text.
        body: HTML.

    Returns:
        HTML.
    """
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
    """Frame a verdict: green or red for PASS and FAIL, with a symbol for readers who do not see the colors.

    Args:
        verdict: one of `analysis.report.report.VERDICTS`.

    Returns:
        HTML.
    """
    symbol = _SYMBOLS.get(verdict, "")
    return f'<span class="verdict {escape(verdict.split()[0])}">{symbol}{symbol and " "}{escape(verdict)}</span>'


def rows(cells: Iterable[Iterable[str]], tag: str = "td") -> str:
    """Make the rows of a table.

    Args:
        cells: HTML of each cell, row by row.
        tag: `td` or `th`.

    Returns:
        HTML.
    """
    return "".join("<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in row) + "</tr>" for row in cells)


def _section(section: Section, images: Mapping[str, bytes]) -> str:
    words = "".join(f"<p>{escape(one)}</p>" for one in section.words)
    figures = "".join(_figure(one, images[one.name]) for one in section.figures if one.name in images)
    tables = "".join(map(_table, section.tables))
    return (
        f'<h2 id="{escape(section.name)}">{escape(section.title)}</h2>'
        f"<p>{badge(section.verdict)} {escape(section.outcome)}</p>{words}{figures}{tables}"
    )


def _figure(figure: ReportFigure, png: bytes) -> str:
    data = base64.b64encode(png).decode("ascii")
    return (
        f'<figure><img alt="{escape(figure.title)}" src="data:image/png;base64,{data}"><figcaption>'
        f"<b>{escape(figure.title)}.</b> {escape(figure.read)} <b>When it misleads:</b> {escape(figure.misleads)}"
        "</figcaption></figure>"
    )


def _table(table: Table) -> str:
    names: Sequence[str] = [escape(column.name) for column in table.columns]
    body = rows(map(escape, row) for row in table.cells())
    caption = f"<caption>{escape(table.title)}</caption>" if table.title else ""
    head = f"<thead>{rows([names], 'th')}</thead>"
    return f'<div class="scroll"><table>{caption}{head}<tbody>{body}</tbody></table></div>'

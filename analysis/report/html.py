"""HTML pages: a report on a self-contained page, and the reports of many runs on one page, `index.html`.

The page of a report holds its pictures and a small stylesheet, no scripts; its only link to another file leads to the
page of all runs, which shows what each run found at a glance, the newest first.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from analysis.report.report import Report, ReportFigure, Section, Table
from varjax.files import replacing

INDEX = "index.html"
_GENERATOR = '<meta name="generator" content="varjax">'
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
    overview = _rows((link, _badge(one.verdict), escape(one.outcome)) for link, one in links)
    facts = _rows(map(escape, fact) for fact in report.facts)
    notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    rest = f"<h2>For all of the above</h2>\n<ul>{notes}</ul>" if notes else ""
    sections = "\n".join(_section(section, images) for section in report.sections)
    return _document(
        report.title,
        f"""{back}
<table class="words">{facts}</table>
<h2>Results</h2>
<table class="words">{overview}</table>
{sections}
{rest}""",
    )


def _document(title: str, body: str) -> str:
    """A page in the common style; `title` is plain text, `body` HTML."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
{_GENERATOR}
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{body}
</body>
</html>
"""


def _badge(verdict: str) -> str:
    """A framed verdict: green or red for PASS and FAIL, with a symbol for readers who do not see the colors."""
    symbol = _SYMBOLS.get(verdict, "")
    return f'<span class="verdict {escape(verdict.split()[0])}">{symbol}{symbol and " "}{escape(verdict)}</span>'


def _rows(cells: Iterable[Iterable[str]], tag: str = "td") -> str:
    """The rows of a table, from the HTML of each cell; `tag` is `td` or `th`."""
    return "".join("<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in row) + "</tr>" for row in cells)


def _section(section: Section, images: Mapping[str, bytes]) -> str:
    words = "".join(f"<p>{escape(one)}</p>" for one in section.words)
    figures = "".join(_figure(one, images[one.name]) for one in section.figures if one.name in images)
    tables = "".join(map(_table, section.tables))
    return (
        f'<h2 id="{escape(section.name)}">{escape(section.title)}</h2>'
        f"<p>{_badge(section.verdict)} {escape(section.outcome)}</p>{words}{figures}{tables}"
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
    body = _rows(map(escape, row) for row in table.cells())
    caption = f"<caption>{escape(table.title)}</caption>" if table.title else ""
    head = f"<thead>{_rows([names], 'th')}</thead>"
    return f'<div class="scroll"><table>{caption}{head}<tbody>{body}</tbody></table></div>'


# --- the page of all runs ---------------------------------------------------------------------------------------------


def is_foreign(folder: Path) -> bool:
    """Check whether somebody else has written the folder's `index.html`.

    Args:
        folder: a directory.

    Returns:
        True if it has one that varjax did not write.
    """
    index = folder / INDEX
    return index.is_file() and _GENERATOR not in index.read_text(encoding="utf-8", errors="replace")


def write_index(folder: Path) -> None:
    """Write the page of all reports in a folder and below it, whole or not at all.

    Somebody else's `index.html` is left alone. In the working directory, which may hold anything, only the directory
    itself is searched.

    Args:
        folder: a directory.
    """
    if is_foreign(folder):
        return
    index = folder.resolve() / INDEX
    reports = sorted(_reports(index), key=lambda one: (_time(one[1]), one[0]), reverse=True)
    together = Counter(path.parent for path, _ in reports)
    cards = "\n".join(_card(index.parent, path, found, together[path.parent] == 1) for path, found in reports)
    title = f"varjax: {len(reports)} run{'s' * (len(reports) != 1)} in {index.parent.name}"
    with replacing(index) as temporary:
        temporary.write_text(_document(title, f'<div class="runs">{cards}</div>'), encoding="utf-8")


def _reports(index: Path) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """Every page with the JSON file of a report next to it (`analysis.report.files`), and the content of that file."""
    here = index.parent == Path.cwd().resolve()
    for path in index.parent.glob("*.html" if here else "**/*.html"):
        data = path.with_suffix(".json")
        if path == index or not data.is_file():
            continue
        try:
            found = json.loads(data.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError):  # written by somebody else
            continue
        if isinstance(found, dict) and {"title", "facts", "sections"} <= found.keys():
            yield path, found


def _time(found: Mapping[str, Any]) -> str:
    return (found.get("provenance") or {}).get("time_utc", "")


def _card(root: Path, path: Path, found: Mapping[str, Any], alone: bool) -> str:
    """A run in short: its name, its headline, the facts, its first figure, and every section's verdict on demand.

    Args:
        root: folder of the page.
        path: the report's own page.
        found: the report's JSON.
        alone: the report has its folder to itself, so that the folder's name is the run's.
    """
    sections = list(found["sections"].values())
    place = path.relative_to(root)
    name = place.parent if alone and place.parent.parts else place.with_suffix("")
    pngs = (path.parent / f"{figure}.png" for one in sections for figure in one["figures"])
    figure = next((one for one in pngs if one.is_file()), None)
    link = _link(root, path)
    picture = f'<a href="{link}"><img alt="" src="{_link(root, figure)}"></a>' if figure else ""
    facts = _rows(map(escape, fact) for fact in found["facts"].items())
    verdicts = Counter(one["verdict"] for one in sections)
    tally = ", ".join(f"{number} {_badge(verdict)}" for verdict, number in verdicts.items())
    items = "".join(
        f"<li>{_badge(one['verdict'])} {escape(one['title'])}: {escape(one['outcome'])}</li>" for one in sections
    )
    return f"""<article>
<h2><a href="{link}">{escape(name.as_posix())}</a></h2>
<p>{escape(found["title"])} {escape(_time(found))}</p>
{_headline(sections)}
{picture}
<table class="words">{facts}</table>
<details><summary>{tally}</summary><ul>{items}</ul></details>
</article>"""


def _headline(sections: Sequence[Mapping[str, Any]]) -> str:
    """The first section's number that is worth a headline, large, with its verdict; else the first outcome."""
    for one in sections:
        if one.get("headline"):
            return (
                f'<p class="headline"><b>{escape(one["headline"])}</b> {_badge(one["verdict"])}<br>'
                f"{escape(one['title'])}</p>"
            )
    return "".join(
        f'<p class="headline">{_badge(one["verdict"])} {escape(one["title"])}: {escape(one["outcome"])}</p>'
        for one in sections[:1]
    )


def _link(root: Path, path: Path) -> str:
    return escape(quote(path.relative_to(root).as_posix()))

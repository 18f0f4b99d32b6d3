"""The reports of many runs on one page, `index.html`: what each found at a glance, the newest first."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from analysis.reports.html import GENERATOR, badge, document
from varjax.files import replacing

INDEX = "index.html"


def index_of(folder: Path) -> Path:
    """Where the page of all runs lies that a report in `folder` belongs to.

    Runs below the working directory share the page of the topmost folder there, such as `results/index.html`; a folder
    elsewhere, and the working directory itself, has a page of its own.
    """
    inside, here = folder.resolve(), Path.cwd().resolve()
    return (here / inside.relative_to(here).parts[0] if here in inside.parents else inside) / INDEX


def write_index(index: Path) -> None:
    """Write the page of all reports in its folder and below, whole or not at all.

    An `index.html` that is somebody else's is left as it is. In the working directory, which may hold anything, only
    the directory itself is looked through.
    """
    if index.is_file() and GENERATOR not in index.read_text(encoding="utf-8", errors="replace"):
        return
    reports = sorted(_reports(index), key=lambda one: (_time(one[1]), one[0]), reverse=True)
    cards = "\n".join(_card(index.parent, *one) for one in reports)
    title = f"varjax: {len(reports)} run{'s' * (len(reports) != 1)} in {index.parent.name}"
    with replacing(index) as temporary:
        temporary.write_text(document(title, f'<div class="runs">{cards}</div>'), encoding="utf-8")


def _reports(index: Path) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """Every page with the JSON file of a report beside it (`analysis.reports.files`), and what stands in that."""
    here = index.parent == Path.cwd().resolve()
    for path in index.parent.glob("*.html" if here else "**/*.html"):
        beside = path.with_suffix(".json")
        if path == index or not beside.is_file():
            continue
        try:
            said = json.loads(beside.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError):  # somebody else's
            continue
        if isinstance(said, dict) and {"title", "facts", "sections"} <= said.keys():
            yield path, said


def _time(said: Mapping[str, Any]) -> str:
    return (said.get("provenance") or {}).get("time_utc", "")


def _card(root: Path, path: Path, said: Mapping[str, Any]) -> str:
    """A run in short: what and when, the facts, its first figure, and every section's verdict to be opened."""
    sections = said["sections"].values()
    drawn = (path.parent / f"{name}.png" for one in sections for name in one["figures"])
    figure = next((one for one in drawn if one.is_file()), None)
    link = _link(root, path)
    picture = f'<a href="{link}"><img alt="" src="{_link(root, figure)}"></a>' if figure else ""
    facts = "".join(f"<tr><td>{escape(key)}</td><td>{escape(value)}</td></tr>" for key, value in said["facts"].items())
    found = "".join(
        f"<li>{badge(one['verdict'])} {escape(one['title'])}: {escape(one['outcome'])}</li>" for one in sections
    )
    return f"""<article>
<h2><a href="{link}">{escape(said["title"])}</a></h2>
<p>{escape(_time(said))} {escape(path.relative_to(root).as_posix())}</p>
{picture}
<table class="words">{facts}</table>
<details><summary>{_tally(said)}</summary><ul>{found}</ul></details>
</article>"""


def _link(root: Path, path: Path) -> str:
    return escape(quote(path.relative_to(root).as_posix()))


def _tally(said: Mapping[str, Any]) -> str:
    """How many sections came to which verdict."""
    verdicts = [one["verdict"] for one in said["sections"].values()]
    return ", ".join(f"{verdicts.count(one)} {escape(one)}" for one in dict.fromkeys(verdicts))

"""The reports of many runs on one page, `index.html`: what each run found at a glance, the newest first.

    python -m analysis.report.index_page results     # writes results/index.html

A run that writes a directory updates the page of that directory, and no page above it.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from analysis.command import HelpFormatter, path_argument, program
from analysis.report.html import GENERATOR, badge, document, rows
from varjax.errors import InputError
from varjax.files import replacing

INDEX = "index.html"


@program
def main(arguments: Sequence[str] | None) -> None:
    """Write the page of all reports in a folder.

    Args:
        arguments: of the command line.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("folder", type=path_argument, help="directory whose reports, also those below it, are listed")
    folder = parser.parse_args(arguments).folder
    if not folder.is_dir():
        raise InputError(f"{folder} is not a directory; give one that holds reports")
    if is_foreign(folder):
        raise InputError(f"{folder / INDEX} was not written by varjax; move it away first")
    write_index(folder)
    print(f"written to {folder / INDEX}")


def is_foreign(folder: Path) -> bool:
    """Check whether somebody else has written the folder's `index.html`.

    Args:
        folder: a directory.

    Returns:
        True if it has one that varjax did not write.
    """
    index = folder / INDEX
    return index.is_file() and GENERATOR not in index.read_text(encoding="utf-8", errors="replace")


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
        temporary.write_text(document(title, f'<div class="runs">{cards}</div>'), encoding="utf-8")


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
    facts = rows(map(escape, fact) for fact in found["facts"].items())
    verdicts = Counter(one["verdict"] for one in sections)
    tally = ", ".join(f"{number} {escape(verdict)}" for verdict, number in verdicts.items())
    items = "".join(
        f"<li>{badge(one['verdict'])} {escape(one['title'])}: {escape(one['outcome'])}</li>" for one in sections
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
                f'<p class="headline"><b>{escape(one["headline"])}</b> {badge(one["verdict"])}<br>'
                f"{escape(one['title'])}</p>"
            )
    return "".join(
        f'<p class="headline">{badge(one["verdict"])} {escape(one["title"])}: {escape(one["outcome"])}</p>'
        for one in sections[:1]
    )


def _link(root: Path, path: Path) -> str:
    return escape(quote(path.relative_to(root).as_posix()))


if __name__ == "__main__":
    main()

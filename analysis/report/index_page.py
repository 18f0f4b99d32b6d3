"""The reports of many runs on one page, `index.html`: what each found at a glance, the newest first.

    python -m analysis.report.index_page results     # writes results/index.html

A run that writes a directory writes this page of it by itself, and of nothing above it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from analysis.command import HelpFormatter, path_argument, program
from analysis.report.html import GENERATOR, badge, document
from varjax.errors import InputError
from varjax.files import replacing

INDEX = "index.html"


@program
def main(arguments: Sequence[str] | None) -> None:
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
    """Whether the folder has an `index.html` that somebody else has written."""
    index = folder / INDEX
    return index.is_file() and GENERATOR not in index.read_text(encoding="utf-8", errors="replace")


def write_index(folder: Path) -> None:
    """Write the page of all reports in a folder and below it, whole or not at all.

    An `index.html` that is somebody else's is left as it is. In the working directory, which may hold anything, only
    the directory itself is looked through.
    """
    if is_foreign(folder):
        return
    index = folder.resolve() / INDEX
    reports = sorted(_reports(index), key=lambda one: (_time(one[1]), one[0]), reverse=True)
    cards = "\n".join(_card(index.parent, *one) for one in reports)
    title = f"varjax: {len(reports)} run{'s' * (len(reports) != 1)} in {index.parent.name}"
    with replacing(index) as temporary:
        temporary.write_text(document(title, f'<div class="runs">{cards}</div>'), encoding="utf-8")


def _reports(index: Path) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """Every page with the JSON file of a report beside it (`analysis.report.files`), and what stands in that."""
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


if __name__ == "__main__":
    main()

"""A study of one policy on held-out documents: a list of questions, each one a function that answers it.

    report = study(subject, output)

Writes study.txt, study.json, study.html and the figures into the folder. To add a question, write a `Part` and put it
into `PARTS`: it gets the subject and gives a section, its figures, and whatever result belongs into the JSON file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from analysis import alternatives, alternatives_section, table_size, table_size_section
from analysis.figures import save
from analysis.html_report import write_html
from analysis.provenance import write_json
from analysis.report import Report, Section, fields, text
from analysis.scored_points import Subject
from varjax.files import replacing


@dataclasses.dataclass(frozen=True)
class Finding:
    """The answer to one question."""

    section: Section
    figures: Mapping[str, Figure]  # by the names that the section gives them
    result: Any  # for `analysis.provenance.write_json`


Part = Callable[[Subject], Finding]


def against_alternatives(subject: Subject) -> Finding:
    """Does VAR beat the simple alternatives at equal loss?"""
    found = alternatives.evaluate(subject)
    drawn = {alternatives_section.NAME: alternatives_section.figure(found)}
    return Finding(alternatives_section.section(found), drawn, found)


def size_of_the_table(subject: Subject) -> Finding:
    """How much of the saving does a smaller table keep?"""
    found = table_size.table_sizes(subject)
    drawn = {table_size_section.NAME: table_size_section.figure(found)}
    return Finding(table_size_section.section(found), drawn, found)


PARTS: tuple[Part, ...] = (against_alternatives, size_of_the_table)


def study(
    subject: Subject,
    folder: Path,
    *,
    facts: Sequence[tuple[str, str]] = (),
    provenance: Mapping[str, Any] | None = None,
    parts: Sequence[Part] = PARTS,
) -> Report:
    """Answer every question and write the files.

    Args:
        facts: about model, data and policy, for people.
        provenance: the same for the JSON file.
        parts: the questions, in the order of the report.
    """
    results, sections = {}, []
    for part in parts:
        found = part(subject)
        results[found.section.name] = found.result
        sections.append(found.section)
        for name, figure in found.figures.items():
            save(figure, folder, name)
    report = Report("Study of an adaptive routing policy", tuple(facts), _NOTES, tuple(sections))
    with replacing(folder / "study.txt") as temporary:
        temporary.write_text(text(report), encoding="utf-8")
    write_html(folder / "study.html", report, folder)
    write_json(folder / "study.json", fields(report) | {"results": results, "provenance": provenance})
    return report


_NOTES = (
    "Perplexity is per token, of text that is given (teacher-forced); intervals are 95 %, each for itself, over whole "
    "documents.",
    "Experts per token are counted where they ran, as a mean over tokens and layers.",
    "FAIL is a finding about this policy, this model and this text, not a fault of the run; nothing here says how far "
    "it carries.",
)

"""A study of one policy on held-out documents: a list of questions, each one a function that answers it.

    report = study(subject, output)

Writes study.txt, study.json, study.html and the figures into the folder. To add a question, write a `Part` and put it
into `PARTS`: it gets the subject and gives sections, their figures, and whatever result belongs into the JSON file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from analysis.policies.scored_points import Subject
from analysis.report.files import write_report
from analysis.report.report import Report, Section
from analysis.studies import (
    alternatives,
    alternatives_section,
    error_figures,
    error_sections,
    error_sources,
    generation_drift,
    table_size,
    table_size_section,
)
from varjax.errors import NotTestableError
from varjax.model import VARModel, build_for


@dataclasses.dataclass(frozen=True)
class Finding:
    """The answer to one question."""

    name: str  # of the result in the JSON file
    sections: tuple[Section, ...]
    figures: Mapping[str, Figure]  # by the names that the sections give them
    result: Any  # for `analysis.report.provenance.write_json`


Part = Callable[[Subject], Finding]


def against_alternatives(subject: Subject) -> Finding:
    """Does VAR beat the simple alternatives at equal loss?"""
    found = alternatives.evaluate(subject)
    drawn = {alternatives_section.NAME: alternatives_section.figure(found)}
    return Finding("alternatives", (alternatives_section.section(found),), drawn, found)


def size_of_the_table(subject: Subject) -> Finding:
    """How much of the saving does a smaller table keep?"""
    found = table_size.table_sizes(subject)
    drawn = {table_size_section.NAME: table_size_section.figure(found)}
    return Finding("table_size", (table_size_section.section(found),), drawn, found)


def sources_of_error(subject: Subject) -> Finding:
    """What is the error made of: choice, weights or answers; which layers; which tokens?"""
    reading: dict[str, Any] = {
        "batch_size": subject.batch_size,
        "max_length": subject.max_length,
        "stride": subject.stride,
        "caching": subject.caching,
    }
    given = (subject.model, subject.stats, subject.answers, subject.config, subject.documents)
    found = error_sources.examine(error_sources.prepare(*given, seed=subject.seed, **reading))
    return Finding("error_sources", error_sections.sections(found), dict(error_figures.draw(found)), found)


def free_generation(subject: Subject) -> Finding:
    """Does the text stay the same when the model writes it?"""
    table = build_for(subject.model, subject.config, subject.stats, subject.answers)
    var_model = VARModel(subject.model, subject.config, table=table)
    found = generation_drift.drift(var_model, subject.documents, seed=subject.seed, caching=subject.caching)
    return Finding("generation", error_sections.sections(None, found), dict(error_figures.draw(None, found)), found)


PARTS: tuple[Part, ...] = (against_alternatives, size_of_the_table, sources_of_error, free_generation)


def study(
    subject: Subject,
    folder: Path,
    *,
    facts: Sequence[tuple[str, str]] = (),
    provenance: Mapping[str, Any] | None = None,
    parts: Sequence[Part] | None = None,
) -> Report:
    """Answer every question and write the files, anew after each one, so that a study cut short leaves its answers.

    A part that raises NotTestableError could not answer its question; the message stands in its section.

    Args:
        facts: about model, data and policy, for people.
        provenance: the same for the JSON file.
        parts: the questions, in the order of the report; None: `PARTS`.
    """
    results: dict[str, Any] = {}
    drawn: list[str] = []
    report = Report("Study of an adaptive routing policy", tuple(facts), _NOTES, ())
    for part in PARTS if parts is None else parts:
        found = _answer(part, subject)
        results[found.name] = found.result
        report = dataclasses.replace(report, sections=(*report.sections, *found.sections))
        beside = {"results": results, "provenance": provenance}
        write_report(report, folder, "study", figures=found.figures, earlier=drawn, beside=beside)
        drawn += found.figures
    return report


def _answer(part: Part, subject: Subject) -> Finding:
    """What the part found, or why it found nothing."""
    try:
        return part(subject)
    except NotTestableError as error:
        asked = part.func if isinstance(part, partial) else part
        name = asked.__name__
        question = (asked.__doc__ or name.replace("_", " ")).split("\n")[0]
        return Finding(name, (Section(name, question, "not measured", str(error)),), {}, None)


_NOTES = (
    "Perplexity is per token, of text that is given (teacher-forced); intervals are 95 %, each for itself, over whole "
    "documents.",
    "Experts per token are counted where they ran, as a mean over tokens and layers.",
    "FAIL is a finding about this policy, this model and this text, not a fault of the run; nothing here says how far "
    "it carries.",
)

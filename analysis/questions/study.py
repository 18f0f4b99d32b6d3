"""A study of one policy on held-out documents: a list of questions, each of which adds its sections to the report.

Writes study.txt, study.json, study.html and the figures. To add a question, see `analysis.questions.question`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from analysis.evaluate.points import Subject
from analysis.questions.question import Question
from analysis.report.files import write_report
from analysis.report.output import Output
from analysis.report.report import Report
from analysis.steps import Steps

_NOTES = (
    "Perplexity is per token, of text that is given (teacher-forced); intervals are 95%, each for itself, over whole "
    "documents. Experts per token are counted where they ran, as a mean over tokens and layers.",
    "FAIL is a finding about this policy, this model and this text, not a fault of the run; nothing here says whether "
    "it transfers to others.",
)


def study(
    subject: Subject,
    questions: Sequence[Question[Subject]],
    output: Output,
    steps: Steps | None = None,
    *,
    facts: Sequence[tuple[str, str]] = (),
    provenance: Mapping[str, Any] | None = None,
) -> Report:
    """Answer every question and write the files after each one, so that an interrupted study leaves its answers.

    Args:
        subject: the policy and the documents.
        questions: in the order of the report, such as `analysis.questions.registry.STUDY_QUESTIONS`.
        output: the directory to write.
        steps: of the command, which keep what the questions found; None: nothing is kept.
        facts: about model, data and policy, for people.
        provenance: of the results, for the JSON file.

    Returns:
        The report. A question that could not be answered has a section that says why.
    """
    results: dict[str, Any] = {}
    report = Report("Study of an adaptive routing policy", tuple(facts), _NOTES, ())
    for question in questions:
        found = question.answer(subject, steps)
        results[question.name] = found.result
        report = dataclasses.replace(report, sections=(*report.sections, *found.sections))
        report = write_report(report, output, "study", extra={"results": results, "provenance": provenance})
    return report

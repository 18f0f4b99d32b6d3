"""The form of a question: a name, a title, and a function that answers it with a section of a report.

    def _examine(data: RoutingData) -> Section:
        return QUESTION.section("reported", "what was found", words=(...), tables=(...), figures=(...))

    QUESTION = Question("repetition", "Consecutive tokens repeat their first choice", _examine)

To add a question, write such a module in this folder and add its `QUESTION` to a list in `analysis.questions.registry`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from analysis.report.report import ReportFigure, Section, Table
from analysis.steps import Steps
from varjax.errors import NotTestableError

Data = TypeVar("Data")


class NotMeasuredError(NotTestableError):
    """The data that a question needs were not given."""


@dataclass(frozen=True)
class Finding:
    """The sections that answer a question, and what else belongs in the JSON file of the report."""

    sections: tuple[Section, ...]
    result: Any = None  # for the JSON file, in the form that the program that asks expects; None: the tables suffice


@dataclass(frozen=True)
class Question(Generic[Data]):
    """One question and the function that answers it."""

    name: str  # of the section, and of the result in the JSON file
    title: str  # the claim or the topic, as the heading of the section
    examine: Callable[[Data], Any]  # a Section or Finding, or what `present` takes; may raise NotTestableError
    needs: Callable[[Data], None] = lambda _: None  # raises it where there is nothing to ask about
    kind: Any = None  # the declared type of what is found, where that takes long and is kept
    present: Callable[[Any], Sequence[Section]] | None = None  # makes the sections from that

    def answer(self, data: Data, steps: Steps | None = None) -> Finding:
        """Answer the question, or say why the data cannot answer it.

        Args:
            data: what the question is asked about.
            steps: of the command, which keep what takes long; None: nothing is kept.

        Returns:
            The sections, at least one.
        """
        try:
            self.needs(data)
            if steps is None or self.kind is None:
                found = self.examine(data)
            else:
                found = steps.do(self.name, self.kind, lambda: self.examine(data))
        except NotTestableError as error:
            verdict = "not measured" if isinstance(error, NotMeasuredError) else "not testable"
            return Finding((self.section(verdict, str(error)),))
        if self.present is not None:
            return Finding(tuple(self.present(found)), found)
        return found if isinstance(found, Finding) else Finding((found,))

    def section(
        self,
        verdict: str,
        outcome: str,
        words: Sequence[str] = (),
        tables: Sequence[Table] = (),
        figures: Sequence[ReportFigure] = (),
        headline: str = "",
    ) -> Section:
        """Make the section of this question.

        Args:
            verdict: one of `analysis.report.report.VERDICTS`.
            outcome: one line that says what was found.
            words: paragraphs that a reader needs to understand the tables.
            tables: the results.
            figures: each with its `draw` function.
            headline: the most important number with its unit.

        Returns:
            The section, with the name and title of the question.
        """
        return Section(self.name, self.title, verdict, outcome, tuple(words), tuple(tables), tuple(figures), headline)

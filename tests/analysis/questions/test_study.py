"""A study is a list of questions: whatever they are, everything is written, and together."""

import json

import pytest

from analysis.questions.question import Finding, Question
from analysis.questions.study import study
from analysis.report.figures import subplots
from analysis.report.output import DIRECTORY, Output
from analysis.report.report import ReportFigure, Section
from varjax.errors import InputError, NotTestableError


def about(name: str) -> Question:
    """A question whose answer is its subject."""

    def draw():
        figure, axis = subplots()
        axis.plot([0, 1])
        return figure

    def asked(subject) -> Finding:
        figures = (ReportFigure(name, f"The figure {name}", "Look.", "Never.", draw),)
        section = Section(name, f"About {name}", "reported", f"{name} is {subject}", figures=figures)
        return Finding((section,), {"answer": subject})

    return Question(name, f"About {name}", asked)


def failing(error: BaseException) -> Question:
    def asked(subject):
        raise error

    return Question("depth", "How deep is it?", asked)


@pytest.fixture
def output(tmp_path) -> Output:
    return Output.of(tmp_path, "study", DIRECTORY)


def test_every_part_is_in_every_file(output):
    report = study("blue", (about("sky"), about("sea")), output, facts=(("who", "me"),), provenance={"seed": 3})
    assert [one.name for one in report.sections] == ["sky", "sea"]
    folder = output.folder
    saved = json.loads((folder / "study.json").read_text())
    assert saved["results"] == {"sky": {"answer": "blue"}, "sea": {"answer": "blue"}}
    assert saved["provenance"] == {"seed": 3} and saved["facts"] == {"who": "me"}
    text, page = (folder / "study.txt").read_text(), (folder / "study.html").read_text()
    assert "1. About sky" in text and "2. About sea" in text
    assert page.count("data:image/png;base64,") == 2
    assert {path.name for path in folder.iterdir()} == {
        *("study.json", "study.txt", "study.html", "index.html", "sky.png", "sky.pdf", "sea.png", "sea.pdf")
    }


def test_a_question_that_cannot_be_answered_says_why_and_the_others_are_answered(output):
    report = study("blue", (failing(NotTestableError("no plumb line")), about("sky")), output)
    unanswered, answered = report.sections
    assert (unanswered.name, unanswered.title, unanswered.verdict) == ("depth", "How deep is it?", "not testable")
    assert unanswered.outcome == "no plumb line" and answered.name == "sky"
    saved = json.loads((output.folder / "study.json").read_text())
    assert saved["results"] == {"depth": None, "sky": {"answer": "blue"}}
    assert "no plumb line" in (output.folder / "study.txt").read_text()


@pytest.mark.parametrize("raised", [ValueError, RuntimeError, InputError])
def test_an_error_in_a_question_is_raised(output, raised):
    with pytest.raises(raised, match="broadcast"):
        study("blue", (about("sky"), failing(raised("operands could not be broadcast together"))), output)


def test_an_interrupted_study_leaves_its_answers(output):
    with pytest.raises(KeyboardInterrupt):
        study("blue", (about("sky"), failing(KeyboardInterrupt())), output)
    assert json.loads((output.folder / "study.json").read_text())["results"] == {"sky": {"answer": "blue"}}
    assert "1. About sky" in (output.folder / "study.txt").read_text() and (output.folder / "study.html").exists()

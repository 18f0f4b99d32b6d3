"""A study is a list of questions: whatever they are, everything is written, and together."""

import json

import pytest

from analysis.report.figures import subplots
from analysis.report.report import ReportFigure, Section
from analysis.studies.study import Finding, study
from varjax.errors import InputError, NotTestableError


def part(name: str):
    """A question whose answer is its subject."""

    def asked(subject) -> Finding:
        figure, axis = subplots()
        axis.plot([0, 1])
        note = ReportFigure(name, f"The figure {name}", "Look.", "Never.")
        section = Section(name, f"About {name}", "reported", f"{name} is {subject}", figures=(note,))
        return Finding(name, (section,), {name: figure}, {"answer": subject})

    return asked


def test_every_part_stands_in_every_file(tmp_path):
    report = study("blue", tmp_path, facts=(("who", "me"),), provenance={"seed": 3}, parts=(part("sky"), part("sea")))
    assert [one.name for one in report.sections] == ["sky", "sea"]
    saved = json.loads((tmp_path / "study.json").read_text())
    assert saved["results"] == {"sky": {"answer": "blue"}, "sea": {"answer": "blue"}}
    assert saved["provenance"] == {"seed": 3} and saved["facts"] == {"who": "me"}
    text, page = (tmp_path / "study.txt").read_text(), (tmp_path / "study.html").read_text()
    assert "1. About sky" in text and "2. About sea" in text
    assert page.count("data:image/png;base64,") == 2
    assert {path.name for path in tmp_path.iterdir()} == {
        *("study.json", "study.txt", "study.html", "index.html", "sky.png", "sky.pdf", "sea.png", "sea.pdf")
    }


def test_a_part_that_cannot_answer_says_why_and_the_others_stand(tmp_path):
    def depth(subject) -> Finding:
        """How deep is it?"""
        raise NotTestableError("no plumb line")

    report = study("blue", tmp_path, parts=(depth, part("sky")))
    unanswered, answered = report.sections
    assert (unanswered.name, unanswered.title, unanswered.verdict) == ("depth", "How deep is it?", "not measured")
    assert unanswered.outcome == "no plumb line" and answered.name == "sky"
    assert json.loads((tmp_path / "study.json").read_text())["results"] == {"depth": None, "sky": {"answer": "blue"}}
    assert "no plumb line" in (tmp_path / "study.txt").read_text()


@pytest.mark.parametrize("raised", [ValueError, RuntimeError, InputError])
def test_a_fault_in_a_part_is_no_answer(tmp_path, raised):
    def broken(subject) -> Finding:
        raise raised("operands could not be broadcast together")

    with pytest.raises(raised, match="broadcast"):
        study("blue", tmp_path, parts=(part("sky"), broken))


def test_a_study_that_is_cut_short_leaves_what_it_answered(tmp_path):
    def interrupted(subject) -> Finding:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study("blue", tmp_path, parts=(part("sky"), interrupted))
    assert json.loads((tmp_path / "study.json").read_text())["results"] == {"sky": {"answer": "blue"}}
    assert "1. About sky" in (tmp_path / "study.txt").read_text() and (tmp_path / "study.html").exists()

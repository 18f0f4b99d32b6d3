"""A study is a list of questions: whatever they are, everything is written, and together."""

import json

import matplotlib.pyplot as plt
import pytest

from analysis.report import FigureNote, Section
from analysis.study import Finding, study


def part(name: str):
    """A question whose answer is its subject."""

    def asked(subject) -> Finding:
        figure, axis = plt.subplots()
        axis.plot([0, 1])
        note = FigureNote(name, f"The figure {name}", "Look.", "Never.")
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
        *("study.json", "study.txt", "study.html", "sky.png", "sky.pdf", "sea.png", "sea.pdf")
    }


def test_a_part_that_fails_writes_no_report(tmp_path):
    def fails(subject) -> Finding:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        study("blue", tmp_path, parts=(part("sky"), fails))
    assert not list(tmp_path.glob("study.*"))

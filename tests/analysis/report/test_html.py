"""The report as text, as fields and as a page: the same content, nothing from elsewhere, nothing executed."""

import dataclasses
import re
from html.parser import HTMLParser

import pytest
from matplotlib.figure import Figure

from analysis.report.files import write_report
from analysis.report.html import _badge, page
from analysis.report.output import Output
from analysis.report.report import Column, Report, ReportFigure, Section, Table, fields, text

NOTE = ReportFigure("curve", "A curve", "Up is more.", "With few points.")
REPORT = Report(
    title="A <title> & more",
    facts=(("model", "tiny"), ("data", "<b>12</b> tokens")),
    notes=("All of it is made up.",),
    sections=(
        Section(
            "first",
            "Something holds",
            "FAIL",
            "x > 1: 0 of 2 layers",
            ("Words with <script>alert(1)</script>.",),
            (Table("Per layer", (Column("layer"), Column("x", ".2f")), ((0, 0.5), (1, float("nan")))),),
            (NOTE,),
        ),
        Section("second", "Something else", "not measured", "needs more"),
    ),
)
VOID = {"meta", "img"}


class Reader(HTMLParser):
    """Checks that every tag is closed, and keeps tags with their attributes."""

    def __init__(self, source: str):
        super().__init__()
        self.open, self.tags = [], []
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_alone():
    source = page(REPORT, {"curve": b"\x89PNG"})
    tags = Reader(source).tags
    names = [tag for tag, _ in tags]
    assert "script" not in names and "link" not in names and names.count("style") == 1
    links = [attributes[name] for _, attributes in tags for name in ("src", "href") if name in attributes]
    assert links and all(one.startswith(("data:image/png;base64,", "#")) for one in links)
    assert "http" not in source and "@import" not in source and "url(" not in source
    targets = {attributes.get("id") for _, attributes in tags}
    assert {one[1:] for one in links if one.startswith("#")} <= targets


def test_text_from_outside_is_escaped():
    source = page(REPORT, {})
    assert "A &lt;title&gt; &amp; more" in source and "&lt;b&gt;12" in source and "<script>" not in source


def test_a_figure_is_drawn_once_and_stays_on_the_page_when_the_report_is_written_again(tmp_path):
    drawn = []
    figure = dataclasses.replace(NOTE, draw=lambda: drawn.append(1) or Figure())
    first = Section("first", "A", "PASS", "o", figures=(figure,))
    report, output = Report("Title", (), (), (first,)), Output.of(tmp_path, "page")
    report = write_report(report, output)
    report = dataclasses.replace(report, sections=(*report.sections, Section("second", "B", "FAIL", "o")))
    write_report(report, output)
    source = (tmp_path / "page.html").read_text()
    assert drawn == [1] and "<img" in source and "Up is more." in source and "With few points." in source
    assert "B</a>" in source and (tmp_path / "curve.pdf").is_file()


def test_verdicts_are_colored_and_readable_without_color():
    source = page(REPORT, {})
    assert re.search(r"\.FAIL \{ background: #b4", source) and re.search(r"\.PASS \{ background: #1a7", source)
    assert '<span class="verdict FAIL">✗ FAIL</span>' in source
    assert '<span class="verdict not">not measured</span>' in source  # neutral: a frame without a color
    assert '<span class="verdict PASS">✓ PASS</span>' in _badge("PASS")


def test_text_and_fields_say_the_same():
    said = text(REPORT)
    assert "FAIL: x > 1: 0 of 2 layers" in said and "needs more" in said and "0.50" in said
    assert "  1         –" in said  # what is not known
    saved = fields(REPORT)
    assert saved["sections"]["first"]["tables"][0]["rows"][0] == {"layer": 0, "x": 0.5}
    assert saved["sections"]["second"]["verdict"] == "not measured"
    assert saved["facts"] == {"model": "tiny", "data": "<b>12</b> tokens"}


def test_lines_of_words_stay_readable():
    long = Report("t", (), (), (Section("a", "A", "reported", "o", ("word " * 100,)),))
    assert max(map(len, text(long).splitlines())) <= 110


def test_a_verdict_is_one_of_the_known():
    with pytest.raises(AssertionError, match="section a: 'pass' is not one of PASS"):
        Section("a", "A", "pass", "o")

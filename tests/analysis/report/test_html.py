"""The report as text, as fields and as a page: the same content, nothing from elsewhere, nothing executed."""

from html.parser import HTMLParser

import pytest

from analysis.report.html import page, write_html
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


def test_figures_that_were_not_drawn_are_left_out_though_another_run_left_some(tmp_path):
    (tmp_path / "curve.png").write_bytes(b"\x89PNG")
    write_html(tmp_path / "page.html", REPORT, ())
    without = (tmp_path / "page.html").read_text()
    assert "<img" not in without
    write_html(tmp_path / "page.html", REPORT, ["curve", "not named"])
    with_it = (tmp_path / "page.html").read_text()
    assert "<img" in with_it and "Up is more." in with_it and "With few points." in with_it
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curve.png", "page.html"]


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
    with pytest.raises(ValueError, match="section a: verdict 'pass', expected one of PASS"):
        Section("a", "A", "pass", "o")

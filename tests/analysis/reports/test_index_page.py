"""The page of all runs: every report that lies below it, the newest first, and a way back."""

import json
from html.parser import HTMLParser
from urllib.parse import unquote

from matplotlib.figure import Figure

from analysis.reports.files import write_report
from analysis.reports.index_page import index_of, write_index
from analysis.reports.report import FigureNote, Report, Section


def links(path):
    found = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            found.extend(value for name, value in attributes if name in ("href", "src"))

    Reader().feed(path.read_text())
    return found


def written(folder, name, time, verdict="PASS"):
    note = FigureNote(f"{name}_curve", "A curve", "Up is more.", "Never.")
    said = Report(
        f"Run <{name}>", (("model", "tiny & small"),), (), (Section("a", "A", verdict, "o", figures=(note,)),)
    )
    drawn = {note.name: Figure()}
    write_report(said, folder, name, figures=drawn, beside={"provenance": {"time_utc": time}})


def test_runs_below_the_working_directory_share_a_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "results" / "one", "first", "2026-01-01T00:00:00+00:00")
    written(tmp_path / "results" / "two" / "deep", "second", "2026-01-02T00:00:00+00:00", "FAIL")
    index = tmp_path / "results" / "index.html"
    pages = ["two/deep/second.html", "one/first.html"]  # the newest first
    assert [link for link in dict.fromkeys(links(index)) if link.endswith(".html")] == pages
    assert all((index.parent / link).is_file() for link in links(index))
    said = index.read_text()
    assert "Run &lt;second&gt;" in said and "1 FAIL" in said and "tiny &amp; small" in said and "2 runs" in said
    assert "../../index.html" in links(index.parent / pages[0])
    assert not (tmp_path / "index.html").exists()


def test_a_folder_elsewhere_has_a_page_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert index_of(tmp_path / "there" / "run") == tmp_path / "there" / "run" / "index.html"
    written(tmp_path / "there" / "run", "first", "")
    assert "first.html" in links(tmp_path / "there" / "run" / "index.html")


def test_what_is_no_report_is_passed_over(tmp_path):
    (tmp_path / "alone.html").write_text("<p>no JSON beside it")
    for name, content in (("broken", "{"), ("list", "[]"), ("other", json.dumps({"title": "not a report"}))):
        (tmp_path / f"{name}.html").write_text("<p>")
        (tmp_path / f"{name}.json").write_text(content)
    write_index(tmp_path / "index.html")
    assert links(tmp_path / "index.html") == []


def test_the_page_of_somebody_else_stays(tmp_path):
    (tmp_path / "index.html").write_text("<p>my own")
    written(tmp_path, "first", "")
    assert (tmp_path / "index.html").read_text() == "<p>my own"


def test_in_the_working_directory_only_what_lies_there_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "elsewhere", "deep", "")
    written(tmp_path, "first", "")
    assert [link for link in dict.fromkeys(links(tmp_path / "index.html")) if link.endswith(".html")] == ["first.html"]


def test_names_that_mean_something_in_an_address(tmp_path):
    written(tmp_path / "run #3, 100%", "first", "")
    write_index(tmp_path / "index.html")
    assert {unquote(link) for link in links(tmp_path / "index.html")} == {
        "run #3, 100%/first.html",
        "run #3, 100%/first_curve.png",
    }
    assert not any("#" in link for link in links(tmp_path / "index.html"))

"""The page of all runs: every report below its folder, the newest first, each with its name, number and verdict."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

from matplotlib.figure import Figure

from analysis.report.files import write_report
from analysis.report.html import write_index
from analysis.report.index_page import main
from analysis.report.output import Output
from analysis.report.report import Report, ReportFigure, Section


def links(path):
    found = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            found.extend(value for name, value in attributes if name in ("href", "src"))

    Reader().feed(path.read_text())
    return found


def written(folder, name, time, verdict="PASS", headline=""):
    figure = ReportFigure(f"{name}_curve", "A curve", "Up is more.", "Never.", Figure)
    section = Section("a", "A question", verdict, "the outcome", figures=(figure,), headline=headline)
    said = Report(f"Run <{name}>", (("model", "tiny & small"),), (), (section,))
    write_report(said, Output.of(folder, name), extra={"provenance": {"time_utc": time}})


def test_the_page_of_all_runs_lists_what_is_below_its_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "results" / "one", "first", "2026-01-01T00:00:00+00:00")
    written(tmp_path / "results" / "two" / "deep", "second", "2026-01-02T00:00:00+00:00", "FAIL")
    main(["results"])
    index = tmp_path / "results" / "index.html"
    assert "written to results/index.html" in capsys.readouterr().out
    pages = ["two/deep/second.html", "one/first.html"]  # the newest first
    assert [link for link in dict.fromkeys(links(index)) if link.endswith(".html")] == pages
    assert all((index.parent / link).is_file() for link in links(index))
    said = index.read_text()
    assert (
        "Run &lt;second&gt;" in said
        and '1 <span class="verdict FAIL">✗ FAIL</span>' in said
        and "tiny &amp; small" in said
        and "2 runs" in said
    )


def words_of_cards(path):
    """The words of every card in the order in which a reader meets them."""
    cards = path.read_text().split("<article>")[1:]
    return [" ".join(re.sub(r"<[^>]+>", " ", card.split("<details>")[0]).split()) for card in cards]


def test_a_card_names_its_run_and_shows_one_number_with_its_verdict(tmp_path):
    written(tmp_path / "alone", "first", "4", "FAIL", "+0.42 %")
    written(tmp_path / "both", "first", "3")
    written(tmp_path / "both", "second", "2")
    written(tmp_path, "here", "1")
    write_index(tmp_path)
    cards = words_of_cards(tmp_path / "index.html")
    assert cards[0].startswith(
        "alone Run <first> 4 +0.42 % ✗ FAIL A question".replace("<", "&lt;").replace(">", "&gt;")
    )
    assert [card.split()[0] for card in cards] == ["alone", "both/first", "both/second", "here"]
    assert "✓ PASS A question: the outcome" in cards[1]  # without a number the outcome itself
    assert "<b>+0.42 %</b>" in (tmp_path / "index.html").read_text()


def test_a_run_writes_nothing_above_its_folder_and_looks_at_nothing_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "project" / "x" / "results" / "other", "other", "")
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    folder = tmp_path / "project" / "x" / "results" / "y"
    written(folder, "first", "")
    new = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    assert {path.parent for path in new} == {folder}
    assert {link for link in links(folder / "index.html") if link.endswith(".html")} == {"first.html"}
    assert "index.html" in links(folder / "first.html")


def test_a_run_that_names_a_file_makes_no_page_but_keeps_one_up_to_date(tmp_path):
    said = Report("Run", (), (), (Section("a", "A", "PASS", "o"),))
    write_report(said, Output.of(tmp_path / "named.txt", ""))
    assert not (tmp_path / "index.html").exists() and "index.html" not in links(tmp_path / "named.html")
    written(tmp_path, "first", "")
    write_report(said, Output.of(tmp_path / "later.txt", ""))
    assert {"first.html", "named.html", "later.html"} <= set(links(tmp_path / "index.html"))
    assert "index.html" in links(tmp_path / "later.html")


def test_what_is_no_report_is_passed_over(tmp_path):
    (tmp_path / "alone.html").write_text("<p>no JSON next to it")
    for name, content in (("broken", "{"), ("list", "[]"), ("other", json.dumps({"title": "not a report"}))):
        (tmp_path / f"{name}.html").write_text("<p>")
        (tmp_path / f"{name}.json").write_text(content)
    write_index(tmp_path)
    assert links(tmp_path / "index.html") == []


def test_the_page_of_somebody_else_stays(tmp_path):
    (tmp_path / "index.html").write_text("<p>my own")
    written(tmp_path, "first", "")
    assert (tmp_path / "index.html").read_text() == "<p>my own"


def test_in_the_working_directory_only_what_lies_there_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "elsewhere", "deep", "")
    for folder in (tmp_path, Path(".")):
        written(folder, "first", "")
        page = tmp_path / "index.html"
        assert [link for link in dict.fromkeys(links(page)) if link.endswith(".html")] == ["first.html"]


def test_names_that_mean_something_in_an_address(tmp_path):
    written(tmp_path / "run #3, 100%", "first", "")
    write_index(tmp_path)
    assert {unquote(link) for link in links(tmp_path / "index.html")} == {
        "run #3, 100%/first.html",
        "run #3, 100%/first_curve.png",
    }
    assert not any("#" in link for link in links(tmp_path / "index.html"))

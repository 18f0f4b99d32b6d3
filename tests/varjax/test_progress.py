"""Bars are for terminals."""

import io
import sys

from varjax.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def drawn(monkeypatch, stream: io.StringIO, **options) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    assert list(progress_bar(range(3), file=stream, **options)) == [0, 1, 2]
    return stream.getvalue()


def test_a_terminal_gets_a_bar_and_a_log_file_nothing(monkeypatch):
    assert "3/3" in drawn(monkeypatch, Terminal())
    assert drawn(monkeypatch, io.StringIO()) == ""


def test_a_bar_that_is_not_wanted_is_not_drawn(monkeypatch):
    assert drawn(monkeypatch, Terminal(), show=False) == ""


def test_without_a_terminal_updates_do_no_harm():
    with progress_bar(total=2, file=io.StringIO()) as bar:
        bar.update(1)
        bar.set_postfix(loss="0.5")

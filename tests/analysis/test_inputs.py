"""Inputs that are not named are found in the documented places, and which one was taken is said."""

from pathlib import Path

import pytest

from analysis.inputs import CONFIGS, STATISTICS, find_config, find_statistics
from varjax.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


def make(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")


@pytest.mark.parametrize(
    ("find", "places", "word"), [(find_statistics, STATISTICS, "statistics"), (find_config, CONFIGS, "config")]
)
def test_the_first_that_exists_is_taken_and_named(find, places, word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for place in reversed(places):
        make(place)
        assert find() == place
        assert capsys.readouterr().out == f"{word}: {place}, since none is named\n"
    assert find(Path("mine")) == Path("mine") and capsys.readouterr().out == ""


def test_where_there_is_nothing_it_is_said_what_to_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"01_routing_analysis\.py first, or name a file"):
        find_statistics()
    assert find_config() is None


def test_the_places_are_documented():
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert "`results/routing_stats.parquet`, `results/phase1/` and `results/demo/`" in readme
    assert [path.parent.as_posix() for path in STATISTICS] == ["results", "results/phase1", "results/demo"]
    assert all(f"`{path}`" in readme for path in CONFIGS)

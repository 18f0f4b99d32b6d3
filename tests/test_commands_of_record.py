"""The commands that the project was specified with work as written, one after the other, in one directory."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from analysis.evaluate.comparison import read_result
from tests.documented import ROOT
from tests.of_record import COMMANDS
from varjax import statsfile


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """The directory afterwards, and what each command printed."""
    if importlib.util.find_spec("torch") is None:
        pytest.skip("--method bayesian needs torch (varjax[gp])")
    folder = tmp_path_factory.mktemp("of_record")
    (folder / "analysis").symlink_to(ROOT / "analysis")  # `experiments` is staged, with smaller configs
    done = subprocess.run(
        [sys.executable, "-m", "tests.of_record"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "it/s" not in done.stderr and "%|" not in done.stderr  # no bar where there is no terminal
    _, *parts = re.split(r"^\$ (.*)$", done.stdout, flags=re.MULTILINE)
    return folder, dict(zip(parts[::2], parts[1::2], strict=True))


def test_every_command_ends_well_and_in_this_order(finished):
    _, printed = finished
    assert list(printed) == COMMANDS.strip().splitlines() and len(printed) == 9


def test_outputs_that_name_a_file_are_files(finished):
    results = finished[0] / "results"
    stats, _ = statsfile.read(results / "routing_stats.parquet")
    assert stats.documents > 100
    assert (results / "routing_stats.answers.safetensors").is_file()
    assert (results / "routing_stats.routing_trace.parquet").is_file()
    report = (results / "validation_report.txt").read_text()
    assert "Routing hypotheses" in report and "PASS" in report
    assert (
        "routing_trace"
        in json.loads((results / "validation_report.json").read_text())["provenance"]["files"]["trace"]["path"]
    )
    figures = {path.name for path in results.glob("*.png")}
    assert figures and all(name.startswith(("routing_stats.", "validation_report.")) for name in figures)
    assert not [path for path in results.rglob("*") if path.is_dir() and path.suffix in (".parquet", ".txt", ".json")]
    assert not list(results.rglob(".*"))  # neither locks nor temporary files


def test_the_next_command_finds_its_input(finished):
    results, printed = finished[0] / "results", finished[1]
    sides = [read_result(results / "phase2" / f"{name}.json") for name in ("baseline", "var")]
    comparison = json.loads((results / "phase2" / "comparison.json").read_text())
    assert comparison["documents"] == len(sides[0].losses.ids) == len(sides[1].losses.ids) > 0
    best = json.loads((results / "phase3" / "best_config.json").read_text())
    assert best["table"]["routing_stats"] == "results/routing_stats.parquet"
    names = [
        one["name"]
        for one in json.loads((results / "phase3" / "validation.json").read_text())["validation"]["candidates"]
    ]
    assert names[0] == "best_config"
    assert "best_config.json" in json.loads((results / "phase5" / "systems.json").read_text())["facts"]["policy"]
    written = {path.name for path in (results / "phase5").iterdir()}
    assert {"systems.html", "systems.txt", "roofline.png", "components.pdf"} <= written and "traces" not in written
    found = json.loads((results / "phase5" / "systems.json").read_text())["results"]
    assert {one["side"] for one in found["components"]} == {"plain", "VAR"}
    assert {one["phase"] for one in found["evidence"]} == {"prefill", "decode"}
    (search,) = (said for command, said in printed.items() if "bayesian" in command)
    (quick,) = (said for command, said in printed.items() if "--quick" in command)
    assert "statistics: results/routing_stats.parquet, since none is named" in search
    assert "config: results/phase3/best_config.json, since none is named" in quick

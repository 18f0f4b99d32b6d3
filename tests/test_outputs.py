"""What every program does with its `--output`, before any work."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from analysis.report.output import Output
from tests.documented import ROOT
from tests.running import run_python

# The words of a command without --output, and the name of its lock in a directory.
PROGRAMS = {
    "experiments/00_train_reference.py": ((), "model"),
    "experiments/01_routing_analysis.py": ((), "routing_stats"),
    "experiments/02_evaluate_var.py": (("--mode", "baseline"), "baseline"),
    "experiments/03_hyperparameter_optimization.py": ((), "tuning"),
    "experiments/05_systems_analysis.py": ((), "systems"),
    "analysis.audit_study": ((), "audit"),
    "analysis.harness": (("--tasks", "a"), "harness"),
    "analysis.hypothesis_validation": ((), "hypotheses"),
    "analysis.replay": (("--trace", "none.parquet"), "replay"),
    "profiling.ceilings": ((), "ceilings"),
    "benchmarks.device": ((), "device"),
    "benchmarks.smollm2": ((), "model"),
    "profiling.performance_model": ((), "performance"),
}
NOT_WRITTEN = {  # an ending that the program does not write
    name: ".txt" if name.startswith(("experiments/01", "analysis.harness", "profiling", "benchmarks")) else ".parquet"
    for name in PROGRAMS
}


def give(name: str, *words: object) -> None:
    module = () if name.endswith(".py") else ("-m",)
    place = str(ROOT / name) if name.endswith(".py") else name
    run_python([*module, place, *PROGRAMS[name][0], *map(str, words)])


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_cannot_be_written_is_one_error_before_the_work(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"^error: --output /dev/null/run: cannot be written"):
        give(name, "--output", "/dev/null/run")
    with pytest.raises(SystemExit, match=rf"^error: --output a\{NOT_WRITTEN[name]}: no .* file is written here; give "):
        give(name, "--output", f"a{NOT_WRITTEN[name]}")
    Path("taken").write_text("")
    with pytest.raises(SystemExit, match=r"^error: --output taken is a file, but a directory is to be written"):
        give(name, "--output", "taken")
    held = rf"^error: --output run: process {os.getpid()} on .* is writing there"
    with Output.of(Path("run"), PROGRAMS[name][1]).locked(), pytest.raises(SystemExit, match=held):
        give(name, "--output", "run")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_an_imported_trace_has_one_file(tmp_path):
    with pytest.raises(SystemExit, match=r"^error: --output .*a\.json: no \.json file is written here"):
        run_python(["-m", "analysis.traces.importing", "none.npz", str(tmp_path / "a.json")])


def test_a_script_is_found_where_its_folder_comes_first_in_the_path():
    """`python analysis/hypothesis_validation.py`: Python looks for modules in `analysis/` before anywhere else."""
    done = subprocess.run(
        [sys.executable, "analysis/hypothesis_validation.py", "--help"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "results/routing_stats.parquet" in done.stdout, done.stderr

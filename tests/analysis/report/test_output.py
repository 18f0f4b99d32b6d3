"""What `--output` means, and that two runs do not write the same files."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from analysis.report import output as output_module
from analysis.report.files import write_report
from analysis.report.output import DIRECTORY, Output, lock
from analysis.report.report import Report, ReportFigure, Section
from varjax.errors import InputError

ROOT = Path(__file__).resolve().parents[3]


def test_a_known_ending_is_a_file_and_everything_else_is_a_directory(tmp_path):
    file = Output.of(tmp_path / "a.b.txt", "report")
    assert (file.folder, file.stem, file.named) == (tmp_path, "a.b", True)
    assert file.main(".json") == tmp_path / "a.b.json"
    assert file.other("figure.png") == tmp_path / "a.b.figure.png"
    for name in ("run.1", "plain", "a.csv", "v0.3"):
        directory = Output.of(tmp_path / name, "report")
        assert (directory.folder, directory.stem, directory.named) == (tmp_path / name, "report", False)
        assert directory.main(".txt") == tmp_path / name / "report.txt"
        assert directory.other("figure.png") == tmp_path / name / "figure.png"


def test_what_is_there_of_the_other_kind_is_refused(tmp_path):
    (tmp_path / "a.json").mkdir()
    with pytest.raises(InputError, match=r"a\.json is a directory, but a file is to be written"):
        Output.of(tmp_path / "a.json", "report")
    (tmp_path / "run").write_text("")
    with pytest.raises(InputError, match="run is a file, but a directory is to be written"):
        Output.of(tmp_path / "run", "report")


def test_a_file_that_a_program_does_not_write_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no \.parquet file is written here; give a name that ends in \.txt, \.json"):
        Output.of(tmp_path / "a.parquet", "report")
    with pytest.raises(InputError, match=r"no \.json file is written here; give a directory"):
        Output.of(tmp_path / "a.json", "tuning", DIRECTORY)


def test_a_second_run_is_refused_and_told_who_holds_the_output(tmp_path):
    first, second = Output.of(tmp_path / "run", "report"), Output.of(tmp_path / "run" / "report.json", "report")
    with first.locked():
        for other in (first, second):  # the same files by another name
            with (
                pytest.raises(InputError, match=rf"process {os.getpid()} on .* is writing there; wait"),
                other.locked(),
            ):
                raise AssertionError("not reached")
        with Output.of(tmp_path / "run", "another").locked(), first.locked("process-1"):
            pass
        (tmp_path / "run" / "report.txt").write_text("written")
    with second.locked():
        pass
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["report.txt"]


def test_a_run_that_writes_nothing_leaves_nothing(tmp_path):
    with pytest.raises(InputError, match="bad"), Output.of(tmp_path / "a" / "b", "report").locked():
        raise InputError("bad")
    assert not list(tmp_path.iterdir())


def test_the_lock_of_a_killed_process_does_not_block(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from analysis.report.output import Output\n"
        "with Output.of(Path(sys.argv[1]), 'report').locked(): os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == -9 and (tmp_path / ".report.lock").is_file()
    with Output.of(tmp_path, "report").locked():
        assert str(os.getpid()) in (tmp_path / ".report.lock").read_text()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["/proc/nowhere/run", "/dev/null/run.json"])
def test_an_impossible_place_is_one_error_before_the_work(place):
    with (
        pytest.raises(InputError, match=rf"--output {place}: cannot be written \(.+\)"),
        Output.of(Path(place), "report").locked(),
    ):
        raise AssertionError("not reached")


def test_a_read_only_place_is_one_error_before_the_work(tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "open", refuse)  # root may write everywhere
    with (
        pytest.raises(InputError, match=r"cannot be written \(Read-only file system"),
        Output.of(tmp_path, "report").locked(),
    ):
        raise AssertionError("not reached")


def test_without_locks_in_the_file_system_the_work_is_done(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(output_module.fcntl, "flock", refuse)
    with lock(tmp_path / ".a.lock", "a"):
        assert (tmp_path / ".a.lock").is_file()


def test_figures_of_two_reports_in_one_folder_do_not_collide(tmp_path):
    for name in ("first", "second"):
        curve = ReportFigure("curve", "A curve", "Up is more.", "Never.", Figure)
        section = Section("a", "A", "PASS", "o", figures=(curve,))
        said = Report(name, (("model", "tiny"),), (), (section,))
        write_report(said, Output.of(tmp_path / f"{name}.txt", "report"))
    names = {path.name for path in tmp_path.iterdir()}
    ends = ("txt", "json", "html", "curve.png", "curve.pdf")
    assert names == {f"{name}.{end}" for name in ("first", "second") for end in ends}  # and no index.html
    assert "data:image/png" in (tmp_path / "first.html").read_text()

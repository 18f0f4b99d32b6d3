"""`replacing`: a file is written whole or not at all."""

import errno
import os
import platform
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from varjax.files import replacing


def test_the_new_file_takes_the_old_ones_place(tmp_path):
    path = tmp_path / "folder" / "file.txt"
    for content in ("old", "new"):
        with replacing(path) as temporary:
            temporary.write_text(content)
        assert path.read_text() == content
    assert list(path.parent.iterdir()) == [path]


def test_an_interruption_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("half of the n")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    path = tmp_path / "file.txt"
    writes = "import os, sys, varjax.files; file = varjax.files.replacing(sys.argv[1]); file.__enter__(); os._exit(9)"
    killed = subprocess.Popen([sys.executable, "-c", writes, path], cwd=Path(__file__).parents[2])
    assert killed.wait() == 9
    (left,) = tmp_path.iterdir()
    begins, ends = f".file.txt.{platform.node()}", f".0.{killed.pid}.tmp"
    assert left.name.startswith(begins) and left.name.endswith(ends)
    kept = [
        left.with_name(left.name.replace(str(killed.pid), str(os.getppid()))),  # of a process that runs
        left.with_name(f".file.txt.another-machine{ends}"),
        left.with_name(f"{begins}-1{ends}"),  # of another container, which counts its processes by itself
        left.with_name(left.name.replace("file", "other")),
    ]
    for one in kept:
        one.write_text("half")
    with replacing(path) as temporary:
        temporary.write_text("whole")
    assert set(tmp_path.iterdir()) == {path, *kept}


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        ValueError("RESOURCE_EXHAUSTED: Failed to write: No space left on device [os_error_code='28']"),  # of orbax
    ],
)
def test_a_full_disk_is_an_error_of_the_system_that_names_the_file(tmp_path, error):
    with pytest.raises(OSError, match=r"file\.bin") as raised, replacing(tmp_path / "file.bin"):
        raise error
    assert raised.value.errno == errno.ENOSPC and raised.value.filename == str(tmp_path / "file.bin")
    assert not list(tmp_path.iterdir())


def test_another_error_stays_as_it_is(tmp_path):
    with pytest.raises(ValueError, match="of NumPy"), replacing(tmp_path / "file.bin"):
        raise ValueError("of NumPy")
    with pytest.raises(FileNotFoundError) as raised, replacing(tmp_path / "file.bin"):
        (tmp_path / "none").read_text()
    assert raised.value.filename == str(tmp_path / "none")


def test_whoever_may_read_other_new_files_may_read_these_and_the_umask_is_left_alone(tmp_path, monkeypatch):
    """Some writers keep their file to its owner. While the umask is changed, files of other threads are anybody's."""
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask was changed"))
    (tmp_path / "other").touch()
    with replacing(tmp_path / "file.txt") as temporary:
        temporary.unlink()
        temporary.write_text("new")
        temporary.chmod(0o600)
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("other", "file.txt")}
    assert len(modes) == 1 and modes != {0o600}

"""`replacing`: a file is written whole or not at all."""

import os
import stat

import pytest

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

"""`replacing`: a file is written whole or not at all."""

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

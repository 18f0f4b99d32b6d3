"""The files of a corpus: which files of a directory are read and which are skipped, and how a packed file is opened.

A corpus file ends in one of `SUFFIXES`, compressed or not (`PACKED`), in upper or lower case.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pyarrow as pa

SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
PACKED = {".gz": "gzip", ".zst": "zstd"}
_ABOUT = re.compile(  # names of files that tell something about the others
    r"(readme|licen[cs]e|copying|changelog|requirements|constraints)([-_.].*)?|notice", re.IGNORECASE
)
_NAMED = 3  # files that are named of each kind


@dataclass(frozen=True)
class Listing:
    """The files below a directory. Hidden ones, and those in hidden directories, are in neither part."""

    read: tuple[Path, ...]  # in order of path
    skipped: Mapping[str, tuple[Path, ...]]  # by what they are: a suffix, or a reason

    def said(self) -> str:
        """One line for people: which files are read, and how many of which kind are not."""
        skipped = "; ".join(f"{kind}: {_counted(files)}" for kind, files in self.skipped.items())
        return f"files read: {_counted(self.read)}" + (f"; skipped: {skipped}" if skipped else "")


def kind_of(path: Path) -> str | None:
    """Which of SUFFIXES a file has, compressed or not; None: it is not a corpus file."""
    suffix = _suffixes(path)[0]
    return suffix if suffix in SUFFIXES else None


def stem_of(path: Path) -> str:
    """The name of a file without the suffixes that say what it is."""
    return path.name[: len(path.name) - len("".join(_suffixes(path)))] or path.name


def opened(path: Path) -> IO[bytes]:
    """The contents of a file, unpacked. Reading raises OSError where a packed file is damaged or ends too early."""
    packed = _suffixes(path)[1]
    if not packed:
        return path.open("rb")
    return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), PACKED[packed]))


def files_below(directory: Path, text_column: str) -> Listing:
    """The corpus files below a directory.

    Skipped are files of other kinds, links that leave the directory, text files with names like README or requirements,
    and JSON files whose first record does not have the field `text_column`, such as the settings of a program.
    """
    read: list[Path] = []
    skipped: dict[str, list[Path]] = {}
    root = directory.resolve()
    for path in sorted(directory.rglob("*")):
        if any(part.startswith(".") for part in path.relative_to(directory).parts):
            continue
        if path.is_dir() and not path.is_symlink():
            continue
        reason = _why_skipped(path, root, text_column)
        if reason:
            skipped.setdefault(reason, []).append(path)
        else:
            read.append(path)
    return Listing(tuple(read), {reason: tuple(files) for reason, files in sorted(skipped.items())})


def _why_skipped(path: Path, root: Path, text_column: str) -> str:
    """What a file is that is not read, or "" if it is read."""
    target = Path(os.path.realpath(path))  # Path.resolve raises on a circle of links
    if path.is_symlink() and (path.is_dir() or not target.is_relative_to(root)):
        return "links that leave the directory"
    if not path.is_file():
        return "special files"
    kind = kind_of(path)
    if kind is None:
        return "".join(_suffixes(path)) or "without a suffix"
    if kind == ".txt" and _ABOUT.fullmatch(stem_of(path)):
        return "notes about the others"
    if kind == ".json" and not _holds_texts(path, text_column):
        return f".json without the field {text_column!r}"
    return ""


def first_line(path: Path) -> bytes:
    """The first line of a file that is not blank; b"" if there is none."""
    with opened(path) as file:
        return next((line for line in file if line.strip()), b"")


def begins_list(line: bytes) -> bool:
    """Whether a JSON file with this first line holds a list."""
    return line.lstrip(b"\xef\xbb\xbf \t").startswith(b"[")


def _holds_texts(path: Path, text_column: str) -> bool:
    """Whether the first record of a JSON file has the field."""
    try:
        line = first_line(path)
        if begins_list(line):
            with opened(path) as file:
                records = json.load(file)
            record = records[0] if records else None
        else:
            record = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError):  # JSON over several lines, or not JSON
        return False
    except OSError:  # a damaged archive: reading it says so
        return True
    return isinstance(record, dict) and text_column in record


def _suffixes(path: Path) -> tuple[str, str]:
    """In lower case, what a file is and how it is packed: ('.txt', ''), ('.jsonl', '.gz'), ('', '')."""
    *_, before, last = ["", "", *(suffix.lower() for suffix in path.suffixes)]
    return (before, last) if last in PACKED else (last, "")


def _counted(files: tuple[Path, ...]) -> str:
    """'2 (a.csv, b.csv)'"""
    named = ", ".join(path.name for path in files[:_NAMED]) + (", …" if len(files) > _NAMED else "")
    return f"{len(files):,} ({named})" if files else "0"

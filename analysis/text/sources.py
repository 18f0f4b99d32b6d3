"""The texts of a dataset, wherever they come from: the embedded corpus, files, directories, or the Hugging Face hub.

| dataset | documents | group |
|---|---|---|
| `embedded` | docstrings of the installed packages (`analysis.text.embedded`), in hash order | package |
| `*.txt` | parts between lines `<|endofdoc|>`; else WikiText articles; else the whole file | file stem |
| `*.jsonl` | the field `text` of every line | field `group`, else file stem |
| `*.json` | the same of every line, or of every record of a list | field `group`, else file stem |
| `*.parquet` | the column `text` of every row | column `group`, else file stem |
| the same with `.gz` or `.zst` | as of the file inside | as above, the stem without these suffixes |
| a directory | such files below it, in order of path; or a `datasets` `save_to_disk` folder | as above |
| `name[:config[:split]]` | a Hugging Face dataset, streamed (default split: `train`) | field, or name |

Suffixes may be in upper or lower case. What a directory holds, read or skipped, is logged once. A byte-order mark at
the start of a file is not part of its text.

A WikiText article starts at a line ` = Title = `. A plain text file without separators is deliberately one document:
its paragraphs depend on each other, and a confidence bound over documents would be wrong if it took them as
independent.
"""

from __future__ import annotations

import functools
import io
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from analysis.text import embedded
from varjax.errors import InputError

END_OF_DOCUMENT = "<|endofdoc|>"

_SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
_PACKED = {".gz": "gzip", ".zst": "zstd"}
_MISSING = object()
_TITLE = re.compile(r"^ ?= (?!=).*(?<!=) = ?$", re.MULTILINE)  # " = Title = ", not " = = Section = = "
_MARK = "\ufeff"  # byte-order mark; in concatenated files it occurs before lines as well
_SEPARATOR = re.compile(rf"^{_MARK}?{re.escape(END_OF_DOCUMENT)}\s*$", re.MULTILINE)
_ABOUT = re.compile(  # names of files that say something about the other files
    r"(readme|licen[cs]e|copying|changelog|requirements|constraints)([-_.].*)?|notice", re.IGNORECASE
)
_NAMED = 3  # files of each kind that a message names

Record = tuple[str | None, str]  # text and group; None where the text is null

logger = logging.getLogger(__name__)


class CorpusError(InputError):
    """A corpus cannot be read: the message names the file (and line or field) and the fix."""


def records(dataset: str | Path, text_column: str) -> Iterator[Record]:
    """Read a dataset (see the table above).

    Args:
        dataset: `embedded`, a file, a directory or a Hugging Face dataset.
        text_column: field that holds the text in JSON, Parquet and Hugging Face data.

    Returns:
        Text and group of every document.

    Raises:
        CorpusError: nothing is found there, or something in it cannot be read.
    """
    if dataset == "embedded":
        return iter(embedded.rows())
    path = Path(dataset).expanduser()
    if path.is_dir():
        return _directory_records(path, text_column)
    if path.is_file() or _suffixes(path)[0] in _SUFFIXES or str(dataset).startswith((".", "/", "~")):
        return _file_records(path, text_column)
    return _hub_records(str(dataset), text_column)


def stem_of(path: Path) -> str:
    """Strip the suffixes that say what a file is.

    Args:
        path: of a file.

    Returns:
        The rest of its name, such as `notes` for `notes.jsonl.gz`.
    """
    return path.name[: len(path.name) - len("".join(_suffixes(path)))] or path.name


@functools.cache
def log_once(message: str) -> None:
    """Log a warning once per process, since a corpus is read several times.

    Args:
        message: the warning.
    """
    logger.warning(message)


# --- files -----------------------------------------------------------------------------------------------------------


def _file_records(path: Path, text_column: str) -> Iterator[Record]:
    if not path.is_file():
        raise CorpusError(f"{path}: no such file; check the path (a Hugging Face dataset is named owner/name)")
    kind = _suffixes(path)[0]
    if kind not in _SUFFIXES:
        raise CorpusError(
            f"{path}: a corpus file ends in {', '.join(_SUFFIXES)}, or in one of these and {' or '.join(_PACKED)}; "
            "convert it to one of these"
        )
    read = {".txt": _text_records, ".parquet": _parquet_records}.get(kind, _json_records)
    try:
        yield from read(path, text_column)
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read to its end ({error}); restore the file or remove it") from error


def _text_records(path: Path, _: str) -> Iterator[Record]:
    with _opened(path) as file:
        contents = file.read()
    try:
        text = contents.decode("utf-8").removeprefix(_MARK)
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path}: not UTF-8 at byte {error.start}; convert the file to UTF-8") from error
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if _SEPARATOR.search(text):
        parts = _SEPARATOR.split(text)
    else:  # a WikiText file is cut before each top-level title; any other text is one part
        cuts = [0, *(match.start() for match in _TITLE.finditer(text)), len(text)]
        parts = [text[start:end] for start, end in pairwise(cuts)]
    for part in parts:
        yield part.strip("\n"), stem_of(path)


def _json_records(path: Path, text_column: str) -> Iterator[Record]:
    """The lines of a file, or the records of the list that a `.json` file may hold."""
    for where, fields in _json_values(path):
        if not isinstance(fields, dict):
            raise CorpusError(f'{where}: expected an object such as {{"{text_column}": "..."}}')
        yield _record(fields, text_column, where, stem_of(path))


def _json_values(path: Path) -> Iterator[tuple[str, Any]]:
    """Every value with its place, for messages."""
    listed = _suffixes(path)[0] == ".json" and _begins_list(_first_line(path))
    with _opened(path) as file:
        if listed:
            try:
                values = json.load(file)
            except ValueError as error:
                raise CorpusError(f"{path}: not a JSON list ({error}); fix the file") from error
            yield from ((f"{path}, record {number}", value) for number, value in enumerate(values))
            return
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            if line.strip():
                try:
                    yield where, json.loads(line)
                except ValueError as error:  # malformed JSON, or not UTF-8
                    raise CorpusError(f"{where}: not a JSON object ({error}); fix or remove the line") from error


def _parquet_records(path: Path, text_column: str) -> Iterator[Record]:
    packed = path.suffix.lower() in _PACKED
    try:
        with pq.ParquetFile(pa.BufferReader(_opened(path).read()) if packed else path) as file:
            names = file.schema_arrow.names
            if text_column not in names:
                raise CorpusError(
                    f"{path}: no column {text_column!r} among {', '.join(names)}; name it (--text_column)"
                )
            for batch in file.iter_batches(columns=[text_column, *({"group"} & set(names))]):
                for row in batch.to_pylist():
                    yield _record(row, text_column, str(path), stem_of(path))
    except (pa.ArrowException, OSError) as error:
        raise CorpusError(f"{path}: not a readable Parquet file ({error}); write it again") from error


def _record(fields: dict[str, Any], text_column: str, where: str, group: str) -> Record:
    """Text and group of one record; its own group comes before the given one."""
    text = fields.get(text_column, _MISSING)
    if text is None or text != text:  # pandas writes null texts as NaN
        return None, group
    if not isinstance(text, str):
        fault = f"is {type(text).__name__}, not text" if text_column in fields else "is missing"
        raise CorpusError(
            f"{where}: the field {text_column!r} {fault} (fields: {', '.join(map(str, fields))}); "
            "name the field that holds the text (--text_column)"
        )
    meta = fields.get("meta")
    subset = meta.get("redpajama_set_name") if isinstance(meta, dict) else None
    return text, str(fields.get("group") or subset or group)


def _opened(path: Path) -> IO[bytes]:
    """The contents of a file, unpacked. Reading raises OSError where a packed file is damaged or ends too early."""
    packed = _suffixes(path)[1]
    if not packed:
        return path.open("rb")
    return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), _PACKED[packed]))


def _first_line(path: Path) -> bytes:
    """The first line that is not blank, or b""."""
    with _opened(path) as file:
        return next((line for line in file if line.strip()), b"")


def _begins_list(line: bytes) -> bool:
    return line.lstrip(b"\xef\xbb\xbf \t").startswith(b"[")


def _suffixes(path: Path) -> tuple[str, str]:
    """In lower case, the kind of a file and how it is packed: ('.txt', ''), ('.jsonl', '.gz'), ('', '')."""
    *_, before, last = ["", "", *(suffix.lower() for suffix in path.suffixes)]
    return (before, last) if last in _PACKED else (last, "")


# --- directories -----------------------------------------------------------------------------------------------------


def _directory_records(path: Path, text_column: str) -> Iterator[Record]:
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        yield from _saved_records(path, text_column)
        return
    files: list[Path] = []
    skipped: dict[str, list[Path]] = {}
    root = path.resolve()
    for file in sorted(path.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if hidden or (file.is_dir() and not file.is_symlink()):
            continue
        reason = _why_skipped(file, root, text_column)
        (skipped.setdefault(reason, []) if reason else files).append(file)
    listing = f"files read: {_counted(files)}"
    if skipped:
        listing += "; skipped: " + "; ".join(f"{kind}: {_counted(skipped[kind])}" for kind in sorted(skipped))
    if not files:
        prepared = sorted(str(manifest.parent) for manifest in path.glob("*/manifest.json"))
        fix = f"or give one of the prepared folders in it: {', '.join(prepared)}" if prepared else "add one"
        raise CorpusError(
            f"{path}: the directory holds no file to read, compressed or not, that ends in {', '.join(_SUFFIXES)} "
            f"({listing}); {fix}"
        )
    log_once(f"{path}: {listing}")
    for file in files:
        yield from _file_records(file, text_column)


def _why_skipped(path: Path, root: Path, text_column: str) -> str:
    """The kind of a file that is not read, or "" if it is read."""
    target = Path(os.path.realpath(path))  # Path.resolve raises on a circle of links
    if path.is_symlink() and (path.is_dir() or not target.is_relative_to(root)):
        return "links that leave the directory"
    if not path.is_file():
        return "special files"
    kind = _suffixes(path)[0]
    if kind not in _SUFFIXES:
        return "".join(_suffixes(path)) or "without a suffix"
    if kind == ".txt" and _ABOUT.fullmatch(stem_of(path)):
        return "notes about the others"
    if kind == ".json" and not _holds_texts(path, text_column):
        return f".json without the field {text_column!r}"
    return ""


def _holds_texts(path: Path, text_column: str) -> bool:
    """Whether the first record of a JSON file has the field; settings of a program, for example, have not."""
    try:
        line = _first_line(path)
        with _opened(path) as file:
            first = (json.load(file) or [None])[0] if _begins_list(line) else json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError):  # JSON over several lines, or not JSON
        return False
    except OSError:  # a damaged archive, which is reported when it is read
        return True
    return isinstance(first, dict) and text_column in first


def _counted(files: list[Path]) -> str:
    """'2 (a.csv, b.csv)'"""
    named = ", ".join(path.name for path in files[:_NAMED]) + (", …" if len(files) > _NAMED else "")
    return f"{len(files):,} ({named})" if files else "0"


# --- the datasets library --------------------------------------------------------------------------------------------


def _saved_records(path: Path, text_column: str) -> Iterator[Record]:
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:
        raise CorpusError(f"{path}: not a readable `save_to_disk` dataset ({error}); save it again") from error
    for part in saved.values() if isinstance(saved, datasets.DatasetDict) else [saved]:
        for number, fields in enumerate(part):
            yield _record(fields, text_column, f"{path}, row {number}", path.name)


def _hub_records(dataset: str, text_column: str) -> Iterator[Record]:
    """A Hugging Face dataset, streamed. Group: its `group` field, SlimPajama's subset, or its name."""
    import datasets

    name, config, hub_split, *rest = [*dataset.split(":"), "", ""]
    if not name or any(rest):
        raise CorpusError(f"{dataset}: a Hugging Face dataset is named name, name:config or name:config:split")
    try:
        stream = datasets.load_dataset(name, config or None, split=hub_split or "train", streaming=True)
    except Exception as error:  # the library raises many kinds, network faults among them
        raise CorpusError(
            f"{dataset}: neither a file here nor a dataset that opens ({type(error).__name__}: {error}); "
            "check the spelling and the network, or use `embedded`, which needs none"
        ) from error

    def streamed() -> Iterator[Record]:
        read = 0
        try:
            for read, fields in enumerate(stream, start=1):
                yield _record(fields, text_column, f"{dataset}, row {read - 1}", name)
        except CorpusError:
            raise
        except Exception as error:  # as above
            raise CorpusError(
                f"{dataset}: reading stopped after {read:,} rows ({type(error).__name__}: {error}); "
                "check the network and run this again"
            ) from error

    return _joined_articles(streamed()) if "wikitext" in name.lower() else streamed()


def _joined_articles(lines: Iterable[Record]) -> Iterator[Record]:
    """WikiText on the hub holds one line per row; join them into articles again."""
    article: list[str] = []
    group = ""
    for line, group in lines:
        if line is None:
            yield None, group
            continue
        if article and _TITLE.match(line.rstrip("\n")):
            yield "".join(article), group
            article = []
        article.append(line if line.endswith("\n") else line + "\n")
    if article:
        yield "".join(article), group

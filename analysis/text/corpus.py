"""Documents, wherever they come from, and their division into splits that no run can mix up.

A document is one whole text. Its id is the SHA-256 of that text, and its split follows from the id alone: the
same text lands in the same split on every machine, in every order and whatever else the corpus holds.

`load_documents(dataset)` reads:

| dataset | documents | group |
|---|---|---|
| `embedded` | docstrings of the installed packages (`analysis.text.embedded`), in hash order | package |
| `*.txt` | parts between lines `<|endofdoc|>`; else WikiText articles; else the whole file | file stem |
| `*.jsonl` | the field `text` of every line | field `group`, else file stem |
| `*.json` | the same of every line, or of every record of a list | field `group`, else file stem |
| `*.parquet` | the column `text` of every row | column `group`, else file stem |
| the same with `.gz` or `.zst` | as of the file inside | as above, the stem without these suffixes |
| a directory | such files below it, in order of path; or a `datasets` `save_to_disk` folder | as above |
| `name[:config[:split]]` | a Hugging Face dataset, streamed (split `train` if not said) | field, or name |

Which files of a directory are read and which are skipped (`analysis.text.corpus_files`) is logged once. Records whose
text is null are left out, counted, and logged. A byte-order mark at the start of a file is not part of its text.

`analysis.text.encoded_corpus` also reads what `experiments/prepare_datasets.py` has tokenized.

A WikiText article starts at a line ` = Title = `. A plain text file without separators is one document on
purpose: its paragraphs are not independent of each other, and a confidence bound over documents would be
wrong if it took them to be.
"""

import functools
import hashlib
import json
import logging
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from analysis.text.corpus_files import PACKED, SUFFIXES, begins_list, files_below, first_line, kind_of, opened, stem_of
from varjax.errors import InputError

END_OF_DOCUMENT = "<|endofdoc|>"

SPLITS = {"train": 0.80, "tune": 0.04, "calibrate": 0.08, "test": 0.08}
"""Share of each split. `train` holds what the reference model learned from and what statistics and tables are
built from (`build` is another name for it); `tune` chooses settings, `calibrate` certifies them, `test`
reports."""

_MISSING = object()
_TITLE = re.compile(r"^ ?= (?!=).*(?<!=) = ?$", re.MULTILINE)  # " = Title = ", not " = = Section = = "
_MARK = "\ufeff"  # byte-order mark; where files were put together it stands before lines as well
_SEPARATOR = re.compile(rf"^{_MARK}?{re.escape(END_OF_DOCUMENT)}\s*$", re.MULTILINE)
_REMEMBERED = 1 << 20  # documents, some 150 MB of their ids
_HASH_DIGITS = 12  # of 64; the *last* ones choose the split, so that sorting by id does not sort by split

Row = tuple[str, str]  # text, group
Record = tuple[str | None, str]  # the same; None where the text is null

logger = logging.getLogger(__name__)


class CorpusError(InputError):
    """A corpus cannot be read: says which file (and line or field) is at fault and what to do about it."""


@dataclass(frozen=True)
class Document:
    """One whole text."""

    text: str
    group: str  # the domain it belongs to: a package, a file, a subset of a dataset
    id: str = field(init=False)  # 64 hexadecimal digits, SHA-256 of the text's UTF-8

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest())

    @property
    def split(self) -> str:
        """The split that the text belongs to, by its hash."""
        return split_of(self.id)


def split_of(document_id: str) -> str:
    """The split of the document with this id."""
    place = int(document_id[-_HASH_DIGITS:], 16) / 16**_HASH_DIGITS  # uniform in [0, 1)
    for name, share in SPLITS.items():
        place -= share
        if place < 0:
            return name
    return name  # the shares' rounding error


def known_split(split: str | None) -> str | None:
    """The name under which `SPLITS` has a split; None is every document. Raises CorpusError for any other."""
    wanted = "train" if split == "build" else split
    if wanted is not None and wanted not in SPLITS:
        raise CorpusError(f"split {split!r} is not known; choose one of build, {', '.join(SPLITS)} or None")
    return wanted


def load_documents(
    dataset: str | Path,
    *,
    split: str | None = None,
    limit: int | None = None,
    text_column: str = "text",
) -> list[Document]:
    """The documents of a dataset (see the module's table), as a list; `iter_documents` gives them one by one.

    Args:
      dataset: `embedded`, a file, a directory or a Hugging Face dataset `name[:config[:split]]`.
      split: one of `SPLITS`, or `build`, the same as `train`; None takes every document.
      limit: at most so many documents, the first ones. The embedded corpus comes in hash order, so that a
        limit is a random sample over its packages; every other corpus keeps its own order.
      text_column: the field that holds the text in JSONL, Parquet and Hugging Face data.

    Raises:
      CorpusError: nothing is found there, something in it cannot be read, or no document is left.
    """
    return list(iter_documents(dataset, split=split, limit=limit, text_column=text_column))


def iter_documents(
    dataset: str | Path,
    *,
    split: str | None = None,
    limit: int | None = None,
    text_column: str = "text",
) -> Iterator[Document]:
    """`load_documents`, lazily: for corpora larger than memory.

    A text that occurs twice is given once, if fewer than a million others stand between.
    """
    wanted = known_split(split)
    check_limit(limit)
    check_dataset(dataset)
    found = absent = 0

    def documents() -> Iterator[Document]:
        nonlocal absent
        for text, group in _rows(dataset, text_column):
            if text is None:
                absent += 1
            else:
                yield Document(text, group)

    fitting = (one for one in _distinct(documents()) if one.text.strip() and wanted in (None, one.split))
    try:
        for document in islice(fitting, limit):
            found += 1
            yield document
    finally:
        if found and absent:
            _say(f"{dataset}: records left out because their field {text_column!r} is null: {absent:,}")
    if not found:
        where = f"in its {wanted} split " if wanted else ""
        nulls = f"; in {absent:,} records the field {text_column!r} is null: is it the text (--text_column)?"
        raise CorpusError(
            f"{dataset}: no document {where}that is not empty; give a larger corpus or another split (in a text "
            f"file, a line {END_OF_DOCUMENT} separates documents){nulls if absent else ''}"
        )


class CorpusHash:
    """SHA-256 over the ids of documents, one a line, in the order in which they are read."""

    def __init__(self) -> None:
        self._digest, self._between = hashlib.sha256(), b""

    def add(self, document_id: str) -> None:
        self._digest.update(self._between + document_id.encode())
        self._between = b"\n"

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def corpus_hash(document_ids: Iterable[str]) -> str:
    """`CorpusHash` of the ids of all documents."""
    digest = CorpusHash()
    for one in document_ids:
        digest.add(one)
    return digest.hexdigest()


def check_limit(limit: int | None) -> None:
    """Raise CorpusError for a number of documents that cannot be."""
    if limit is not None and limit < 1:
        raise CorpusError(f"limit must be at least 1 or None for all documents, not {limit}")


def check_dataset(dataset: str | Path) -> None:
    """Raise CorpusError for a name that says nothing, which would otherwise be the working directory."""
    if not str(dataset).strip():
        raise CorpusError(
            f"the dataset is {str(dataset)!r}; give 'embedded', a file, a directory ('.' is this one) or the name of a "
            "Hugging Face dataset (--dataset)"
        )


@functools.cache
def _say(message: str) -> None:
    """Log a message once per process: a corpus is read several times."""
    logger.warning(message)


def _rows(dataset: str | Path, text_column: str) -> Iterator[Record]:
    if dataset == "embedded":
        from analysis.text import embedded

        return embedded.rows()
    path = Path(dataset).expanduser()
    if path.is_dir():
        return _directory_rows(path, text_column)
    if path.is_file() or kind_of(path) or str(dataset).startswith((".", "/", "~")):
        return read_rows(path, text_column)
    return _hub_rows(str(dataset), text_column)


def _distinct(documents: Iterable[Document]) -> Iterator[Document]:
    """Without those that stood among the last million before them: memory stays bounded in a stream of any length."""
    seen: OrderedDict[str, None] = OrderedDict()  # the oldest first
    for document in documents:
        if document.id not in seen:
            seen[document.id] = None
            if len(seen) > _REMEMBERED:
                seen.popitem(last=False)
            yield document


def read_rows(path: Path, text_column: str = "text") -> Iterator[Record]:
    """(text, group) of every document in one file, compressed or not."""
    if not path.is_file():
        raise CorpusError(f"{path}: no such file; check the path (a Hugging Face dataset is named owner/name)")
    readers = {".txt": _text_rows, ".jsonl": _jsonl_rows, ".json": _json_rows, ".parquet": _parquet_rows}
    kind = kind_of(path)
    if kind is None:
        raise CorpusError(
            f"{path}: a corpus file ends in {', '.join(SUFFIXES)}, or in one of these and {' or '.join(PACKED)}; "
            "convert it to one of these"
        )
    return _with_named_faults(readers[kind](path, text_column), path)


def _with_named_faults(rows: Iterator[Record], path: Path) -> Iterator[Record]:
    """The rows; what the operating system or an unpacker says is wrong comes with the file's name."""
    try:
        yield from rows
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read to its end ({error}); restore the file or remove it") from error


def _directory_rows(path: Path, text_column: str) -> Iterator[Record]:
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        yield from _saved_rows(path, text_column)
        return
    listing = files_below(path, text_column)
    if not listing.read:
        prepared = sorted(str(manifest.parent) for manifest in path.glob("*/manifest.json"))
        fix = f"or give one of the prepared folders in it: {', '.join(prepared)}" if prepared else "add one"
        raise CorpusError(
            f"{path}: the directory holds no file to read, compressed or not, that ends in {', '.join(SUFFIXES)} "
            f"({listing.said()}); {fix}"
        )
    _say(f"{path}: {listing.said()}")
    for file in listing.read:
        yield from read_rows(file, text_column)


def _text_rows(path: Path, text_column: str) -> Iterator[Record]:
    with opened(path) as file:
        contents = file.read()
    try:
        text = contents.decode("utf-8").removeprefix(_MARK)
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path}: not UTF-8 at byte {error.start}; convert the file to UTF-8") from error
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    parts = _SEPARATOR.split(text) if _SEPARATOR.search(text) else _articles(text)
    for part in parts:
        yield part.strip("\n"), stem_of(path)


def _articles(text: str) -> list[str]:
    """A WikiText file cut before each top-level title; any other text whole."""
    cuts = [0, *(match.start() for match in _TITLE.finditer(text)), len(text)]
    return [text[start:end] for start, end in pairwise(cuts)]


def _jsonl_rows(path: Path, text_column: str) -> Iterator[Record]:
    with opened(path) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except ValueError as error:  # malformed JSON, or not UTF-8
                raise CorpusError(f"{where}: not a JSON object ({error}); fix or remove the line") from error
            yield _row(_object(record, text_column, where), text_column, where, stem_of(path))


def _json_rows(path: Path, text_column: str) -> Iterator[Record]:
    """The records of a list; of any other file those of its lines."""
    if not begins_list(first_line(path)):
        yield from _jsonl_rows(path, text_column)
        return
    with opened(path) as file:
        contents = file.read()
    try:
        records = json.loads(contents)
    except ValueError as error:
        raise CorpusError(f"{path}: not a JSON list ({error}); fix the file") from error
    for number, record in enumerate(records):
        where = f"{path}, record {number}"
        yield _row(_object(record, text_column, where), text_column, where, stem_of(path))


def _object(record: Any, text_column: str, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise CorpusError(f'{where}: expected an object such as {{"{text_column}": "..."}}')
    return record


def _parquet_rows(path: Path, text_column: str) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    packed = path.suffix.lower() in PACKED
    try:
        with pq.ParquetFile(pa.BufferReader(opened(path).read()) if packed else path) as file:
            names = file.schema_arrow.names
            if text_column not in names:
                raise CorpusError(
                    f"{path}: no column {text_column!r} among {', '.join(names)}; name it (--text_column)"
                )
            columns = [text_column, *({"group"} & set(names))]
            for batch in file.iter_batches(columns=columns):
                for record in batch.to_pylist():
                    yield _row(record, text_column, str(path), stem_of(path))
    except (pa.ArrowException, OSError) as error:
        raise CorpusError(f"{path}: not a readable Parquet file ({error}); write it again") from error


def _saved_rows(path: Path, text_column: str) -> Iterator[Record]:
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:
        raise CorpusError(f"{path}: not a readable `save_to_disk` dataset ({error}); save it again") from error
    parts = saved.values() if isinstance(saved, datasets.DatasetDict) else [saved]
    for part in parts:
        for number, record in enumerate(part):
            yield _row(record, text_column, f"{path}, row {number}", path.name)


def _hub_rows(dataset: str, text_column: str) -> Iterator[Record]:
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
    records = enumerate(_unbroken(stream, dataset))
    rows = (_row(record, text_column, f"{dataset}, row {number}", name) for number, record in records)
    return _joined_articles(rows) if "wikitext" in name.lower() else rows


def _unbroken(stream: Iterable[dict[str, Any]], dataset: str) -> Iterator[dict[str, Any]]:
    """The records; a stream that breaks off ends in a CorpusError."""
    read = 0
    try:
        for record in stream:
            yield record
            read += 1
    except Exception as error:  # the library raises many kinds, network faults among them
        raise CorpusError(
            f"{dataset}: reading stopped after {read:,} rows ({type(error).__name__}: {error}); "
            "check the network and run this again"
        ) from error


def _joined_articles(rows: Iterable[Record]) -> Iterator[Record]:
    """WikiText on the hub holds one *line* a row: joined again into articles."""
    lines: list[str] = []
    group = ""
    for line, group in rows:
        if line is None:
            yield None, group
            continue
        if lines and _TITLE.match(line.rstrip("\n")):
            yield "".join(lines), group
            lines = []
        lines.append(line if line.endswith("\n") else line + "\n")
    if lines:
        yield "".join(lines), group


def _row(record: dict[str, Any], text_column: str, where: str, group: str) -> Record:
    text = record.get(text_column, _MISSING)
    if text is None or text != text:  # pandas writes null texts as NaN
        return None, group
    if not isinstance(text, str):
        fault = f"is {type(text).__name__}, not text" if text_column in record else "is missing"
        raise CorpusError(
            f"{where}: the field {text_column!r} {fault} (fields: {', '.join(map(str, record))}); "
            "name the field that holds the text (--text_column)"
        )
    meta = record.get("meta")
    subset = meta.get("redpajama_set_name") if isinstance(meta, dict) else None
    return text, str(record.get("group") or subset or group)

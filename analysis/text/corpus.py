"""Documents and their division into splits that no run can mix up.

A document is one whole text. Its id is the SHA-256 of that text, and its split follows from the id alone: the same text
lands in the same split on every machine, in every order and whatever else the corpus contains. `analysis.text.sources`
lists the datasets that can be read; `analysis.text.encoded_corpus` also reads those that
`experiments/prepare_datasets.py` has tokenized.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from analysis.text.embedded import text_hash
from analysis.text.sources import END_OF_DOCUMENT, CorpusError, log_once, records

SPLITS = {"train": 0.80, "tune": 0.04, "calibrate": 0.08, "test": 0.08}
"""Share of each split. `train` (alias `build`) holds the training text of the reference model and the source of
statistics and tables; `tune` chooses settings, `calibrate` certifies them, `test` reports."""

_REMEMBERED = 1 << 20  # documents whose ids are kept to find repeats, about 150 MB
_HASH_DIGITS = 12  # of 64; the *last* ones choose the split, so that sorting by id does not sort by split


@dataclass(frozen=True)
class Document:
    """One whole text."""

    text: str
    group: str  # the domain it belongs to: a package, a file, a subset of a dataset
    id: str = field(init=False)  # SHA-256 of the text's UTF-8, 64 hexadecimal digits

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", text_hash(self.text))

    @property
    def split(self) -> str:
        """The split that the text belongs to, by its hash."""
        return split_of(self.id)


def split_of(document_id: str) -> str:
    """Find the split of a document.

    Args:
        document_id: its id.

    Returns:
        A key of `SPLITS`.
    """
    place = int(document_id[-_HASH_DIGITS:], 16) / 16**_HASH_DIGITS  # uniform in [0, 1)
    for name, share in SPLITS.items():
        place -= share
        if place < 0:
            return name
    return name  # the shares' rounding error


def check_request(dataset: str | Path, split: str | None = None, limit: int | None = None) -> str | None:
    """Check the arguments of `iter_documents` before anything is read.

    Args:
        dataset, split, limit: see `iter_documents`. An empty name would otherwise mean the working directory.

    Returns:
        The key of `SPLITS` that `split` names; None: every document.

    Raises:
        CorpusError: an empty name, an unknown split, or a limit below 1.
    """
    if not str(dataset).strip():
        raise CorpusError(
            f"the dataset is {str(dataset)!r}; give 'embedded', a file, a directory ('.' is this one) or the name of a "
            "Hugging Face dataset (--dataset)"
        )
    wanted = "train" if split == "build" else split
    if wanted is not None and wanted not in SPLITS:
        raise CorpusError(f"split {split!r} is not known; choose one of build, {', '.join(SPLITS)} or None")
    if limit is not None and limit < 1:
        raise CorpusError(f"limit must be at least 1 or None for all documents, not {limit}")
    return wanted


def load_documents(
    dataset: str | Path, *, split: str | None = None, limit: int | None = None, text_column: str = "text"
) -> list[Document]:
    """Read all documents of a dataset. `iter_documents` reads them one by one.

    Args:
        dataset, split, limit, text_column: see `iter_documents`.

    Returns:
        The documents.

    Raises:
        CorpusError: as `iter_documents`.
    """
    return list(iter_documents(dataset, split=split, limit=limit, text_column=text_column))


def iter_documents(
    dataset: str | Path, *, split: str | None = None, limit: int | None = None, text_column: str = "text"
) -> Iterator[Document]:
    """Read the documents of a dataset one by one, for corpora larger than memory.

    Empty texts are left out, and so are texts that occurred among the last million before. Records whose text is null
    are left out, counted, and logged.

    Args:
        dataset: `embedded`, a file, a directory or a Hugging Face dataset `name[:config[:split]]`; see
            `analysis.text.sources`.
        split: one of `SPLITS`, or `build`, the same as `train`; None: every document.
        limit: number of documents at most, the first ones. The embedded corpus comes in hash order, so that a limit
            is a random sample over its packages; every other corpus keeps its own order.
        text_column: field that holds the text in JSON, Parquet and Hugging Face data.

    Yields:
        The documents.

    Raises:
        CorpusError: nothing is found there, something in it cannot be read, or no document is left.
    """
    wanted = check_request(dataset, split, limit)
    found = nulls = 0

    def fitting() -> Iterator[Document]:
        nonlocal nulls
        seen: OrderedDict[str, None] = OrderedDict()  # the oldest first; bounded, as a stream may have any length
        for text, group in records(dataset, text_column):
            if text is None:
                nulls += 1
                continue
            document = Document(text, group)
            if document.id in seen:
                continue
            seen[document.id] = None
            if len(seen) > _REMEMBERED:
                seen.popitem(last=False)
            if text.strip() and wanted in (None, document.split):
                yield document

    try:
        for document in islice(fitting(), limit):
            found += 1
            yield document
    finally:
        if found and nulls:
            log_once(f"{dataset}: records left out because their field {text_column!r} is null: {nulls:,}")
    if not found:
        where = f"in its {wanted} split " if wanted else ""
        hint = f"; in {nulls:,} records the field {text_column!r} is null: is it the text (--text_column)?"
        raise CorpusError(
            f"{dataset}: no document {where}that is not empty; give a larger corpus or another split (in a text "
            f"file, a line {END_OF_DOCUMENT} separates documents){hint if nulls else ''}"
        )


def corpus_hash(document_ids: Iterable[str]) -> str:
    """Hash a corpus.

    Args:
        document_ids: ids of its documents in their order.

    Returns:
        SHA-256 of the ids, one per line.
    """
    digest = hashlib.sha256()
    for number, one in enumerate(document_ids):
        digest.update(b"\n" * bool(number) + one.encode())
    return digest.hexdigest()

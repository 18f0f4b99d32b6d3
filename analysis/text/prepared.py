"""A tokenized corpus on disk: made once, then read by every run without a tokenizer's work, memory-mapped.

A prepared folder, version 1, holds:

- `shard-00000.arrow`, ...: Arrow IPC streams, uncompressed, one row per document, with the fields of `Encoded`: `id`
  string, `group` string, `ids` list of int32, `words` int64, `bytes` int64. `datasets.Dataset.from_file` reads them as
  well.
- `manifest.json`: `Manifest` with a checksum (`varjax.checksums`), written last. It has the SHA-256 of every shard.

The folder appears under its name when all of it is written, never before. What was asked for (`Request`) and the
tokenizer's hash are in the manifest, so that another request or another tokenizer is noticed.
`analysis.text.preparation` makes it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import operator
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import pyarrow as pa

from analysis.text.corpus import CorpusError
from analysis.text.drawn import Drawn
from analysis.text.encoding import Encoded
from varjax import checksums
from varjax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = 1
MANIFEST = "manifest.json"
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("group", pa.string()),
        ("ids", pa.list_(pa.int32())),
        ("words", pa.int64()),
        ("bytes", pa.int64()),
    ]
)


@dataclasses.dataclass(frozen=True)
class Request:
    """What a folder was asked to hold."""

    dataset: str  # as `analysis.text.corpus.iter_documents` takes it
    split: str | None = None  # None: every document
    num_samples: int | None = None  # documents at most
    max_tokens: int | None = None  # no document is begun after so many tokens
    text_column: str = "text"  # of JSONL, Parquet and hub datasets


@dataclasses.dataclass(frozen=True)
class Shard:
    """One Arrow file."""

    name: str
    documents: int
    size: int  # bytes
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a prepared folder holds and where it comes from."""

    request: Request
    tokenizer: str  # `tokenizer_hash`
    corpus: str  # `analysis.text.corpus.CorpusHash` of the documents inside
    documents: int
    left_out: int  # documents without two tokens: nothing to predict
    tokens: int
    words: int
    bytes: int  # of the texts in UTF-8
    min_length: int  # tokens of the shortest document
    max_length: int  # tokens of the longest
    max_id: int  # the largest token id; a model's vocabulary must be larger
    shards: tuple[Shard, ...]
    provenance: dict[str, Any]
    drawn: Drawn | None = None  # how these documents came out of the dataset; None: an older folder, not recorded
    version: int = VERSION

    def answers(self, request: Request, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether the folder holds what is asked for, in this tokenizer's ids."""
        return (self.request, self.tokenizer) == (request, tokenizer_hash(tokenizer))


class Prepared(Sequence[Encoded]):
    """The documents of a prepared folder. Each is read from the disk when it is asked for; its ids are read-only."""

    def __init__(self, folder: Path, manifest: Manifest, table: pa.Table):
        self.folder = folder
        self.manifest = manifest
        self._columns = {name: table.column(name) for name in SCHEMA.names}

    def __len__(self) -> int:
        return self.manifest.documents

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> list[Encoded]: ...
    def __getitem__(self, index: int | slice) -> Encoded | list[Encoded]:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        row = operator.index(index)
        if not -len(self) <= row < len(self):
            raise IndexError(f"document {index} of {len(self)} in {self.folder}")
        fields = {name: column[row % len(self)] for name, column in self._columns.items()}
        ids = fields.pop("ids").values.to_numpy(zero_copy_only=True)
        return Encoded(ids=ids, **{name: value.as_py() for name, value in fields.items()})


def is_prepared(folder: str | Path) -> bool:
    """Whether a complete prepared corpus is there; `open_prepared` says whether it is sound."""
    return (Path(folder) / MANIFEST).is_file() and any(Path(folder).glob("shard-*.arrow"))


def open_prepared(
    folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None, *, check_hashes: bool = True
) -> Prepared:
    """The documents of a prepared folder, memory-mapped.

    Args:
        tokenizer: the one that the ids must come from; None: any.
        check_hashes: compare every shard's SHA-256, which reads it once in a process, about 1.5 GB a second; False:
            opening reads some kilobytes.

    Raises:
        CorpusError: no prepared corpus, a damaged one, or one of another tokenizer.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    for shard in manifest.shards:
        path = folder / shard.name
        size = path.stat().st_size if path.is_file() else None
        if size != shard.size:
            found = "is missing" if size is None else f"has {size:,} bytes"
            raise CorpusError(f"{path} {found}, its manifest says {shard.size:,}; restore it or prepare it again")
        if check_hashes and checksums.digest_of_file(path) != shard.sha256:
            raise CorpusError(f"{path}: its contents have changed since it was written; restore it or prepare it again")
    table = read_table(folder, manifest.shards)
    if table.num_rows != manifest.documents:
        raise CorpusError(f"{folder}: holds {table.num_rows} documents, its manifest says {manifest.documents}")
    if tokenizer is not None and tokenizer_hash(tokenizer) != manifest.tokenizer:
        raise CorpusError(
            f"{folder}: was prepared with another tokenizer than this model's (SHA-256 {manifest.tokenizer[:12]}…, "
            f"here {tokenizer_hash(tokenizer)[:12]}…); prepare the dataset again with this model (--model)"
        )
    return Prepared(folder, manifest, table)


def read_manifest(folder: str | Path) -> Manifest:
    """What a prepared folder says of itself.

    Raises:
        CorpusError: there is no manifest, another version's, or a damaged one.
    """
    path = Path(folder) / MANIFEST
    try:
        fields = checksums.read_json(path, "restore it or prepare the dataset again", error=CorpusError)
        version = fields["version"]
    except FileNotFoundError:
        raise CorpusError(
            f"{folder}: no {MANIFEST}, so no prepared corpus; make one with experiments/prepare_datasets.py"
        ) from None
    except KeyError as error:
        raise CorpusError(f"{path} is damaged ({error!r}); restore it or prepare the dataset again") from None
    if version != VERSION:
        raise CorpusError(f"{path} is of version {version}, this varjax reads {VERSION}; prepare the dataset again")
    try:
        request, shards = Request(**fields["request"]), tuple(Shard(**shard) for shard in fields["shards"])
        return Manifest(**fields | {"request": request, "shards": shards, "drawn": Drawn.of(fields)})
    except (KeyError, TypeError, InputError) as error:
        raise CorpusError(f"{path} is damaged ({error!r}); restore it or prepare the dataset again") from None


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of a fast tokenizer's serialized form, padding and truncation (which calls change) left out."""
    fields = json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
    return hashlib.sha256(json.dumps(fields, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def read_table(folder: Path, shards: Iterable[Shard]) -> pa.Table:
    """The rows of all shards, left on the disk."""
    tables = [SCHEMA.empty_table()]
    for shard in shards:
        path = folder / shard.name
        try:
            with pa.memory_map(str(path)) as file:
                table = pa.ipc.open_stream(file).read_all()
            table.validate()
        except (pa.ArrowException, OSError) as error:
            raise CorpusError(f"{path}: not a readable shard ({error}); restore it or prepare it again") from error
        if table.schema != SCHEMA:
            raise CorpusError(f"{path}: has other columns than a shard; restore it or prepare it again")
        tables.append(table)
    return pa.concat_tables(tables)

"""A tokenized corpus on disk: made once, then read memory-mapped by every run, without a tokenizer.

A prepared folder, version 1, holds:

- `shard-00000.arrow`: an uncompressed Arrow IPC stream with one row per document and the fields of `Encoded`: `id`
  string, `group` string, `ids` list of int32, `words` int64, `bytes` int64. `datasets.Dataset.from_file` reads it too.
- `manifest.json`: `Manifest` with a checksum (`varjax.checksums`), written last. It lists the shards with their
  SHA-256; folders with several shards are read as well.

The folder appears under its name when all of it is written, never before. The request and the tokenizer's hash are in
the manifest, so that another request or another tokenizer is noticed. (`Dataset.save_to_disk` would write every corpus
twice, first to its cache, and keeps no checksums.)
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from analysis.report.provenance import provenance, write_json
from analysis.text.corpus import Document, corpus_hash
from analysis.text.encoding import Drawn, Encoded, grouped, tokenized
from analysis.text.sources import CorpusError
from varjax import checksums
from varjax.errors import InputError
from varjax.progress import progress_bar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = 1
MANIFEST = "manifest.json"
_SHARD = "shard-00000.arrow"
_BATCH_TOKENS = 1 << 18  # one record batch: 1 MiB of ids
_SCHEMA = pa.schema(
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

    dataset: str  # as in `analysis.text.corpus.iter_documents`
    split: str | None = None  # None: every document
    num_samples: int | None = None  # documents at most
    max_tokens: int | None = None  # no document is started after this many tokens
    text_column: str = "text"  # of JSON, Parquet and hub datasets


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
    corpus: str  # `analysis.text.corpus.corpus_hash` of the documents
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


@dataclasses.dataclass(frozen=True)
class Prepared:
    """The documents of a prepared folder, read from the disk while they are iterated; their ids are read-only."""

    manifest: Manifest
    table: pa.Table

    def __len__(self) -> int:
        return self.manifest.documents

    def __iter__(self) -> Iterator[Encoded]:
        for batch in self.table.to_batches():
            columns = dict(zip(batch.schema.names, batch.columns, strict=True))
            ids = columns.pop("ids")
            starts, values = ids.offsets.to_numpy(), ids.values.to_numpy(zero_copy_only=True)
            rest = (column.to_pylist() for column in columns.values())
            for start, end, *fields in zip(starts, starts[1:], *rest, strict=False):
                yield Encoded(ids=values[start:end], **dict(zip(columns, fields, strict=True)))


def prepare(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    request: Request,
    *,
    overwrite: bool = False,
    progress: bool = True,
) -> Manifest:
    """Tokenize documents into a prepared folder, all of it or nothing, in bounded memory.

    Documents without two tokens are left out. A folder that an interrupted call left unfinished is replaced.

    Args:
        documents: what `request` names, at most `request.num_samples` of them; read once.
        tokenizer: a fast one.
        folder: the folder to make.
        request: what the manifest says about the documents.
        overwrite: replace an existing prepared corpus once the new one is complete.
        progress: show a bar on standard error.

    Returns:
        The manifest.

    Raises:
        CorpusError: the documents cannot be read to their end, none holds two tokens, or the folder cannot be
            written or holds something else.
    """
    if request.max_tokens is not None and request.max_tokens < 1:
        raise CorpusError(f"max_tokens must be at least 1 or None for all tokens, not {request.max_tokens}")
    target = Path(folder).resolve()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        if not is_prepared(target):
            raise CorpusError(f"{target} exists and holds no prepared corpus; choose another folder or remove it")
        if not overwrite:
            raise CorpusError(f"{target} holds a prepared corpus; choose another folder or say that it be overwritten")
    source = iter(documents)
    first = list(islice(source, 1))  # a dataset that cannot be reached leaves no trace on the disk
    counts = Counter[str]()
    try:
        with _appearing(target) as temporary:
            path = temporary / _SHARD
            with (
                progress_bar(total=request.max_tokens, unit="token", unit_scale=True, show=progress) as bar,
                pa.OSFile(str(path), "wb") as file,
                pa.ipc.new_stream(file, _SCHEMA) as stream,
            ):
                kept = _kept(tokenized(chain(first, source), tokenizer), request.max_tokens, counts, bar)
                for part in grouped(kept, lambda one: len(one.ids), _BATCH_TOKENS):
                    stream.write_batch(_record_batch(part))
            if not counts["tokens"]:
                raise CorpusError(
                    f"{request.dataset}: none of the {counts['left out']} documents holds two tokens; "
                    "choose another dataset, split or number of samples"
                )
            table = _mapped(path)
            read = table.num_rows + counts["left out"]
            drawn = Drawn.begin(request.dataset).after(
                read,
                table.num_rows,
                {"documents": (request.num_samples, read), "tokens": (request.max_tokens, counts["tokens"])},
            )
            shard = Shard(path.name, table.num_rows, path.stat().st_size, checksums.digest_of_file(path))
            manifest = Manifest(
                request=request,
                tokenizer=tokenizer_hash(tokenizer),
                left_out=counts["left out"],
                shards=(shard,),
                provenance=provenance(),
                drawn=drawn,
                **_totals(table),
            )
            write_json(temporary / MANIFEST, manifest)
    except OSError as error:
        raise CorpusError(f"{folder}: cannot be written ({error}); free some space or choose another folder") from error
    return manifest


def is_prepared(folder: str | Path) -> bool:
    """Check whether a complete prepared corpus exists; `open_prepared` checks whether it is sound.

    Args:
        folder: any path.

    Returns:
        True if it has a manifest and a shard.
    """
    return (Path(folder) / MANIFEST).is_file() and any(Path(folder).glob("shard-*.arrow"))


def open_prepared(
    folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None, *, check_hashes: bool = True
) -> Prepared:
    """Open a prepared folder, memory-mapped.

    Args:
        folder: the folder.
        tokenizer: the one that the ids must come from; None: any.
        check_hashes: compare every shard's SHA-256, which reads it once per process at about 1.5 GB/s.

    Returns:
        The documents.

    Raises:
        CorpusError: no prepared corpus, a damaged one, or one of another tokenizer.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    tables = [_SCHEMA.empty_table()]
    for shard in manifest.shards:
        path = folder / shard.name
        size = path.stat().st_size if path.is_file() else None
        if size != shard.size:
            found = "is missing" if size is None else f"has {size:,} bytes"
            raise CorpusError(f"{path} {found}, its manifest says {shard.size:,}; restore it or prepare it again")
        if check_hashes and checksums.digest_of_file(path) != shard.sha256:
            raise CorpusError(f"{path}: its contents have changed since it was written; restore it or prepare it again")
        tables.append(_mapped(path))
    table = pa.concat_tables(tables)
    if table.num_rows != manifest.documents:
        raise CorpusError(f"{folder}: holds {table.num_rows} documents, its manifest says {manifest.documents}")
    if tokenizer is not None and tokenizer_hash(tokenizer) != manifest.tokenizer:
        raise CorpusError(
            f"{folder}: was prepared with another tokenizer than this model's (SHA-256 {manifest.tokenizer[:12]}…, "
            f"here {tokenizer_hash(tokenizer)[:12]}…); prepare the dataset again with this model (--model)"
        )
    return Prepared(manifest, table)


def read_manifest(folder: str | Path) -> Manifest:
    """Read what a prepared folder says about itself.

    Args:
        folder: the folder.

    Returns:
        The manifest.

    Raises:
        CorpusError: there is no manifest, it has another version, or it is damaged.
    """
    path = Path(folder) / MANIFEST
    fix = "restore it or prepare the dataset again"
    try:
        fields = checksums.read_json(path, fix, error=CorpusError)
    except FileNotFoundError:
        raise CorpusError(
            f"{folder}: no {MANIFEST}, so no prepared corpus; make one with experiments/prepare_datasets.py"
        ) from None
    if fields.get("version", VERSION) != VERSION:
        raise CorpusError(
            f"{path} is of version {fields['version']}, this varjax reads {VERSION}; prepare the dataset again"
        )
    try:
        request, shards = Request(**fields["request"]), tuple(Shard(**shard) for shard in fields["shards"])
        return Manifest(**fields | {"request": request, "shards": shards, "drawn": Drawn.of(fields)})
    except (KeyError, TypeError, InputError) as error:
        raise CorpusError(f"{path} is damaged ({error!r}); {fix}") from None


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash a tokenizer.

    Args:
        tokenizer: a fast one.

    Returns:
        SHA-256 of its serialized form without padding and truncation, which calls change.
    """
    fields = json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
    return hashlib.sha256(json.dumps(fields, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _kept(documents: Iterable[Encoded], max_tokens: int | None, counts: Counter[str], bar: Any) -> Iterator[Encoded]:
    """The documents with two tokens or more, up to the one that reaches `max_tokens`; the others are counted."""
    for document in documents:
        if len(document.ids) < 2:
            counts["left out"] += 1
            continue
        yield document
        bar.update(len(document.ids))
        counts["tokens"] += len(document.ids)
        if max_tokens is not None and counts["tokens"] >= max_tokens:
            return


def _record_batch(part: list[Encoded]) -> pa.RecordBatch:
    offsets = np.cumsum([0, *(len(document.ids) for document in part)]).astype(np.int32)
    ids = pa.ListArray.from_arrays(offsets, np.concatenate([document.ids for document in part]))
    columns = {name: [getattr(document, name) for document in part] for name in _SCHEMA.names if name != "ids"}
    return pa.record_batch(columns | {"ids": ids}, schema=_SCHEMA)


def _totals(table: pa.Table) -> dict[str, Any]:
    """The fields of a manifest that follow from the rows."""
    lengths = pc.list_value_length(table.column("ids"))
    figures = {
        "tokens": pc.sum(lengths),
        "words": pc.sum(table.column("words")),
        "bytes": pc.sum(table.column("bytes")),
        "min_length": pc.min(lengths),
        "max_length": pc.max(lengths),
        "max_id": pc.max(pc.list_flatten(table.column("ids"))),
    }
    ids = (one for batch in table.select(["id"]).to_batches() for one in batch.column(0).to_pylist())
    totals = {name: value.as_py() for name, value in figures.items()}
    return totals | {"documents": table.num_rows, "corpus": corpus_hash(ids)}


def _mapped(path: Path) -> pa.Table:
    """The rows of a shard, left on the disk."""
    try:
        with pa.memory_map(str(path)) as file:
            table = pa.ipc.open_stream(file).read_all()
        table.validate()
    except (pa.ArrowException, OSError) as error:
        raise CorpusError(f"{path}: not a readable shard ({error}); restore it or prepare it again") from error
    if table.schema != _SCHEMA:
        raise CorpusError(f"{path}: has other columns than a shard; restore it or prepare it again")
    return table


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A new folder to fill, which replaces `folder` if the `with` ends well and is removed if it does not."""
    temporary, former = (folder.with_name(f".{folder.name}.{state}") for state in ("unfinished", "former"))
    if former.exists() and not folder.exists():  # a call was killed between the two renamings below
        former.rename(folder)
    for leftover in (temporary, former):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if folder.exists():
            folder.rename(former)
        temporary.rename(folder)
        shutil.rmtree(former, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

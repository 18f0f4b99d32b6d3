"""The making of a prepared corpus (`analysis.text.prepared`): documents in, a whole folder or nothing out."""

from __future__ import annotations

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
from analysis.text.corpus import CorpusError, Document, corpus_hash
from analysis.text.drawn import Cut, Drawn, order_of
from analysis.text.encoding import Encoded, tokenized
from analysis.text.prepared import (
    MANIFEST,
    SCHEMA,
    Manifest,
    Request,
    Shard,
    is_prepared,
    read_table,
    tokenizer_hash,
)
from varjax.checksums import digest_of_file
from varjax.progress import progress_bar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHARD_TOKENS = 1 << 26  # a shard is closed when it holds so many: 256 MiB of ids
_BATCH_TOKENS = 1 << 18  # one record batch: 1 MiB of ids


def prepare(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    request: Request,
    *,
    overwrite: bool = False,
    progress: bool = True,
) -> Manifest:
    """Tokenize documents into a prepared folder, all of it or nothing.

    Documents are read once and leave memory in parts.
    Documents without two tokens are left out. A folder that an interrupted call left unfinished is replaced.

    Args:
        documents: what `request` names, at most `request.num_samples` of them.
        tokenizer: a fast one.
        overwrite: replace a prepared corpus that is there already, once the new one is whole.
        progress: show a bar on standard error.

    Raises:
        CorpusError: the documents cannot be read to their end, none holds two tokens, or the folder cannot be
            written or holds something else.
    """
    if request.max_tokens is not None and request.max_tokens < 1:
        raise CorpusError(f"max_tokens must be at least 1 or None for all tokens, not {request.max_tokens}")
    target = Path(folder).resolve()
    _check_place(target, overwrite)
    source = iter(documents)
    first = list(islice(source, 1))  # a dataset that cannot be reached leaves no trace on the disk
    try:
        with _appearing(target) as temporary:
            counts = Counter[str]()
            with progress_bar(total=request.max_tokens, unit="token", unit_scale=True, show=progress) as bar:
                kept = _kept(tokenized(chain(first, source), tokenizer), request.max_tokens, counts, bar)
                shards = tuple(_write(temporary, kept))
            if not shards:
                raise CorpusError(
                    f"{request.dataset}: none of the {counts['left out']} documents holds two tokens; "
                    "choose another dataset, split or number of samples"
                )
            table = read_table(temporary, shards)
            manifest = Manifest(
                request=request,
                tokenizer=tokenizer_hash(tokenizer),
                corpus=corpus_hash(
                    one for batch in table.select(["id"]).to_batches() for one in batch.column(0).to_pylist()
                ),
                left_out=counts["left out"],
                shards=shards,
                provenance=provenance(),
                drawn=_drawn(request, table.num_rows, counts),
                **_totals(table),
            )
            write_json(temporary / MANIFEST, manifest)
    except OSError as error:
        raise CorpusError(f"{folder}: cannot be written ({error}); free some space or choose another folder") from error
    return manifest


def _kept(documents: Iterable[Encoded], max_tokens: int | None, counts: Counter[str], bar: Any) -> Iterator[Encoded]:
    """The documents with two tokens or more, to the one that reaches `max_tokens`; the others are counted."""
    for document in documents:
        if len(document.ids) < 2:
            counts["left out"] += 1
            continue
        yield document
        bar.update(len(document.ids))
        counts["tokens"] += len(document.ids)
        if max_tokens is not None and counts["tokens"] >= max_tokens:
            return


def _drawn(request: Request, documents: int, counts: Counter[str]) -> Drawn:
    """How the documents that were kept came out of the dataset."""
    read = documents + counts["left out"]
    limits: dict[Cut, tuple[int | None, int]] = {
        "documents": (request.num_samples, read),
        "tokens": (request.max_tokens, counts["tokens"]),
    }
    cut = tuple(name for name, (most, reached) in limits.items() if most is not None and reached >= most)
    return Drawn(order_of(request.dataset), read, counts["left out"], cut)


def _write(folder: Path, documents: Iterator[Encoded]) -> Iterator[Shard]:
    """Write shard after shard, each closed when it is given."""
    batches = _batches(documents)
    for number, first in enumerate(batches):
        path = folder / f"shard-{number:05d}.arrow"
        rows = tokens = 0
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as stream:
            for batch in chain([first], batches):
                stream.write_batch(batch)
                rows += batch.num_rows
                tokens += len(batch.column("ids").values)
                if tokens >= SHARD_TOKENS:
                    break
        yield Shard(path.name, rows, path.stat().st_size, digest_of_file(path))


def _batches(documents: Iterable[Encoded]) -> Iterator[pa.RecordBatch]:
    part: list[Encoded] = []
    tokens = 0
    for document in documents:
        part.append(document)
        tokens += len(document.ids)
        if tokens >= _BATCH_TOKENS:
            yield _record_batch(part)
            part, tokens = [], 0
    if part:
        yield _record_batch(part)


def _record_batch(part: list[Encoded]) -> pa.RecordBatch:
    offsets = np.cumsum([0, *(len(document.ids) for document in part)]).astype(np.int32)
    ids = pa.ListArray.from_arrays(offsets, np.concatenate([document.ids for document in part]))
    columns = {name: [getattr(document, name) for document in part] for name in SCHEMA.names if name != "ids"}
    return pa.record_batch(columns | {"ids": ids}, schema=SCHEMA)


def _totals(table: pa.Table) -> dict[str, int]:
    """The figures of a manifest that follow from the rows."""
    lengths, ids = pc.list_value_length(table.column("ids")), pc.list_flatten(table.column("ids"))
    figures = {
        "tokens": pc.sum(lengths),
        "words": pc.sum(table.column("words")),
        "bytes": pc.sum(table.column("bytes")),
        "min_length": pc.min(lengths),
        "max_length": pc.max(lengths),
        "max_id": pc.max(ids),
    }
    return {"documents": table.num_rows} | {name: value.as_py() for name, value in figures.items()}


def _check_place(folder: Path, overwrite: bool) -> None:
    """Raise unless a prepared corpus may come to be at `folder`."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not is_prepared(folder):
        raise CorpusError(f"{folder} exists and holds no prepared corpus; choose another folder or remove it")
    if not overwrite:
        raise CorpusError(f"{folder} holds a prepared corpus; choose another folder or say that it be overwritten")


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A new folder to fill, that takes `folder`'s place if the `with` ends well and is removed if it does not."""
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

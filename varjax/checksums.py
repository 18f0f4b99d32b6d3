"""Checksums inside the files that varjax writes, so that reading notices damage.

A Parquet or safetensors file has a *seal* among its metadata: the SHA-256 of the whole file with the seal's digits
replaced by zeros. So it covers every byte: data, metadata, and what a reader would never look at. A JSON file has a
field `checksum`, the SHA-256 of the other fields in a canonical form, whatever the indentation.

    _seal(path)                     # a file that was written with SEALED among its metadata
    verify(path, fix)             # False: it has no seal; InputError: it is not what was written
    write_json(path, fields)
    fields = read_json(path, fix)
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from varjax.errors import InputError, Library
from varjax.files import replacing

pa, pq, st = Library("pyarrow"), Library("pyarrow.parquet"), Library("safetensors.numpy")

CHECKSUM = "checksum"  # the field of a JSON file
DAMAGED = "was damaged or edited after it was written: its contents do not match their checksum"

_NAME, _DIGITS = "varjax_seal", 64
_MARK = b"varjax-sha256:"
SEALED = {_NAME: _MARK.decode() + "0" * _DIGITS}  # among the metadata of a file that `seal` is to seal
_BLOCK = 1 << 20  # bytes read at a time


def _seal(path: str | os.PathLike[str]) -> None:
    """Fill in the seal of a file that was written with `SEALED` among its metadata."""
    with open(path, "r+b") as file:
        place = _seal_place(file)
        assert place is not None, f"{path}: no seal to fill in; write checksums.SEALED among the file's metadata"
        digest = _digest(file, place)
        file.seek(place)
        file.write(digest)


def verify(
    path: str | os.PathLike[str], fix: str, *, required: bool = False, error: type[InputError] = InputError
) -> bool:
    """Compare the contents of a file with its seal. It reads the file once, about 1.5 GB a second on one core.

    Args:
        path: a Parquet or safetensors file.
        fix: what to do about a damaged file, the end of the error's sentence.
        required: a file without a seal is damaged, too.
        error: what is raised.

    Returns:
        Whether the file has a seal.

    Raises:
        InputError: as `error`; the file was damaged.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        place = _seal_place(file)
        if place is None:
            if required:
                raise error(f"{path}: its checksum is missing or unreadable, so the file was damaged; {fix}")
            return False
        file.seek(place)
        if file.read(_DIGITS) != _digest(file, place):
            raise error(f"{path}: {DAMAGED}; {fix}")
    return True


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file with a seal.

    Args:
        path: a temporary file (`varjax.files.replacing`).
        tensors: C-contiguous.
        metadata: of the file.
    """
    st.save_file(dict(tensors), path, metadata={**metadata, **SEALED})
    _seal(path)


def _parquet_schema(schema: Any) -> Any:
    """The schema with `SEALED` among its metadata."""
    return schema.with_metadata({**(schema.metadata or {}), _NAME.encode(): SEALED[_NAME].encode()})


@contextmanager
def parquet_writer(path: str | os.PathLike[str], schema: Any) -> Iterator[Any]:
    """A writer of a Parquet file with checksums of its pages, which is sealed at the end.

    Args:
        path: a temporary file (`varjax.files.replacing`).
        schema: of pyarrow.

    Yields:
        A `pyarrow.parquet.ParquetWriter`.
    """
    with pq.ParquetWriter(path, _parquet_schema(schema), compression="zstd", write_page_checksum=True) as writer:
        yield writer
    _seal(path)


def write_parquet(path: str | os.PathLike[str], table: Any) -> None:
    """Write a table as a sealed Parquet file, whole or not at all.

    Args:
        path: replaced if it exists.
        table: of pyarrow.
    """
    with replacing(Path(path)) as temporary, parquet_writer(temporary, table.schema) as writer:
        writer.write_table(table)


def read_parquet(
    path: str | os.PathLike[str], fix: str, *, required: bool = False, columns: list[str] | None = None
) -> Any:
    """Read a Parquet file, after its checksums were verified, if it has any.

    Args:
        path: the file.
        fix: as in `verify`.
        required: as in `verify`.
        columns: those to read; None: all.

    Returns:
        A `pyarrow.Table`.

    Raises:
        InputError: the file was damaged, or is not Parquet.
        OSError: it cannot be opened.
    """
    verify(path, fix, required=required)
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            return file.read(columns)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable Parquet file ({error}); {fix}") from error


def write_json(path: str | os.PathLike[str], fields: Mapping[str, Any]) -> None:
    """Write fields as readable JSON with their checksum, whole or not at all.

    Args:
        path: replaced if it exists.
        fields: what JSON can hold, under names other than `checksum`.
    """
    plain = json.loads(json.dumps(dict(fields), allow_nan=False))
    whole = plain | {CHECKSUM: digest_of(plain)}
    with replacing(Path(path)) as temporary:
        text = json.dumps(whole, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        temporary.write_text(text, encoding="utf-8")


def read_json(
    path: str | os.PathLike[str], fix: str, *, required: bool = True, error: type[InputError] = InputError
) -> dict[str, Any]:
    """The fields of a JSON file without their checksum, which was verified.

    Args:
        path: the file.
        fix: what to do about a damaged file, the end of the error's sentence.
        required: a file without a checksum is damaged, too; False: it may have been written by hand.
        error: what is raised.

    Returns:
        The fields.

    Raises:
        InputError: as `error`; not a JSON object, or the file was damaged.
        OSError: it cannot be read.
    """
    try:
        fields = json.loads(Path(path).read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as problem:  # UnicodeDecodeError and JSONDecodeError among them
        raise error(f"{path}: not valid JSON ({problem}); {fix}") from problem
    if not isinstance(fields, dict):
        raise error(f"{path}: expected a JSON object, got {type(fields).__name__}; {fix}")
    if required and CHECKSUM not in fields:
        raise error(f"{path}: it has no field {CHECKSUM!r}, so it was damaged or is of an older version; {fix}")
    try:
        return without_checksum(fields)
    except InputError as problem:
        raise error(f"{path}: {problem}; {fix}") from problem


def without_checksum(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The other fields of an object from a JSON file.

    Args:
        fields: with a checksum or without.

    Returns:
        The fields without it.

    Raises:
        InputError: the checksum does not match.
    """
    rest = {name: value for name, value in fields.items() if name != CHECKSUM}
    if CHECKSUM in fields and fields[CHECKSUM] != digest_of(rest):
        raise InputError(DAMAGED)
    return rest


def digest_of_file(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file, which is read once while its size and time of change stay: answers may be large.

    Args:
        path: the file.

    Returns:
        Hexadecimal digits.
    """
    found = os.stat(path)
    return _digest_of_file(os.path.abspath(path), found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=256)
def _digest_of_file(path: str, size: int, modified: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(fields: Any) -> str:
    """The SHA-256 of fields, whatever the order of their keys.

    Args:
        fields: what JSON can hold.

    Returns:
        Hexadecimal digits.
    """
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _seal_place(file: BinaryIO) -> int | None:
    """Where the seal's digits begin, None where there is no seal: in Parquet's footer or safetensors' header."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if file.read(4) == b"PAR1":
        file.seek(max(size - 8, 0))
        length = int.from_bytes(file.read(4), "little")
        start, end = size - 8 - length, size - 8
    else:
        file.seek(0)
        start, end = 8, 8 + int.from_bytes(file.read(8), "little")
    if not 0 <= start <= end <= size:  # no such file, or one whose lengths are damaged
        return None
    file.seek(start)
    metadata = file.read(end - start)
    first = metadata.find(_MARK)
    if first < 0 or metadata.find(_MARK, first + 1) >= 0:
        return None
    place = start + first + len(_MARK)
    return place if place + _DIGITS <= end else None


def _digest(file: BinaryIO, place: int) -> bytes:
    """The seal's digits: SHA-256 of the file with zeros in their place."""
    digest = hashlib.sha256()
    file.seek(0)
    left = place
    while left:
        block = file.read(min(left, _BLOCK))
        if not block:
            break
        digest.update(block)
        left -= len(block)
    digest.update(b"0" * _DIGITS)
    file.seek(place + _DIGITS)
    while block := file.read(_BLOCK):
        digest.update(block)
    return digest.hexdigest().encode()

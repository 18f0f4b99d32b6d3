"""The check that a model directory is whole: files, tensors, index, tokenizer. No network is needed.

A directory that `models.download` made holds in `varjax_download.json` what the hub said of its files; their contents
are then compared with that too.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.config import MoEConfig, read_config
from models.fields import Kind, read_object, shown, wrong_types
from models.generation_config import read_generation
from models.tokenizer import load_tokenizer
from models.weights import INDEX_FILE, CheckpointError, check_counts, ledger, locate_tensors, tensor_files
from varjax import checksums
from varjax.errors import InputError
from varjax.progress import progress_bar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RECORD = "varjax_download.json"
_BLOCK = 1 << 22  # bytes hashed at once
_DIGEST = Kind("a digest", lambda value: isinstance(value, str)).or_null()
_RECORDED = {
    "name": Kind(
        "a file name", lambda value: isinstance(value, str) and value == Path(value).name and value.isprintable()
    ),
    "size": Kind("a number of bytes", lambda value: type(value) is int and value >= 0),
    "sha256": _DIGEST,
    "git_sha1": _DIGEST,
}


@dataclasses.dataclass(frozen=True)
class RemoteFile:
    """One file as the hub describes it."""

    name: str
    size: int  # bytes
    sha256: str | None = None  # of files in large storage, hexadecimal
    git_sha1: str | None = None  # of the others: SHA-1 of `blob SIZE\\0` and the contents


@dataclasses.dataclass(frozen=True)
class Verified:
    """What `verify` found in a directory that is whole."""

    directory: Path
    files: int  # that hold weights
    tensors: int
    parameters: int
    bytes: int  # of the tensors
    hashed: int  # files whose contents were compared with what the hub says; 0 where that is not known
    tokenizer: int | None  # its entries; None: there is none


def verify(directory: Path, progress: bool = True) -> Verified:
    """Check a model directory without a network.

    Every weight file must be as long as its header says; each tensor of the architecture must be there, once, with its
    shape, in the shard that the index names; the index's total size must be theirs; the tokenizer must open and fit
    the vocabulary. With a record of the hub's (`RECORD`) sizes and contents of all files are compared too.

    Raises:
        ConfigError, CheckpointError, InputError: it is not whole; names every fault of one kind.
    """
    recorded = _read_record(directory)
    if damaged := damage(directory, recorded, progress):
        raise CheckpointError(f"{directory}: {'; '.join(damaged.values())}; delete what is named and download it again")
    return check_structure(directory, hashed=len(recorded))


def _read_record(directory: Path) -> tuple[RemoteFile, ...]:
    """What the hub said of the files in a directory; nothing if it was not fetched by `download`."""
    path = directory / RECORD
    if not path.exists():
        return ()
    files = checksums.read_json(path, "delete it to verify without it", error=CheckpointError).get("files")
    if not isinstance(files, list) or not all(_is_remote(file) for file in files):
        raise CheckpointError(f"{path} is damaged (files is {shown(files)}); delete it to verify without it")
    return tuple(RemoteFile(**file) for file in files)


def _is_remote(file: Any) -> bool:
    """Whether what JSON gives has the fields of a `RemoteFile`, each of its type."""
    named = isinstance(file, dict) and file.keys() == {field.name for field in dataclasses.fields(RemoteFile)}
    return named and not wrong_types(file, _RECORDED)


def damage(directory: Path, files: Sequence[RemoteFile], progress: bool) -> dict[str, str]:
    """Name -> what is wrong, of the files that are not as the hub describes them."""
    faults = {}
    sizes = {file: _size(directory / file.name) for file in files}
    total = sum(file.size for file, size in sizes.items() if size == file.size)
    with progress_bar(total=total, desc="comparing", unit="B", unit_scale=True, show=progress and bool(files)) as bar:
        for file, size in sizes.items():
            if size is None:
                faults[file.name] = f"{file.name} is missing"
            elif size != file.size:
                faults[file.name] = f"{file.name} has {size:,} bytes, the hub says {file.size:,}"
            elif not _same_contents(directory / file.name, file, bar):
                faults[file.name] = f"{file.name} is damaged: its hash is not the hub's"
    return faults


def _same_contents(path: Path, file: RemoteFile, bar: Any) -> bool:
    known = file.sha256 or file.git_sha1
    digest = hashlib.sha256() if file.sha256 else hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as opened:
        while block := opened.read(_BLOCK):
            digest.update(block)
            bar.update(len(block))
    return known is None or digest.hexdigest() == known


def fitting_tokenizer(directory: Path, config: MoEConfig) -> PreTrainedTokenizerBase | None:
    """`load_tokenizer`; raises CheckpointError if some of its vocabulary has no embedding in the model.

    Tokens that were added to the vocabulary, such as a `[PAD]`, may be beyond the embeddings: they are refused where
    they are used (`models.Model.check_inputs`).
    """
    tokenizer = load_tokenizer(directory)
    if tokenizer is None:
        return None
    beyond = {token for token, index in tokenizer.get_vocab().items() if index >= config.vocab_size}
    if beyond - tokenizer.get_added_vocab().keys():
        raise CheckpointError(
            f"{directory}: the tokenizer has {len(tokenizer)} entries but config.json says vocab_size "
            f"{config.vocab_size}; use the tokenizer that belongs to the model"
        )
    return tokenizer


def check_structure(directory: Path, hashed: int) -> Verified:
    """What `verify` says, contents apart."""
    config = read_config(directory / "config.json")
    read_generation(directory, config)
    files = tensor_files(directory)
    sizes = _tensor_sizes(files)
    check_counts(files, config)
    expected = ledger(config)
    locate_tensors(files, config, expected)
    if (directory / INDEX_FILE).exists():
        _check_index(directory / INDEX_FILE, sizes)
    tokenizer = fitting_tokenizer(directory, config)
    return Verified(
        directory,
        files=len(files),
        tensors=len(expected),
        parameters=sum(math.prod(entry.shape) for entry in expected.values()),
        bytes=sum(size for tensors in sizes.values() for size in tensors.values()),
        hashed=hashed,
        tokenizer=None if tokenizer is None else len(tokenizer),
    )


def _tensor_sizes(files: list[Path]) -> dict[str, dict[str, int]]:
    """File name -> tensor -> bytes, by the headers; every file must be as long as its header says."""
    sizes, faults = {}, []
    for file in files:
        length = file.stat().st_size
        try:
            with file.open("rb") as opened:
                header_length = int.from_bytes(opened.read(8), "little")
                if length < 8 + header_length:
                    raise InputError(f"{length:,} bytes do not hold its header")
                header = json.loads(opened.read(header_length))
            places = {name: about["data_offsets"] for name, about in header.items() if name != "__metadata__"}
            sizes[file.name] = {name: end - start for name, (start, end) in places.items()}
            stated = 8 + header_length + max((end for _, end in places.values()), default=0)
            if length != stated:
                raise InputError(f"{length:,} bytes, its header says {stated:,}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            faults.append(f"{file.name} is truncated or not safetensors ({error})")
    if faults:
        raise CheckpointError(f"{files[0].parent}: {'; '.join(faults)}; delete what is named and download it again")
    return sizes


def _check_index(path: Path, sizes: dict[str, dict[str, int]]) -> None:
    """Every tensor must lie in the file that the index names, and all together be as large as it says."""
    index = read_object(path, CheckpointError)
    found = {tensor: file for file, tensors in sizes.items() for tensor in tensors}
    named = index["weight_map"]
    faults = [
        f"{tensor} is in {found.get(tensor, 'no file')}, the index says {named.get(tensor, 'nothing of it')}"
        for tensor in sorted(found.keys() | named.keys())
        if found.get(tensor) != named.get(tensor)
    ]
    total = sum(size for tensors in sizes.values() for size in tensors.values())
    about = index.get("metadata")
    stated = about.get("total_size") if isinstance(about, dict) else None
    if stated not in (None, total):
        faults.append(f"the tensors have {total:,} bytes, the index says total_size {shown(stated)}")
    if faults:
        more = f" and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise CheckpointError(
            f"{path}: {'; '.join(faults[:10])}{more}; download the index and the files it names again"
        )


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None

"""Fetch checkpoints from the Hugging Face hub, whole or not at all, and check that a directory holds a whole one.

Only `*.safetensors`, `*.json` and `tokenizer.model` at the top of a repository are fetched: nothing that could run
code. `huggingface_hub.snapshot_download` transfers the files; after an interruption it keeps the finished files and
starts the others again. They arrive in a hidden folder next to the target (`.NAME.COMMIT.partial`), which gets the
target's name when every file has the hub's hash and the tensors match config.json.

Hashes are compared here, because `HfApi.verify_repo_checksums` needs the network and reports every file that is
deliberately not fetched as missing. The directory keeps the hub's hashes in `varjax_download.json` for `verify`.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors

from models.config import ConfigError, read_config
from models.fields import read_object, shown
from models.generation import read_generation
from models.model import fitting_tokenizer
from models.weights import INDEX_FILE, STORED_BYTES, CheckpointError, Headers, ledger, locate_tensors, read_headers
from varjax import checksums
from varjax.errors import InputError
from varjax.progress import progress_bar

RECORD = "varjax_download.json"

# The hub's errors and what to do about them, the first that fits; a GatedRepoError is a RepositoryNotFoundError too.
_LOG_IN = "log in (`hf auth login`)"
_EXPLAINED = {
    errors.GatedRepoError: f"is gated: accept its terms at https://huggingface.co/{{repo}} and {_LOG_IN}",
    errors.RevisionNotFoundError: "has no revision {revision!r}; name one of its branches, tags or commits",
    errors.RepositoryNotFoundError: f"is not on the hub, or is private; check owner/name, or {_LOG_IN}",
    errors.HFValidationError: "is not a hub id ({error}); give owner/name",
    Exception: "cannot be fetched: the hub cannot be reached or the connection broke off ({kind}: {error}); check the "
    "network and run this again, the files fetched so far are kept",  # the hub's libraries raise many kinds
}


class DownloadError(InputError):
    """A checkpoint that cannot be fetched. The message says why and what to do."""


@dataclasses.dataclass(frozen=True)
class RemoteFile:
    """One file as the hub describes it."""

    name: str
    size: int  # bytes
    sha256: str | None = None  # of files in large storage, hexadecimal
    git_sha1: str | None = None  # of the others: SHA-1 of `blob SIZE\\0` and the contents


@dataclasses.dataclass(frozen=True)
class Remote:
    """The files to fetch from one commit of a repository."""

    repo: str  # owner/name
    commit: str  # 40 hexadecimal digits
    files: tuple[RemoteFile, ...]

    @property
    def size(self) -> int:
        """Total size of the files in bytes."""
        return sum(file.size for file in self.files)


@dataclasses.dataclass(frozen=True)
class Verified:
    """The contents of a directory that holds a whole checkpoint."""

    directory: Path
    files: int  # weight files
    tensors: int
    parameters: int
    bytes: int  # of the tensors
    hashed: int  # files whose contents were compared with the hub's hashes; 0 where these are not known
    tokenizer: int | None  # entries of the tokenizer; None: there is none


def look_up(repo: str, revision: str | None = None) -> Remote:
    """Ask the hub which files would be fetched. Nothing is written.

    Args:
        repo: owner/name.
        revision: branch, tag or commit; None: the main branch.

    Returns:
        The commit and its files.

    Raises:
        DownloadError: no network, no such repository or revision, a gated one, or one without safetensors.
    """
    with _explained(repo, revision):
        info = huggingface_hub.HfApi().model_info(repo, revision=revision, files_metadata=True)
    files = tuple(
        RemoteFile(one.rfilename, one.size or 0, one.lfs.sha256 if one.lfs else None, None if one.lfs else one.blob_id)
        for one in info.siblings or ()
        if _wanted(one.rfilename)
    )
    names = {file.name for file in files}
    if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
        raise DownloadError(
            f"{repo}: has no config.json with *.safetensors next to it; only such weights are fetched (*.bin and *.pt "
            "could run code), choose a repository or revision that has them"
        )
    return Remote(repo, str(info.sha), files)


def check_disk(remote: Remote, directory: Path) -> int:
    """Check that the files that are still missing fit on the disk.

    Args:
        remote: the files to fetch.
        directory: the folder that they are fetched into.

    Returns:
        Free bytes on the disk of `directory`.

    Raises:
        DownloadError: the files do not fit.
    """
    partial = _partial(remote, directory.resolve())
    places = [place / file.name for place in (partial, directory.resolve()) for file in remote.files]
    here = sum(path.stat().st_size for path in places if path.is_file())
    existing = next(path for path in partial.parents if path.exists())
    free, needed = shutil.disk_usage(existing).free, max(remote.size - here, 0)
    if needed > free:
        raise DownloadError(
            f"{existing}: {needed / 1e9:,.1f} GB are still to be fetched and {free / 1e9:,.1f} GB are free; "
            "free some space or choose another --output"
        )
    return free


def download(remote: Remote, directory: Path, progress: bool = True) -> Verified:
    """Fetch a checkpoint into a directory, resuming an interrupted download.

    A directory that already holds the checkpoint is only verified, one that lacks some of its files is completed, and
    one with other files is refused and left alone.

    Args:
        remote: the files to fetch (`look_up`).
        directory: the folder to fetch them into.
        progress: show progress bars.

    Returns:
        The contents of the directory.

    Raises:
        DownloadError: the network, the repository, the disk or a damaged file; finished files are kept.
        ConfigError: the architecture is not supported, which is checked before any weights are fetched.
        CheckpointError: the files of the repository do not belong together.
    """
    target = directory.resolve()
    partial = _partial(remote, target)
    _adopt(remote, target, partial, progress)
    place = target
    if not target.exists():
        _fill(remote, directory, partial, progress)
        place = partial
    checksums.write_json(place / RECORD, dataclasses.asdict(remote))
    verified = _check_structure(place, hashed=len(remote.files))
    if place != target:
        place.rename(target)
    return dataclasses.replace(verified, directory=directory)


def verify(directory: Path, progress: bool = True) -> Verified:
    """Check without a network that a directory holds a whole checkpoint.

    Headers, tensors, index and tokenizer must fit together, and in a directory that `download` made the contents of all
    files must have the hub's hashes.

    Args:
        directory: the folder to check.
        progress: show a progress bar while hashes are compared.

    Returns:
        The contents of the directory.

    Raises:
        ConfigError: config.json or generation_config.json is missing, damaged or not supported.
        CheckpointError: the directory is not whole; names every fault of one kind.
        InputError: the tokenizer cannot be opened.
    """
    recorded = _read_record(directory)
    if damaged := _damage(directory, recorded, progress):
        raise CheckpointError(f"{directory}: {'; '.join(damaged.values())}; delete what is named and download it again")
    return _check_structure(directory, hashed=len(recorded))


def _adopt(remote: Remote, target: Path, partial: Path, progress: bool) -> None:
    """Make an incomplete `target` the beginning of the download. No file is lost."""
    if not target.exists():
        return
    if not target.is_dir():
        raise DownloadError(f"{target} is a file; choose a directory for {remote.repo} (--output)")
    if not any(target.iterdir()):
        target.rmdir()
        return
    present = [file for file in remote.files if (target / file.name).is_file()]
    strangers = {path.name for path in target.glob("*.safetensors")} - {file.name for file in remote.files}
    if strangers or not present:
        raise DownloadError(f"{target} holds other files; choose a separate directory for {remote.repo} (--output)")
    if damaged := _damage(target, present, progress):
        raise DownloadError(
            f"{target} is not {remote.repo} at commit {remote.commit[:12]}: {'; '.join(damaged.values())}; choose "
            "another --output, or delete the named files there and run this again"
        )
    if len(present) < len(remote.files):
        if partial.exists():
            raise DownloadError(f"{target} and {partial} both hold a part of {remote.repo}; remove one of them")
        target.rename(partial)


def _fill(remote: Remote, directory: Path, partial: Path, progress: bool) -> None:
    """Fetch all files into `partial` and compare them with the hub's hashes."""
    for path in partial.glob(".cache/huggingface/download/*.*.*.incomplete"):  # parts left by a killed process
        path.unlink()  # huggingface_hub 2 never continues them
    check_disk(remote, directory)
    partial.mkdir(parents=True, exist_ok=True)
    names = [file.name for file in remote.files]
    _fetch(remote, [name for name in names if not name.endswith(".safetensors")], partial)
    try:
        read_config(partial / "config.json")
    except ConfigError as error:
        if any(partial.glob("*.safetensors")):  # somebody's own, from `directory`
            partial.rename(directory.resolve())
        else:
            shutil.rmtree(partial)
        raise ConfigError(str(error).replace(str(partial), remote.repo)) from None
    _fetch(remote, names, partial)
    if damaged := _damage(partial, remote.files, progress):
        for name in damaged:
            (partial / name).unlink(missing_ok=True)
        raise DownloadError(
            f"{remote.repo}: {'; '.join(damaged.values())}; run this again, only the named files are fetched again"
        )


def _fetch(remote: Remote, names: list[str], folder: Path) -> None:
    with _explained(remote.repo, remote.commit):
        huggingface_hub.snapshot_download(remote.repo, revision=remote.commit, local_dir=folder, allow_patterns=names)


@contextmanager
def _explained(repo: str, revision: str | None) -> Iterator[None]:
    """Turn the errors of the hub's libraries into one sentence each."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise DownloadError(f"{repo}: the disk is full; free some space and run this again") from error
        told = next(message for kind, message in _EXPLAINED.items() if isinstance(error, kind))
        told = told.format(repo=repo, revision=revision, kind=type(error).__name__, error=error)
        raise DownloadError(f"{repo} {told}") from error


def _wanted(name: str) -> bool:
    """Whether a file of a repository is fetched. `consolidated*` are the same weights again, in another layout."""
    kind = Path(name).suffix in (".json", ".safetensors") or name == "tokenizer.model"
    return kind and "/" not in name and not name.startswith("consolidated")


def _partial(remote: Remote, target: Path) -> Path:
    return target.with_name(f".{target.name}.{remote.commit[:12]}.partial")


def _read_record(directory: Path) -> tuple[RemoteFile, ...]:
    """The hub's description of the files in a directory; empty if `download` did not fetch them."""
    path, advice = directory / RECORD, "delete it to verify without it"
    if not path.exists():
        return ()
    record = checksums.read_json(path, advice, error=CheckpointError)
    try:
        return tuple(RemoteFile(**file) for file in record["files"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); {advice}") from None


def _damage(directory: Path, files: Sequence[RemoteFile], progress: bool) -> dict[str, str]:
    """Name -> what is wrong, of the files that differ from the hub's description."""
    bar = progress_bar(files, desc="comparing hashes", unit="file", show=progress and bool(files))
    faults = {file.name: _fault(directory / file.name, file) for file in bar}
    return {name: fault for name, fault in faults.items() if fault}


def _fault(path: Path, file: RemoteFile) -> str | None:
    if not path.is_file():
        return f"{file.name} is missing"
    if (size := path.stat().st_size) != file.size:
        return f"{file.name} has {size:,} bytes, the hub says {file.size:,}"
    with path.open("rb") as opened:
        if file.sha256:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
        else:
            found = hashlib.sha1(b"blob %d\0" % size + opened.read(), usedforsecurity=False).hexdigest()
    known = file.sha256 or file.git_sha1
    return None if known in (None, found) else f"{file.name} is damaged: its hash differs from the hub's"


def _check_structure(directory: Path, hashed: int) -> Verified:
    """Check everything that `verify` checks, except for the hashes."""
    config = read_config(directory / "config.json")
    read_generation(directory, config)
    headers = read_headers(directory)
    locate_tensors(headers, config)
    stored = [about for tensors in headers.values() for about in tensors.values()]
    total = sum(math.prod(shape) * STORED_BYTES[dtype] for shape, dtype in stored)
    if (directory / INDEX_FILE).exists():
        _check_index(directory / INDEX_FILE, headers, total)
    tokenizer = fitting_tokenizer(directory, config)
    return Verified(
        directory,
        files=len(headers),
        tensors=len(ledger(config)),
        parameters=sum(math.prod(entry.shape) for entry in ledger(config).values()),
        bytes=total,
        hashed=hashed,
        tokenizer=None if tokenizer is None else len(tokenizer),
    )


def _check_index(path: Path, headers: Headers, total: int) -> None:
    """Every tensor must be in the file that the index names, and all together as large as the index says."""
    index = read_object(path, CheckpointError)
    found = {tensor: file.name for file, tensors in headers.items() for tensor in tensors}
    named, about = index["weight_map"], index.get("metadata")
    faults = [
        f"{tensor} is in {found.get(tensor, 'no file')}, the index says {named.get(tensor, 'nothing about it')}"
        for tensor in sorted(found.keys() | named.keys())
        if found.get(tensor) != named.get(tensor)
    ]
    stated = about.get("total_size") if isinstance(about, dict) else None
    if stated not in (None, total):
        faults.append(f"the tensors have {total:,} bytes, the index says total_size {shown(stated)}")
    if faults:
        more = f" and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise CheckpointError(
            f"{path}: {'; '.join(faults[:10])}{more}; download the index and the files it names again"
        )

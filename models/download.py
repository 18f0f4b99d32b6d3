"""Checkpoints fetched from the Hugging Face hub, and the check that a model directory is whole.

Of a repository only `*.safetensors`, `*.json` and `tokenizer.model` at its top are fetched: nothing that could run
code. A download grows in a hidden folder beside its place (`.NAME.COMMIT.partial`), where a later call takes it up
again, and gets its name when every file is what the hub says and the tensors are what config.json says.
What the hub said stays with it in `varjax_download.json`, so that `verify` can compare contents without a network.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from models.config import ConfigError, read_config
from models.tokenizer import load_tokenizer
from models.weights import INDEX_FILE, CheckpointError, _files, _locate_tensors, ledger
from varjax.files import replacing

RECORD = "varjax_download.json"
_BLOCK = 1 << 22  # bytes hashed at once


class DownloadError(ValueError):
    """A checkpoint that cannot be fetched: says why and what to do."""


@dataclasses.dataclass(frozen=True)
class RemoteFile:
    """One file as the hub describes it."""

    name: str
    size: int  # bytes
    sha256: str | None = None  # of files in large storage, hexadecimal
    git_sha1: str | None = None  # of the others: SHA-1 of `blob SIZE\\0` and the contents


@dataclasses.dataclass(frozen=True)
class Remote:
    """What there is to fetch of one commit of a repository."""

    repo: str  # owner/name
    commit: str  # 40 hexadecimal digits
    files: tuple[RemoteFile, ...]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


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


def look_up(repo: str, revision: str | None = None) -> Remote:
    """Ask the hub what is to be fetched; nothing is written.

    Args:
        repo: owner/name.
        revision: branch, tag or commit; None: the main branch.

    Raises:
        DownloadError: no network, no such repository or revision, a gated one, or one without safetensors.
    """
    from huggingface_hub import HfApi

    with _explained(repo, revision):
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    files = tuple(
        RemoteFile(
            one.rfilename,
            one.size or 0,
            sha256=one.lfs.sha256 if one.lfs else None,
            git_sha1=None if one.lfs else one.blob_id,
        )
        for one in info.siblings or ()
        if _wanted(one.rfilename)
    )
    names = {file.name for file in files}
    if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
        raise DownloadError(
            f"{repo}: holds no config.json with *.safetensors beside it; only such weights are fetched (*.bin and *.pt "
            "could run code), choose a repository or revision that has them"
        )
    return Remote(repo, str(info.sha), files)


def check_disk(remote: Remote, directory: Path) -> int:
    """The free bytes where `directory` is to be.

    Raises:
        DownloadError: what is still to fetch does not fit there.
    """
    partial = _partial(remote, directory.resolve())
    here = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    existing = next(path for path in partial.parents if path.exists())
    free, needed = shutil.disk_usage(existing).free, max(remote.size - here, 0)
    if needed > free:
        raise DownloadError(
            f"{existing}: {needed / 1e9:,.1f} GB are still to be fetched and {free / 1e9:,.1f} GB are free; "
            "free some space or choose another --output"
        )
    return free


def download(remote: Remote, directory: Path, progress: bool = True) -> Verified:
    """Fetch a checkpoint into `directory`, which appears when it is whole; take up what an earlier call has fetched.

    A directory that already holds the checkpoint is only verified. One that lacks some of its files is completed. One
    with files of those names and other contents is refused, and nothing in it is touched.

    Raises:
        DownloadError: the network, the repository, the disk or a damaged file; what is whole is kept for the next call.
        ConfigError, CheckpointError: the repository holds something that this library cannot run.
    """
    target = directory.resolve()
    partial = _partial(remote, target)
    _take_up(remote, target, partial, progress)
    if not target.exists():
        _fill(remote, directory, partial, progress)
        _write_record(remote, partial)
        _check_structure(partial, 0)
        partial.rename(target)
    else:
        _write_record(remote, target)
    return _check_structure(directory, hashed=len(remote.files))


def verify(directory: Path, progress: bool = True) -> Verified:
    """Check a model directory without a network.

    Every weight file must be as long as its header says; each tensor of the architecture must be there, once, with its
    shape, in the shard that the index names; the index's total size must be theirs; the tokenizer must open and fit
    the vocabulary. With a record of the hub's (`RECORD`) sizes and contents of all files are compared too.

    Raises:
        ConfigError, CheckpointError, ValueError: it is not whole; names every fault of one kind.
    """
    recorded = _read_record(directory)
    if damaged := _damage(directory, recorded, progress):
        raise CheckpointError(f"{directory}: {'; '.join(damaged.values())}; delete what is named and download it again")
    return _check_structure(directory, hashed=len(recorded))


def _take_up(remote: Remote, target: Path, partial: Path, progress: bool) -> None:
    """Make what lies at `target` the beginning of the download, unless it is all of it; nothing is lost."""
    if not target.exists():
        return
    if not any(target.iterdir()):
        target.rmdir()
        return
    present = [file for file in remote.files if (target / file.name).is_file()]
    if not present or partial.exists():
        raise DownloadError(f"{target} holds other files; choose a directory of its own for {remote.repo} (--output)")
    if damaged := _damage(target, present, progress):
        raise DownloadError(
            f"{target} is not {remote.repo} at commit {remote.commit[:12]}: {'; '.join(damaged.values())}; choose "
            "another --output, or delete the named files there and run this again"
        )
    if len(present) < len(remote.files):
        target.rename(partial)


def _fill(remote: Remote, directory: Path, partial: Path, progress: bool) -> None:
    """Fetch all files into `partial` and compare them with what the hub says."""
    check_disk(remote, directory)
    partial.mkdir(parents=True, exist_ok=True)
    _fetch(remote, [file.name for file in remote.files if not file.name.endswith(".safetensors")], partial)
    try:
        read_config(partial / "config.json")  # what cannot be run is refused before gigabytes travel
    except ConfigError:
        shutil.rmtree(partial)
        raise
    _fetch(remote, [file.name for file in remote.files], partial)
    if damaged := _damage(partial, remote.files, progress):
        for name in damaged:
            (partial / name).unlink(missing_ok=True)
        raise DownloadError(
            f"{remote.repo}: {'; '.join(damaged.values())}; run this again, only what is named is fetched anew"
        )


def _fetch(remote: Remote, names: list[str], folder: Path) -> None:
    from huggingface_hub import snapshot_download

    with _explained(remote.repo, remote.commit):
        snapshot_download(remote.repo, revision=remote.commit, local_dir=folder, allow_patterns=names)


@contextmanager
def _explained(repo: str, revision: str | None) -> Iterator[None]:
    """The hub's errors in one sentence each."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:  # a kind of RepositoryNotFoundError
        raise DownloadError(
            f"{repo} is gated: accept its terms at https://huggingface.co/{repo}, log in (`hf auth login`) and run "
            "this again"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise DownloadError(
            f"{repo} has no revision {revision!r}; name one of its branches, tags or commits"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise DownloadError(
            f"{repo}: no such repository on the hub, or a private one; check owner/name, or log in (`hf auth login`)"
        ) from error
    except errors.HFValidationError as error:
        raise DownloadError(f"{repo!r} is no hub id ({error}); give owner/name") from error
    except Exception as error:  # the libraries raise many kinds
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise DownloadError(f"{repo}: the disk is full; free some space and run this again") from error
        raise DownloadError(
            f"{repo}: the hub cannot be reached or broke off ({type(error).__name__}: {error}); check the network and "
            "run this again, what has been fetched is kept"
        ) from error


def _damage(directory: Path, files: Sequence[RemoteFile], progress: bool) -> dict[str, str]:
    """Name -> what is wrong, of the files that are not as the hub describes them."""
    faults = {}
    sizes = {file: _size(directory / file.name) for file in files}
    total = sum(file.size for file, size in sizes.items() if size == file.size)
    with tqdm(total=total, desc="comparing", unit="B", unit_scale=True, disable=not progress or not files) as bar:
        for file, size in sizes.items():
            if size is None:
                faults[file.name] = f"{file.name} is missing"
            elif size != file.size:
                faults[file.name] = f"{file.name} has {size:,} bytes, the hub says {file.size:,}"
            elif not _same_contents(directory / file.name, file, bar):
                faults[file.name] = f"{file.name} is damaged: its hash is not the hub's"
    return faults


def _same_contents(path: Path, file: RemoteFile, bar: tqdm) -> bool:
    known = file.sha256 or file.git_sha1
    digest = hashlib.sha256() if file.sha256 else hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as opened:
        while block := opened.read(_BLOCK):
            digest.update(block)
            bar.update(len(block))
    return known is None or digest.hexdigest() == known


def _check_structure(directory: Path, hashed: int) -> Verified:
    """What `verify` says, contents apart."""
    config = read_config(directory / "config.json")
    expected = ledger(config)
    files = _files(directory)
    sizes = _tensor_sizes(files)
    _locate_tensors(directory, expected)
    if (directory / INDEX_FILE).exists():
        _check_index(directory / INDEX_FILE, sizes)
    tokenizer = load_tokenizer(directory)
    if tokenizer is not None and len(tokenizer) > config.vocab_size:
        raise CheckpointError(
            f"{directory}: the tokenizer has {len(tokenizer)} entries but config.json says vocab_size "
            f"{config.vocab_size}; use the tokenizer that belongs to the model"
        )
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
                    raise ValueError(f"{length:,} bytes do not hold its header")
                header = json.loads(opened.read(header_length))
            places = {name: about["data_offsets"] for name, about in header.items() if name != "__metadata__"}
            sizes[file.name] = {name: end - start for name, (start, end) in places.items()}
            stated = 8 + header_length + max((end for _, end in places.values()), default=0)
            if length != stated:
                raise ValueError(f"{length:,} bytes, its header says {stated:,}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            faults.append(f"{file.name} is truncated or not safetensors ({error})")
    if faults:
        raise CheckpointError(f"{files[0].parent}: {'; '.join(faults)}; delete what is named and download it again")
    return sizes


def _check_index(path: Path, sizes: dict[str, dict[str, int]]) -> None:
    """Every tensor must lie in the file that the index names, and all together be as large as it says."""
    index = json.loads(path.read_text())
    found = {tensor: file for file, tensors in sizes.items() for tensor in tensors}
    named = index["weight_map"]
    faults = [
        f"{tensor} is in {found.get(tensor, 'no file')}, the index says {named.get(tensor, 'nothing of it')}"
        for tensor in sorted(found.keys() | named.keys())
        if found.get(tensor) != named.get(tensor)
    ]
    total, stated = (
        sum(sum(tensors.values()) for tensors in sizes.values()),
        index.get("metadata", {}).get("total_size"),
    )
    if stated not in (None, total):
        faults.append(f"the tensors have {total:,} bytes, the index says total_size {stated}")
    if faults:
        more = f" and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise CheckpointError(
            f"{path}: {'; '.join(faults[:10])}{more}; download the index and the files it names again"
        )


def _write_record(remote: Remote, directory: Path) -> None:
    with replacing(directory / RECORD) as temporary:
        temporary.write_text(json.dumps(dataclasses.asdict(remote), indent=2) + "\n")


def _read_record(directory: Path) -> tuple[RemoteFile, ...]:
    """What the hub said of the files in a directory; nothing if it was not fetched by `download`."""
    path = directory / RECORD
    if not path.exists():
        return ()
    try:
        return tuple(RemoteFile(**file) for file in json.loads(path.read_text())["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}); delete it to verify without it") from None


def _wanted(name: str) -> bool:
    """Whether a file of a repository is fetched. `consolidated*` are the same weights once more, in another layout."""
    kind = Path(name).suffix in (".json", ".safetensors") or name == "tokenizer.model"
    return kind and "/" not in name and not name.startswith("consolidated")


def _partial(remote: Remote, target: Path) -> Path:
    return target.with_name(f".{target.name}.{remote.commit[:12]}.partial")


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None

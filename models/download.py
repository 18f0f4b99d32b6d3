"""Checkpoints fetched from the Hugging Face hub, whole or not at all.

Of a repository only `*.safetensors`, `*.json` and `tokenizer.model` at its top are fetched: nothing that could run
code. A download grows in a hidden folder beside its place (`.NAME.COMMIT.partial`), where a later call takes it up
again, and gets its name when every file is what the hub says and the tensors are what config.json says
(`models.verification`).
"""

from __future__ import annotations

import dataclasses
import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from models.config import ConfigError, read_config
from models.verification import RECORD, RemoteFile, Verified, check_structure, damage
from varjax import checksums
from varjax.errors import InputError


class DownloadError(InputError):
    """A checkpoint that cannot be fetched: says why and what to do."""


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
    places = (partial, directory.resolve())  # what an earlier call has begun, and what lies there whole
    here = sum(path.stat().st_size for place in places for path in place.rglob("*") if path.is_file())
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

    A directory that already holds the checkpoint is only verified. One that lacks some of its files is completed, and
    has the hidden name meanwhile. One with other files is refused, and nothing in it is touched.

    Raises:
        DownloadError: the network, the repository, the disk or a damaged file; what is whole is kept for the next call.
        ConfigError, CheckpointError: the repository holds something that this library cannot run.
    """
    target = directory.resolve()
    partial = _partial(remote, target)
    _take_up(remote, target, partial, progress)
    place = target
    if not target.exists():
        _fill(remote, directory, partial, progress)
        place = partial
    checksums.write_json(place / RECORD, dataclasses.asdict(remote))
    verified = check_structure(place, hashed=len(remote.files))
    if place != target:
        place.rename(target)
    return dataclasses.replace(verified, directory=directory)


def _take_up(remote: Remote, target: Path, partial: Path, progress: bool) -> None:
    """Make what lies at `target` the beginning of the download, unless it is all of it; nothing is lost."""
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
        raise DownloadError(f"{target} holds other files; choose a directory of its own for {remote.repo} (--output)")
    if damaged := damage(target, present, progress):
        raise DownloadError(
            f"{target} is not {remote.repo} at commit {remote.commit[:12]}: {'; '.join(damaged.values())}; choose "
            "another --output, or delete the named files there and run this again"
        )
    if len(present) < len(remote.files):
        if partial.exists():
            raise DownloadError(f"{target} and {partial} both hold a part of {remote.repo}; remove one of them")
        target.rename(partial)


def _fill(remote: Remote, directory: Path, partial: Path, progress: bool) -> None:
    """Fetch all files into `partial` and compare them with what the hub says."""
    check_disk(remote, directory)
    partial.mkdir(parents=True, exist_ok=True)
    _fetch(remote, [file.name for file in remote.files if not file.name.endswith(".safetensors")], partial)
    try:
        # What cannot be run is refused before gigabytes travel.
        read_config(partial / "config.json", f"{remote.repo}/config.json")
    except ConfigError:
        shutil.rmtree(partial)
        raise
    _fetch(remote, [file.name for file in remote.files], partial)
    if damaged := damage(partial, remote.files, progress):
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


def _wanted(name: str) -> bool:
    """Whether a file of a repository is fetched. `consolidated*` are the same weights once more, in another layout."""
    kind = Path(name).suffix in (".json", ".safetensors") or name == "tokenizer.model"
    return kind and "/" not in name and not name.startswith("consolidated")


def _partial(remote: Remote, target: Path) -> Path:
    return target.with_name(f".{target.name}.{remote.commit[:12]}.partial")

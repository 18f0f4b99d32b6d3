"""The meaning of `--output`, a file or a directory, and the lock that keeps two runs from writing the same files.

    output = Output.of(args.output, "hypotheses", REPORT)
    with output.locked():
        write_report(report, output)

A name with a known ending (`ENDINGS`) is that file: everything else that the program writes goes next to it, under the
same stem. Every other name, with or without a dot, is a directory, in which the program's own names are used.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import platform
import shlex
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import jax

from varjax.errors import InputError

ENDINGS = (".parquet", ".json", ".txt", ".html")
REPORT = (".txt", ".json", ".html")  # the files of a report
DIRECTORY = ()  # for a program that writes a directory only

OUTPUT_HELP = "directory to write to, or a file such as NAME.json, next to which the other files get the same stem"

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}  # a file system without locks


@dataclass(frozen=True)
class Output:
    """Where a program writes."""

    given: Path  # --output
    folder: Path
    stem: str  # of the main files
    named: bool  # --output names a file, so that everything is written under its stem

    @classmethod
    def of(cls, given: Path, stem: str, endings: Collection[str] = REPORT) -> Output:
        """Interpret `--output` for a program.

        Args:
            given: `--output`.
            stem: stem of the program's main files in a directory, such as "hypotheses".
            endings: endings of the files that the program can be asked for, among `ENDINGS`.

        Returns:
            The output.

        Raises:
            InputError: the program does not write such a file, or something of the other kind exists there.
        """
        fault = fix = ""
        if given.suffix not in ENDINGS:
            if given.exists() and not given.is_dir():
                fault, fix = " is a file, but a directory is to be written", "choose another name"
        elif given.suffix not in endings:
            fault = f": no {given.suffix} file is written here"
            fix = f"give a name that ends in {', '.join(endings)}, or a directory" if endings else "give a directory"
        elif given.name == "index.html":
            fault, fix = ": index.html is the page of all runs", "choose another name"
        elif given.is_dir():
            fault, fix = " is a directory, but a file is to be written", "choose another name"
        if fault:
            raise InputError(f"--output {given}{fault}; {fix}")
        named = given.suffix in ENDINGS
        return cls(given, given.parent if named else given, given.stem if named else stem, named)

    @property
    def prefix(self) -> str:
        """Beginning of the names of all files that are not the main ones, such as figures."""
        return f"{self.stem}." if self.named else ""

    def main(self, ending: str) -> Path:
        """Name a main file.

        Args:
            ending: its ending, such as ".json".

        Returns:
            Its path.
        """
        return self.folder / f"{self.stem}{ending}"

    def other(self, name: str) -> Path:
        """Name another file or folder.

        Args:
            name: its name in a directory; next to a file it becomes `STEM.name`.

        Returns:
            Its path.
        """
        return self.folder / f"{self.prefix}{name}"

    @contextlib.contextmanager
    def locked(self, part: str = "") -> Iterator[None]:
        """Keep other runs from writing the same files. The folder is made, or refused, before the work begins.

        Of joined processes (`jax.distributed`), only the first one writes and holds the lock.

        Args:
            part: names one of several processes that share the output; "" is the one that writes the main files.

        Raises:
            InputError: another run holds the lock, or nothing can be written there.
        """
        if jax.distributed.is_initialized() and jax.process_index() > 0:
            yield
            return
        with lock(self.folder / f".{self.stem}{part and '.'}{part}.lock", f"--output {self.given}"):
            yield


@contextlib.contextmanager
def lock(path: Path, what: str) -> Iterator[None]:
    """Hold a lock file inside the `with`. The system releases it when the process ends, however it ends.

    Args:
        path: the lock file, which is removed at the end.
        what: names the output in error messages.

    Raises:
        InputError: another run holds it, or it cannot be written.
    """
    missing = [folder for folder in path.parents if not folder.exists()]  # the deepest first
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _taken(path, what)
        file.write(f"process {os.getpid()} on {platform.node()} ({shlex.join(sys.argv)})")
        file.flush()
    except OSError as error:
        raise InputError(f"{what}: cannot be written ({error.strerror}); give a place that can be written") from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # before others can take it
        file.close()
        for folder in missing:  # removed again if nothing was written
            with contextlib.suppress(OSError):
                folder.rmdir()


def _taken(path: Path, what: str) -> TextIO:
    """The lock file, open, empty and locked."""
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read() or "another run"
            file.close()
            raise InputError(
                f"{what}: {holder} is writing there; wait until it ends, or give another --output"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                file.close()
                raise
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                file.truncate(0)
                return file
        file.close()  # the previous run has just removed the file that was opened here

"""Files that are written whole or not at all, and once, however many processes run the program.

Processes that `jax.distributed` joined run one program together and hold the same results: the first one's files stay,
and all go on when they are there.
"""

import errno
import glob
import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
from jax.experimental.multihost_utils import sync_global_devices

_OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
_CODE = re.compile(r"os[ _]error(?:_code)?\W+(\d+)")  # as safetensors and tensorstore quote the system's errors


def user_cache() -> Path:
    """The folder for what this user can make again: `$XDG_CACHE_HOME/varjax`, else `~/.cache/varjax`.

    Returns:
        The folder, which may not exist yet.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "varjax"


@contextmanager
def named_errors(path: str | Path) -> Iterator[None]:
    """Raise errors of the file system, while `path` is written inside the `with`, as an OSError that names `path`.

    A full disk comes without a name from the system, and as errors of their own from libraries that write by
    themselves. Other errors come with the name of the temporary file.

    Args:
        path: the file that is written.

    Yields:
        Nothing.

    Raises:
        OSError: the file cannot be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _OF_THE_DISK or _is_temporary(error.filename, Path(path)):
            error.filename = str(path)
        raise
    except Exception as error:
        code = _CODE.search(str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


@contextmanager
def replacing(path: str | Path, *, of_this_machine: bool = False) -> Iterator[Path]:
    """A temporary path next to `path`, to write inside the `with`; it takes `path`'s place if that ends well.

    After an error or an interruption `path` is what it was before, and the temporary file is gone. Missing
    folders above `path` are made. Leftovers of killed processes of this machine are removed.

    Args:
        path: replaced if it exists.
        of_this_machine: the file is not a result but, for example, a cache, which every process writes for itself.

    Yields:
        The temporary path.

    Raises:
        OSError: the file cannot be written; see `named_errors`.
    """
    target = Path(path)
    process = None if of_this_machine else _joined()
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target)
    temporary = target.with_name(f"{_beginning(target)}{process or 0}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        with named_errors(target):
            # Some writers keep their file to its owner; here everyone reads who may read other new files. Which mode
            # these have is seen from one: the process' umask cannot be read without changing it, for all threads.
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)
        if process is not None:
            _meet(target)  # from here on no process asks whether the file was there before
        if not process:
            os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    if process is not None:
        _meet(target)


def remove(folder: Path) -> None:
    """Remove a folder of the program's with everything in it.

    Args:
        folder: to remove.
    """
    process = _joined()
    if process is not None:
        _meet(folder)
    if not process:
        shutil.rmtree(folder)


def _remove_leftovers(target: Path) -> None:
    """Remove temporary files of `target` whose processes, on this machine, were killed."""
    if os.name != "posix":  # elsewhere signal 0 is not a question
        return
    for path in target.parent.glob(glob.escape(_beginning(target)) + "*.tmp"):
        process = path.name.split(".")[-2]
        if process.isdecimal() and not _runs(int(process)):
            path.unlink(missing_ok=True)


def _beginning(target: Path) -> str:
    """Of the names of temporary files of `target` whose processes can be seen from here.

    A process has its number among those of one machine and, in a container, of one namespace.
    """
    try:
        space = f"-{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # another system than Linux
        space = ""
    return f".{target.name}.{platform.node()}{space}."


def _is_temporary(name: object, target: Path) -> bool:
    return isinstance(name, str) and Path(name).name.startswith(f".{target.name}.") and name.endswith(".tmp")


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def _joined() -> int | None:
    """The number of this process among those that run the program together; None: it is alone."""
    return jax.process_index() if jax.distributed.is_initialized() else None


def _meet(path: Path) -> None:
    """Go on when all processes have come to this path."""
    sync_global_devices(str(path))

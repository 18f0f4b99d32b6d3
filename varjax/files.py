"""Files that are written whole or not at all, and once, however many processes run the program.

Processes that `jax.distributed` joined run one program together and hold the same results: the first one's files stay,
and all go on when they are there.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
from jax.experimental.multihost_utils import sync_global_devices


@contextmanager
def replacing(path: str | Path, *, of_this_machine: bool = False) -> Iterator[Path]:
    """A temporary path beside `path`, to write inside the `with`; it takes `path`'s place if that ends well.

    After an error or an interruption `path` is what it was before, and the temporary file is gone. Missing
    folders above `path` are made.

    Args:
        of_this_machine: no result of the program but a cache, say: a process that writes it does so for itself.
    """
    target = Path(path)
    process = None if of_this_machine else _joined()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{process or 0}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        # Some writers keep their file to its owner; here everyone reads who may read other new files. Which mode these
        # have is seen from one: the process' umask cannot be read without changing it, for all threads.
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)
        if process is not None:
            _meet(target)  # from here on nobody asks whether the file was there before
        if not process:
            os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    if process is not None:
        _meet(target)


def remove(folder: Path) -> None:
    """Remove a folder of the program's with all that is in it."""
    process = _joined()
    if process is not None:
        _meet(folder)
    if not process:
        shutil.rmtree(folder)


def _joined() -> int | None:
    """The number of this process among those that run the program together; None: it is alone."""
    return jax.process_index() if jax.distributed.is_initialized() else None


def _meet(path: Path) -> None:
    """Go on when all processes have come to this path."""
    sync_global_devices(str(path))

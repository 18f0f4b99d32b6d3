"""What all commands of this project share: the look of their help, arguments that are paths, settings of JAX, and how
they fail.
"""

from __future__ import annotations

import argparse
import errno
import functools
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import jax

from varjax.errors import InputError
from varjax.files import user_cache

_OF_MEMORY = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # a user may set either
_FOR_MEMORY = (
    "Lower --batch_size or --max_length or, if the command has these options, use --dtype bfloat16 or divide the model "
    "over several devices with --mesh"
)
_PROGRAMS_BYTES = 4 << 30  # of compiled programs, on disk
_UNBOUNDED = -1  # JAX's default
_ADVICE = dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space, then run the same command again")
_ADVICE |= {
    errno.EACCES: "choose a place that you may use, or change its permissions",
    errno.EROFS: "choose a place that can be written",
}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Prints the description as written, and the default of every option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def path_argument(text: str) -> Path:
    """Parse an argument that is a path: its `type` in argparse.

    Args:
        text: as given; `~` is the home directory, even where the shell does not expand it.

    Returns:
        The path.
    """
    return Path(name_argument(text))


def name_argument(text: str) -> str:
    """Parse an argument that is a path or another name, such as a model's on the hub: its `type` in argparse.

    Args:
        text: as given.

    Returns:
        The text, with `~` expanded.

    Raises:
        ArgumentTypeError: it is empty.
    """
    if not text:
        raise argparse.ArgumentTypeError("it is empty; give a name or a path")
    return os.path.expanduser(text)


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """Add `--dtype`, as `models.load_model` takes it.

    Args:
        parser: of a program that loads a model.
    """
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="data type of the parameters (default: the one that the checkpoint's config.json names)",
    )


def program(main: Callable[[Sequence[str] | None], None]) -> Callable[..., None]:
    """Decorate the `main` of a program, which then runs under `run`.

    Args:
        main: takes the arguments; None: those of the command line.

    Returns:
        A function whose arguments are optional.
    """

    @functools.wraps(main)
    def guarded(arguments: Sequence[str] | None = None) -> None:
        run(functools.partial(main, arguments))

    return guarded


def run(work: Callable[[], None]) -> None:
    """Do the work of a program; bad input ends it with one message instead of a traceback.

    Bad input is what varjax (`InputError`) or the operating system (`OSError`) refuses, a `JAX_PLATFORMS` that names a
    missing device, and a batch for which a device has too little memory. Every other error is a fault in the program
    and keeps its traceback. Each of several joined processes ends at once when another one has ended.

    Args:
        work: the work.

    Raises:
        SystemExit: with the message.
    """
    streams = sys.stdout, sys.stderr  # a process that joins others gives up its own
    _set_up_jax()
    try:
        work()
    except InputError as error:
        sys.exit(_with_notes(f"error: {error}", error))
    except OSError as error:
        sys.exit(_with_notes(f"error: {_of_the_system(error)}", error))
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except jax.errors.JaxRuntimeError as error:
        if not jax.distributed.is_initialized():
            if "RESOURCE_EXHAUSTED: Out of memory" in str(error):
                sys.exit(_with_notes(f"error: {str(error).splitlines()[0]}\n{_FOR_MEMORY}", error))
            raise
        sys.stderr = streams[1]
        _leave(error)
    except Exception:
        if absent := _absent_platform():
            sys.exit(f"error: {absent}")
        raise
    finally:
        sys.stdout, sys.stderr = streams


def _set_up_jax() -> None:
    """Set what suits one program that runs for long, unless the user has: memory of a GPU, and a cache of programs.

    JAX would take 75% of a GPU, and compile everything anew for every run, which takes minutes for a large model.
    """
    if not any(name in os.environ for name in _OF_MEMORY):
        os.environ[_OF_MEMORY[0]] = "0.95"
    if jax.config.jax_compilation_cache_dir is not None:  # type: ignore[attr-defined]
        return
    with suppress(OSError, RuntimeError):  # without a folder that can be written, or any home, only time is lost
        folder = user_cache() / "programs"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            jax.config.update("jax_compilation_cache_dir", str(folder))
            if jax.config.jax_compilation_cache_max_size == _UNBOUNDED:  # type: ignore[attr-defined]
                jax.config.update("jax_compilation_cache_max_size", _PROGRAMS_BYTES)


def _with_notes(message: str, error: BaseException) -> str:
    """The message, then what was added to the error on its way, such as that the results are complete."""
    return "\n".join([message, *getattr(error, "__notes__", ())])


def _of_the_system(error: OSError) -> str:
    """The message of the operating system, with the file first and the fix last."""
    if error.strerror is None or error.filename is None:
        return str(error)
    advice = _ADVICE.get(error.errno or 0)
    return f"{error.filename}: {error.strerror}" + (f"; {advice}" if advice else "")


def _absent_platform() -> str | None:
    """Explain that JAX found no device, if JAX_PLATFORMS excludes every device of this machine."""
    asked = os.environ.get("JAX_PLATFORMS")
    if not asked:
        return None
    try:
        jax.devices()
    except (AssertionError, RuntimeError) as error:  # the former without a message, where a driver is not installed
        reason = f" ({error})" if str(error) else ""
        return (
            f"JAX_PLATFORMS={asked}: JAX finds no such device on this machine{reason}. Unset JAX_PLATFORMS to use "
            "what is available, or install JAX for that device, such as with pip install -e '.[cuda12]'"
        )
    return None


def _leave(error: Exception) -> NoReturn:
    """End this process after an error that another process's end may have caused; a normal exit would wait for it."""
    print(
        f"error: {str(error).splitlines()[0]}\nIf another process of this run has ended, its own output says why. "
        "Start all of them again with the same arguments to resume",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)

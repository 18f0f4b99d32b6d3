"""What every command of this project has in common: how its help looks, what its paths are, and how it fails."""

from __future__ import annotations

import argparse
import errno
import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import jax

from varjax.errors import InputError

_ADVICE = {
    errno.ENOSPC: "free some space, then run the same command again",
    errno.EDQUOT: "free some space, then run the same command again",
    errno.EACCES: "choose a place that you may use, or change its permissions",
    errno.EROFS: "choose a place that can be written",
}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Prints the description as written, and the default of every option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def path_argument(text: str) -> Path:
    """The `type` of an argument that is a path. `~` is the home directory, also where the shell leaves it alone."""
    return Path(name_argument(text))


def name_argument(text: str) -> str:
    """The `type` of an argument that is a path or some other name, such as a model's on the hub."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty; give a name or a path")
    return os.path.expanduser(text)


def program(main: Callable[[Sequence[str] | None], None]) -> Callable[..., None]:
    """Decorate the `main` of a program: it runs under `run`, with the arguments of the command line unless given some.

    Args:
        main: takes the arguments, or None for those of the command line.
    """

    @functools.wraps(main)
    def guarded(arguments: Sequence[str] | None = None) -> None:
        run(functools.partial(main, arguments))

    return guarded


def run(work: Callable[[], None]) -> None:
    """Do the work of a program; bad input ends it with one message in the place of a traceback.

    Bad input is what varjax (`InputError`) or the operating system (`OSError`) refuses, and a `JAX_PLATFORMS` that
    names a device which is not there. Every other error is a fault in the program, which nobody finds without the
    traceback. Of several processes that were joined, each ends at once when another one has.

    Raises:
        SystemExit: with the message.
    """
    streams = sys.stdout, sys.stderr  # a process that joins others gives its own up
    try:
        work()
    except InputError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {_of_the_system(error)}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except jax.errors.JaxRuntimeError as error:
        if not jax.distributed.is_initialized():
            raise
        sys.stderr = streams[1]
        _leave(error)
    except Exception:
        if absent := _absent_platform():
            sys.exit(f"error: {absent}")
        raise
    finally:
        sys.stdout, sys.stderr = streams


def _of_the_system(error: OSError) -> str:
    """The message of the operating system, with the file first and what to do last."""
    if error.strerror is None or error.filename is None:
        return str(error)
    advice = _ADVICE.get(error.errno or 0)
    return f"{error.filename}: {error.strerror}" + (f"; {advice}" if advice else "")


def _absent_platform() -> str | None:
    """Why there is no device to run on, if JAX_PLATFORMS rules out all that there are."""
    asked = os.environ.get("JAX_PLATFORMS")
    if not asked:
        return None
    try:
        jax.devices()
    except (AssertionError, RuntimeError) as error:  # the former without a word, where a driver is not installed
        reason = f" ({error})" if str(error) else ""
        return (
            f"JAX_PLATFORMS={asked}: JAX finds no such device on this machine{reason}. Unset JAX_PLATFORMS to use "
            "what is here, or install JAX for that device, such as with pip install -e '.[cuda12]'"
        )
    return None


def _leave(error: Exception) -> NoReturn:
    """End this process of several after an error that another one's end may have caused.

    At once: an ordinary exit would wait for the others.
    """
    print(
        f"error: {str(error).splitlines()[0]}\nIf another process of this run has ended, its own output says why. "
        "Start all of them again with the same arguments: they go on where they were",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)

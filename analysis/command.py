"""What every command of this project has in common: how its help looks, and the one way in which it fails."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from varjax.errors import InputError


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Prints the description as written, and the default of every option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def run(main: Callable[[], None]) -> None:
    """Run a command; bad input ends it with one message in the place of a traceback.

    Bad input is what varjax (`InputError`) or the operating system (`OSError`) refuses. Every other error is a fault in
    the program, which nobody finds without the traceback.

    Args:
        main: the command. It reads the command line itself.
    """
    try:
        main()
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")

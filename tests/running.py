"""What a reader types, run in this process: starting Python with JAX anew would cost seconds each time."""

import runpy
import sys
import warnings
from collections.abc import Sequence
from unittest.mock import patch


def run_python(words: Sequence[str]) -> None:
    """`python WORDS`: a file, or `-m` and a module, as `__main__`. What it raises is raised, SystemExit too."""
    module = words[0] == "-m"
    name, *given = words[module:]
    with patch.object(sys, "argv", [name, *given]):
        if not module:
            runpy.run_path(name, run_name="__main__")
            return
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*found in sys.modules after import", category=RuntimeWarning)
            runpy.run_module(name, run_name="__main__", alter_sys=True)

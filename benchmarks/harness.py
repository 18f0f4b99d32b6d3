"""What the benchmarks share: their parsers, how a machine and a ratio are printed, and a clock for single calls."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import TypeVar

import jax

from analysis.command import HelpFormatter
from analysis.resampling import Estimate

T = TypeVar("T")


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help shows the benchmark's docstring and all defaults.

    Args:
        description: the docstring.

    Returns:
        The parser.
    """
    return argparse.ArgumentParser(description=description, formatter_class=HelpFormatter)


def machine() -> str:
    """The device and the number of cores.

    Returns:
        Words to print.
    """
    return f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores"


def interval(ratio: Estimate, digits: int = 2) -> str:
    """The interval of a ratio.

    Args:
        ratio: the estimate.
        digits: after the decimal point.

    Returns:
        Words to print, such as "[1.02, 1.10]".
    """
    return f"[{ratio.low:.{digits}f}, {ratio.high:.{digits}f}]"


def timed(call: Callable[[], T]) -> tuple[T, float]:
    """Time a single call.

    Args:
        call: what to run.

    Returns:
        What it returns, and the seconds it took.
    """
    start = time.perf_counter()
    found = call()
    return found, time.perf_counter() - start

"""Many programs compiled in the time of fewer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

THREADS = 4  # at most: what a job runs stands in the device's memory beside what the others run


def at_once(jobs: Iterable[Callable[[], T]]) -> list[T]:
    """The results, in order, of jobs that mostly compile; several of them run at the same time.

    XLA compiles a program on one core, and lets go of Python meanwhile. A job that raises, raises here.
    """
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda job: job(), jobs))

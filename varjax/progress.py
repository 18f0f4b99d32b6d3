"""Progress bars for people who watch a terminal; a log file gets none."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tqdm import tqdm as Bar

__all__ = ["Bar", "progress_bar"]


def progress_bar(items: Iterable[Any] | None = None, *, show: bool = True, **options: Any) -> Bar:
    """A progress bar on standard error.

    Nothing is drawn where standard error is not a terminal: each refresh of a bar would add a line to a log file.

    Args:
        items: what to iterate over; None: the caller calls `update`.
        show: False never draws.
        options: those of tqdm, such as `total`, `unit` and `desc`.
    """
    return Bar(items, disable=None if show else True, **options)

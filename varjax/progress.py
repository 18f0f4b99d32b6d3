"""Progress bars for people who watch a terminal; a log file gets none."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any


class _Silent:
    """What a bar of tqdm offers, without drawing anything."""

    n = 0

    def __init__(self, items: Iterable[Any] | None):
        self._items = items

    def __iter__(self) -> Any:
        return iter(self._items or ())

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


def progress_bar(items: Iterable[Any] | None = None, *, show: bool = True, **options: Any) -> Any:
    """A progress bar on standard error; it needs tqdm, and is silent where that is not installed.

    Nothing is drawn where standard error is not a terminal: each refresh of a bar would add a line to a log file.

    Args:
        items: what to iterate over; None: the caller calls `update`.
        show: False never draws.
        **options: those of tqdm, such as `total`, `unit` and `desc`.

    Returns:
        A bar of tqdm, or an object that takes the same calls.
    """
    if importlib.util.find_spec("tqdm") is None:
        return _Silent(items)
    from tqdm import tqdm

    return tqdm(items, disable=None if show else True, **options)

"""The batches in which a model reads documents.

Letters: B rows of a batch, T positions.

A document is cut into windows of at most `max_length` tokens, `stride` tokens apart. Each of its tokens after the first
is scored exactly once, in the first window that reaches it. Windows are padded to one of a few lengths, so that a run
compiles few programs and short documents do not pay for long ones. Documents may come from a stream: only the windows
that wait for their batch to fill are held.

Where a document's windows depend on each other (`in_order`), each row reads one document after the other, one window
per batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

from analysis.text.encoding import Encoded
from varjax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Batch:
    """Windows side by side. Rows that fill up the last batch hold padding only."""

    ids: np.ndarray  # int32 [B, T]
    mask: np.ndarray  # bool [B, T], real tokens
    targets: np.ndarray  # int32 [B, T], the token that follows
    scored: np.ndarray  # bool [B, T], whether its loss counts here
    fresh: np.ndarray  # bool [B, T], real, and in no earlier window: what statistics count
    documents: np.ndarray  # int32 [B], index of the row's document, -1 for filling
    goes_on: np.ndarray  # bool [B], whether the row continues the window of the previous batch (`in_order`)
    start: int = 0  # positions of the previous batches (`in_order`)


class Window(NamedTuple):
    """One stretch of a document."""

    ids: np.ndarray  # int32 [size], or one more, the id that follows
    size: int  # tokens that are read
    seen: int  # the first of these tokens, which an earlier window has read
    document: int  # its index


def batches(
    documents: Iterable[Encoded],
    batch_size: int,
    max_length: int,
    stride: int | None = None,
    full_last: bool = False,
    one_by_one: bool = False,
) -> Iterator[Batch]:
    """Batch every window of every document.

    Args:
        documents: read once, as far as the batches need it.
        batch_size: rows of a batch at `max_length`; shorter windows come in proportionally more rows.
        max_length: tokens of the longest window.
        stride: tokens from one window's start to the next; None: `max_length`, no overlap.
        full_last: see `cut`.
        one_by_one: a document's windows come one after the other in one row, as in `in_order`.

    Yields:
        Batches as they fill up; unfilled ones come last.

    Raises:
        InputError: a size out of range.
    """
    if batch_size < 1 or max_length < 2:
        raise InputError(f"batch_size={batch_size} and max_length={max_length}: expected at least 1 and 2")
    lengths = sorted({-(-max_length // 4), -(-max_length // 2), max_length})
    each = (cut(document.ids, index, max_length, stride, full_last) for index, document in enumerate(documents))
    if one_by_one:
        yield from in_order(each, batch_size, lengths)
    else:
        rows = {length: batch_size * (max_length // length) for length in lengths}
        yield from packed(chain.from_iterable(each), rows)


def cut(
    ids: np.ndarray, document: int, max_length: int, stride: int | None = None, full_last: bool = False
) -> Iterator[Window]:
    """Cut one document into windows.

    Args:
        ids: int32 [n].
        document: its index.
        max_length: tokens of the longest window.
        stride: tokens from one window's start to the next; None: `max_length`, no overlap.
        full_last: for scoring only. The last window is moved back until it is `max_length` long, so that the tokens
            that it scores get the most context; a document's last id, which predicts nothing, is not read.

    Yields:
        The windows in order.

    Raises:
        InputError: `stride` is out of range.
    """
    stride = max_length if stride is None else stride
    if not 1 <= stride <= max_length:
        raise InputError(f"stride={stride}: expected 1 to max_length {max_length}")
    size, seen = len(ids) - full_last, 0
    for begin in range(0, size, stride):
        end = min(begin + max_length, size)
        start = max(end - max_length, 0) if full_last else begin
        yield Window(ids[start : end + 1], end - start, seen - start, document)
        seen = end
        if end == size:
            break


def packed(cuts: Iterable[Window], rows: Mapping[int, int]) -> Iterator[Batch]:
    """Batch windows with others of about their length.

    Args:
        cuts: the windows, none longer than the longest length.
        rows: of a batch, by its length in tokens.

    Yields:
        Batches as they fill up; unfilled ones come last.
    """
    lengths = sorted(rows)
    waiting: dict[int, list[Window]] = {length: [] for length in lengths}
    for window in cuts:
        length = next(length for length in lengths if window.size <= length)
        waiting[length].append(window)
        if len(waiting[length]) == rows[length]:
            yield _fill(waiting[length], rows[length], length)
            waiting[length] = []
    for length, left in waiting.items():
        if left:
            yield _fill(left, rows[length], length)


def in_order(documents: Iterable[Iterable[Window]], rows: int, lengths: Sequence[int]) -> Iterator[Batch]:
    """Batch windows so that each row reads one document after the other, one window per batch.

    Args:
        documents: the windows of each document, none longer than the longest length.
        rows: of a batch.
        lengths: of batches, in tokens, ascending; a batch has the first length that its longest window fits into.

    Yields:
        Batches in order.
    """
    waiting, start = iter(documents), 0
    reading: list[Iterator[Window]] = [iter(()) for _ in range(rows)]
    while True:
        together = [next(row, None) for row in reading]
        goes_on = np.array([window is not None for window in together])
        for row, window in enumerate(together):
            while window is None and (document := next(waiting, None)) is not None:
                reading[row] = iter(document)
                window = together[row] = next(reading[row], None)
        longest = max((window.size for window in together if window is not None), default=None)
        if longest is None:
            return
        length = next(length for length in lengths if longest <= length)
        yield dataclasses.replace(_fill(together, rows, length), goes_on=goes_on, start=start)
        start += length


def _fill(together: Sequence[Window | None], rows: int, length: int) -> Batch:
    ids, targets = np.zeros((rows, length), np.int32), np.zeros((rows, length), np.int32)
    mask, scored, fresh = (np.zeros((rows, length), bool) for _ in range(3))
    owners = np.full(rows, -1, np.int32)
    for row, window in enumerate(together):
        if window is None:
            continue
        size, following = window.size, window.ids[1:]
        owners[row] = window.document
        ids[row, :size] = window.ids[:size]
        mask[row, :size] = True
        fresh[row, window.seen : size] = True
        targets[row, : len(following)] = following
        # Position t predicts the token after it; a window scores those that no earlier one could.
        scored[row, window.seen : len(following)] = True
    return Batch(ids, mask, targets, scored, fresh, owners, np.zeros(rows, bool))

"""Documents as token ids, and the batches in which a model reads them.

Letters: B rows of a batch, T positions.

A document is cut into windows of at most `max_length` tokens, `stride` tokens apart; each of its tokens after the first
is scored exactly once, in the first window that reaches it. Windows are padded to one of a few lengths, so that a run
compiles a few programs and short documents do not pay for long ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from analysis.corpus import CorpusError, Document
from models.config import MoEConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class Encoded:
    """One document in token ids."""

    ids: np.ndarray  # int32 [n], the begin id in front where the tokenizer puts one
    id: str  # SHA-256 of the text
    group: str
    words: int  # white-space separated, the unit of word perplexity
    bytes: int  # of the text in UTF-8, the unit of bits per byte


@dataclasses.dataclass(frozen=True)
class Batch:
    """Windows side by side. Rows that fill up the last batch hold padding only."""

    ids: np.ndarray  # int32 [B, T]
    mask: np.ndarray  # bool [B, T], real tokens
    targets: np.ndarray  # int32 [B, T], the token that follows
    scored: np.ndarray  # bool [B, T], whether its loss counts here
    fresh: np.ndarray  # bool [B, T], real, and in no earlier window: what statistics count
    documents: np.ndarray  # int32 [B], index of the row's document, -1 for filling


def encode(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase | None, config: MoEConfig
) -> list[Encoded]:
    """Tokenise documents; those without two tokens have nothing to predict and are left out.

    Raises:
        CorpusError: no tokenizer, no document left, or ids that the model does not have.
    """
    if tokenizer is None:
        raise CorpusError("the model has no tokenizer; put its tokenizer.json or tokenizer.model beside config.json")
    kept = list(documents)
    texts = [document.text for document in kept]
    rows = tokenizer(texts, verbose=False)["input_ids"] if texts else []
    encoded = [
        Encoded(np.asarray(ids, np.int32), doc.id, doc.group, len(doc.text.split()), len(doc.text.encode()))
        for doc, ids in zip(kept, rows, strict=True)
        if len(ids) > 1
    ]
    if not encoded:
        raise CorpusError(
            f"none of the {len(kept)} documents holds two tokens; choose another dataset, split or number of samples"
        )
    largest = max(int(document.ids.max()) for document in encoded)
    if largest >= config.vocab_size:
        raise CorpusError(f"the tokenizer gives id {largest} but the model's vocab_size is {config.vocab_size}")
    return encoded


def batches(
    documents: Sequence[Encoded], batch_size: int, max_length: int, stride: int | None = None
) -> Iterator[Batch]:
    """Every window of every document, shortest lengths first, in the documents' order within a length.

    Args:
        batch_size: rows of a batch at `max_length`; shorter windows come in proportionally more rows.
        max_length: tokens of the longest window.
        stride: tokens from one window's start to the next; None: `max_length`, no overlap.
    """
    if batch_size < 1 or max_length < 2:
        raise ValueError(f"batch_size={batch_size} and max_length={max_length}: expected at least 1 and 2")
    stride = max_length if stride is None else stride
    if not 1 <= stride <= max_length:
        raise ValueError(f"stride={stride}: expected 1 to max_length {max_length}")
    lengths = sorted({-(-max_length // 4), -(-max_length // 2), max_length})
    buckets: dict[int, list[tuple[int, int, int, int]]] = {length: [] for length in lengths}
    for index, document in enumerate(documents):
        seen = 0
        for start in range(0, len(document.ids), stride):
            end = min(start + max_length, len(document.ids))
            length = next(length for length in lengths if end - start <= length)
            buckets[length].append((index, start, end, seen))
            seen = end
            if end == len(document.ids):
                break
    for length, windows in buckets.items():
        rows = batch_size * (max_length // length)
        for first in range(0, len(windows), rows):
            yield _fill(documents, windows[first : first + rows], rows, length)


def num_batches(documents: Sequence[Encoded], batch_size: int, max_length: int, stride: int | None = None) -> int:
    """How many batches `batches` will give, for a progress bar."""
    return sum(1 for _ in batches(documents, batch_size, max_length, stride))


def _fill(documents: Sequence[Encoded], windows: Sequence[tuple[int, int, int, int]], rows: int, length: int) -> Batch:
    ids, targets = np.zeros((rows, length), np.int32), np.zeros((rows, length), np.int32)
    mask, scored, fresh = (np.zeros((rows, length), bool) for _ in range(3))
    owners = np.full(rows, -1, np.int32)
    for row, (index, start, end, seen) in enumerate(windows):
        whole, size = documents[index].ids, end - start
        owners[row] = index
        ids[row, :size] = whole[start:end]
        mask[row, :size] = True
        fresh[row, seen - start : size] = True
        following = whole[start + 1 : end + 1]
        targets[row, : len(following)] = following
        # Position t predicts token start + t + 1; a window scores those that no earlier one could.
        scored[row, max(seen - start, 0) : len(following)] = True
    return Batch(ids, mask, targets, scored, fresh, owners)

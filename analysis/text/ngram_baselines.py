"""Unigram and bigram models, which a useful language model must beat.

Letters: V vocabulary, n tokens of a document.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from analysis.text.encoding import Encoded

DISCOUNT = 0.75  # absolute discounting (Ney, Essen and Kneser 1994)


def ngram_losses(train: Sequence[Encoded], test: Sequence[Encoded], vocab_size: int) -> dict[str, float]:
    """Score texts under a unigram and a bigram model.

    The unigram model adds one to every count. The bigram model uses absolute discounting and is interpolated with the
    unigram model.

    Args:
        train: documents that the models are counted on.
        test: documents that are scored.
        vocab_size: V.

    Returns:
        Nats per token by model, over all tokens but each document's first.
    """
    counts = np.ones(vocab_size)
    for document in train:
        counts += np.bincount(document.ids[1:], minlength=vocab_size)
    unigram = counts / counts.sum()

    pairs, pair_counts = np.unique(np.concatenate([_pairs(d.ids, vocab_size) for d in train]), return_counts=True)
    followers = np.bincount(pairs // vocab_size, minlength=vocab_size)  # distinct successors of each id
    totals = np.bincount(pairs // vocab_size, weights=pair_counts, minlength=vocab_size)

    asked = np.concatenate([_pairs(document.ids, vocab_size) for document in test])
    first, second = np.divmod(asked, vocab_size)
    place = np.minimum(np.searchsorted(pairs, asked), len(pairs) - 1)
    seen = np.where(pairs[place] == asked, pair_counts[place] - DISCOUNT, 0)
    known = np.maximum(totals[first], 1)
    rest = np.where(totals[first] > 0, DISCOUNT * followers[first] / known, 1)
    bigram = seen / known + rest * unigram[second]
    return {"unigram": float(-np.log(unigram[second]).mean()), "bigram": float(-np.log(bigram).mean())}


def _pairs(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """int64 [n - 1]: each token and its predecessor as one number."""
    return ids[:-1].astype(np.int64) * vocab_size + ids[1:]

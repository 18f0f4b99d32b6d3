"""Which answers a table of bounded size keeps: those that remove the most error.

Letters: R keys, E experts, N answers of a layer, D hidden size.

Where an answer is not kept, that of the longest shorter key stands in, and where there is none the expert runs. All
answers of a layer take the same bytes, so the ones that are worth most are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from varjax.answers import Answers
from varjax.keys import ANY
from varjax.routing import NO_ANSWER
from varjax.shrinkage import shrunk


def most_valuable(answers: Answers, used: Mapping[int, np.ndarray], bound: int, shrinkage: float) -> Answers:
    """The same answers, but in every layer at most `bound` have pairs that they belong to.

    What experts say over all tokens (order 0) stands in for no key: where it is not in use, it stays and counts for
    nothing.

    Args:
        used: layer -> int [U], the answers that a table would look up; NO_ANSWER among them counts for nothing.
        bound: answers per layer.
        shrinkage: as in `varjax.shrinkage.shrunk`.
    """
    entry = answers.entry.copy()
    for a, layer in enumerate(answers.layers):
        candidates = used[layer][used[layer] != NO_ANSWER]
        if len(candidates) <= bound:
            continue
        best = np.argsort(-worth(answers, layer, shrinkage)[candidates], kind="stable")[:bound]
        kept = np.zeros(answers.count.shape[1] + 1, bool)  # the last: NO_ANSWER itself
        kept[candidates[best]] = True
        kept[np.setdiff1d(_unconditional(answers, a), candidates)] = True
        kept[NO_ANSWER] = False
        entry[a] = np.where(kept[entry[a]], entry[a], NO_ANSWER)
    return replace(answers, entry=entry)


def worth(answers: Answers, layer: int, shrinkage: float) -> np.ndarray:
    """float64 [N]: how much squared error each answer removes, over all occurrences and weighted by the gate.

    It is mass |answer - stand-in|^2, where the stand-in is what would be said without it: the same expert's answer at
    the longest shorter key, or nothing. What an expert says over all tokens (order 0) stands in for no key.

    Args:
        layer: one of `answers.layers`.
        shrinkage: as in `varjax.shrinkage.shrunk`.
    """
    a = answers.layers.index(layer)
    estimate = shrunk(answers, layer, shrinkage)
    silent = (estimate.parent == NO_ANSWER) | np.isin(estimate.parent, _unconditional(answers, a))
    instead = np.where(silent[:, None], np.float32(0), estimate.answers[estimate.parent])
    away = estimate.answers - instead
    return answers.mass[a] * np.einsum("nd,nd->n", away, away, dtype=np.float64)


def _unconditional(answers: Answers, a: int) -> np.ndarray:
    """int32 [E]: the answers of order 0 in the layer `answers.layers[a]`."""
    return answers.entry[a][(answers.keys == ANY).all(axis=1)].reshape(-1)

"""Which answers are collected where memory is bounded, and which a table of bounded size keeps.

Letters: A layers that are collected, R keys, C key width, E experts, N answers of a layer, D hidden size.

Where an answer is not kept, that of the longest shorter key stands in, and where there is none the expert runs. All
answers of a layer take the same bytes, so the ones that are worth most are kept: those that remove the most error. What
an answer will be worth is not known before it is collected, but what the gate thought of the expert at the key is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from varjax.answers import Answers
from varjax.keys import ANY, KeyIndex
from varjax.routing import NO_ANSWER
from varjax.shrinkage import shrunk
from varjax.stats import RoutingStats


def likeliest(stats: RoutingStats, keys: np.ndarray, layers: Sequence[int], bound: int) -> np.ndarray:
    """bool [A, R, E]: in every layer the `bound` pairs of a key and an expert with the largest squared gate weight.

    That is n p^2 for n occurrences and a mean gate probability p. Pairs that the statistics know nothing of are left
    out.

    Args:
        stats: of the same model, over text of the kind that will be read.
        keys: int32 [R, C], the candidates.
        layers: those to collect.
        bound: pairs per layer.
    """
    row = KeyIndex.build(stats.keys).rows(keys)
    wanted = np.zeros((len(layers), len(keys), stats.num_experts), bool)
    for a, layer in enumerate(layers):
        count = np.where(row < 0, 0, stats.count[layer, row])[:, None]
        mass = np.where(count > 0, np.square(stats.sum_probs[layer, row]) / np.maximum(count, 1), 0).reshape(-1)
        best = np.argsort(-mass, kind="stable")[:bound]
        wanted[a].reshape(-1)[best] = mass[best] > 0
    return wanted


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

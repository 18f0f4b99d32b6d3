"""From the means of past occurrences to estimates of other text: each answer leans on the one above it.

Letters: R rows (keys), C key width, E experts, N answers of a layer, D hidden size.

Above an answer stands the same expert's answer at the longest shorter key, up to that of order 0 (Katz 1987 backs off
in the same order). Few occurrences say little, so a rare key's answer is drawn toward the one above.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from varjax.answers import Answers
from varjax.errors import InputError
from varjax.keys import ANY, KeyIndex
from varjax.routing import NO_ANSWER


class Estimate(NamedTuple):
    """What is looked up in one layer."""

    answers: np.ndarray  # float32 [N, D]
    deviation: np.ndarray  # float32 [N], root mean square distance of an output from its answer, on other text
    parent: np.ndarray  # int32 [N], the answer that each one shrank toward, NO_ANSWER for those of order 0


def shrunk(answers: Answers, layer: int, shrinkage: float) -> Estimate:
    """The answers of one layer as estimates of what the experts will say on other text.

    An answer of n occurrences is s mean + (1 - s) parent with s = n / (n + k0), n in units of the layer's mean squared
    gate weight; the parent is shrunk already. Its variance is that of the occurrences about the shrunk answer, where
    their own spread counts (n - 1 + 2 s) / (n - 1) times, for the mean was fitted to them; it shrinks toward the
    parent's with n - 1 against k0 + 1. Where nothing stands above and there was one occurrence, nothing is known of the
    spread: the variance is the layer's mean squared output, as if there were no answer.
    Distilled answers are used as they are, with the deviations that their means had: the plan stays what it was.

    Args:
        layer: one of `answers.layers`.
        shrinkage: k0, how many occurrences the prior weighs.

    Raises:
        InputError: the layer was not collected.
    """
    if layer not in answers.layers:
        raise InputError(f"there are no answers of layer {layer}; collected were the layers {list(answers.layers)}")
    a = answers.layers.index(layer)
    mean, mass, m2, count = (getattr(answers, name)[a] for name in ("mean", "mass", "m2", "count"))
    parent, depth = lineage(answers.keys, answers.entry[a], len(mass))
    if answers.distilled:
        return Estimate(np.asarray(mean, np.float32), np.sqrt(m2 / _divisor(mass)).astype(np.float32), parent)
    prior = shrinkage * mass.sum() / max(count.sum(), 1)
    freedom = np.maximum(count - 1, 0)
    silent = np.sum(m2 + mass * _squared(mean)) / _divisor(mass.sum())  # variance of an answer that says nothing

    rows, variance = np.array(mean, np.float32), np.zeros(len(mass))
    for level in range(depth.max(initial=0) + 1):  # every parent before its children
        here = np.flatnonzero(depth == level)
        root = parent[here] == NO_ANSWER
        share = np.where(root, 1.0, mass[here] / _divisor(mass[here] + prior))
        rows[here] = share[:, None] * mean[here] + (1 - share)[:, None] * rows[parent[here]]
        fitted = (freedom[here] + 2 * share) / np.maximum(freedom[here], 1)
        own = fitted * m2[here] / _divisor(mass[here]) + _squared(mean[here] - rows[here])
        trust = np.where(root, freedom[here] > 0, freedom[here] / (freedom[here] + shrinkage + 1))
        variance[here] = trust * own + (1 - trust) * np.where(root, silent, variance[parent[here]])
    return Estimate(rows, np.sqrt(variance).astype(np.float32), parent)


def lineage(keys: np.ndarray, entry: np.ndarray, num_answers: int) -> tuple[np.ndarray, np.ndarray]:
    """int32 [N] each: the answer above each one, NO_ANSWER where there is none, and how many stand above it.

    Args:
        keys: int32 [R, C].
        entry: int32 [R, E], of one layer.
        num_answers: N.
    """
    above = parents(keys)
    inherited = inherit(keys, entry, above)
    parent, depth = np.full(num_answers, NO_ANSWER, np.int32), np.zeros(num_answers, np.int32)
    for rows in _by_order(keys, above):
        known = (entry[rows] != NO_ANSWER) & (inherited[above[rows]] != NO_ANSWER)
        own, upper = entry[rows][known], inherited[above[rows]][known]
        parent[own], depth[own] = upper, 1 + depth[upper]
    return parent, depth


def inherit(keys: np.ndarray, entry: np.ndarray, above: np.ndarray | None = None) -> np.ndarray:
    """int32 [R, E]: `entry` of one layer, with the answer of the longest shorter key where a key has none.

    Args:
        keys: int32 [R, C].
        entry: int32 [R, E].
        above: `parents(keys)`, where it is known already.
    """
    found, above = entry.copy(), parents(keys) if above is None else above
    for rows in _by_order(keys, above):
        found[rows] = np.where(found[rows] != NO_ANSWER, found[rows], found[above[rows]])
    return found


def parents(keys: np.ndarray) -> np.ndarray:
    """int32 [R]: the row of the longest key that forgets a key's earliest ids; -1 where there is none.

    With all orders collected this is the key one id shorter; that of order 0 is the last to be asked.
    """
    index = KeyIndex.build(keys)
    found = np.full(len(keys), -1, np.int32)
    shorter = keys
    for _ in range(keys.shape[1]):
        earliest = (shorter != ANY) & (np.cumsum(shorter != ANY, axis=1) == 1)
        shorter = np.where(earliest, np.int32(ANY), shorter)
        row = index.rows(shorter)
        found = np.where((found < 0) & (row != np.arange(len(keys))), row, found)
    return found


def _by_order(keys: np.ndarray, above: np.ndarray) -> list[np.ndarray]:
    """The rows with a parent, those of one order at a time, the shorter ones first."""
    order = (keys != ANY).sum(axis=1)
    return [np.flatnonzero((order == level) & (above >= 0)) for level in np.unique(order[above >= 0])]


def _squared(rows: np.ndarray) -> np.ndarray:
    """float64 [N]: squared norms of the rows [N, D]."""
    return np.einsum("nd,nd->n", rows, rows, dtype=np.float64)


def _divisor(mass: np.ndarray) -> np.ndarray:
    return np.where(mass > 0, mass, 1.0)

"""From the means of past occurrences to estimates on other text, and which answers are worth their bytes.

Letters: A layers that are collected, R rows (keys), C key width, E experts, N answers of a layer, D hidden size.

Each mean is shrunk toward its back-off parent, the same expert's answer at the longest shorter key, up to order 0 (Katz
1987 backs off in the same order), because few occurrences say little.

Where memory is bounded, the answers that remove the most error are kept: all answers of a layer take the same bytes.
Without an answer, the parent stands in, and without a parent the expert runs. Before an answer is collected its worth
is estimated from the gate's probabilities.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from varjax.answers import Answers
from varjax.errors import InputError
from varjax.keys import ANY, KeyIndex
from varjax.routing import NO_ANSWER
from varjax.stats import RoutingStats


class Estimate(NamedTuple):
    """What is looked up in one layer."""

    answers: np.ndarray  # float32 [N, D]
    deviation: np.ndarray  # float32 [N], root mean square distance of an output from its answer, on other text
    parent: np.ndarray  # int32 [N], the answer that each one shrank toward, NO_ANSWER for those of order 0
    inputs: np.ndarray  # float32 [N, X], the experts' mean inputs, shrunk alike


def shrunk(answers: Answers, layer: int, shrinkage: float) -> Estimate:
    """The answers of one layer as estimates of what the experts will say on other text.

    An answer of n occurrences is s mean + (1 - s) parent with s = n / (n + k0), n in units of the layer's mean squared
    gate weight; the parent is shrunk already. Its variance is that of the occurrences about the shrunk answer, where
    their own spread counts (n - 1 + 2 s) / (n - 1) times, because the mean was fitted to them; it shrinks towards the
    parent's with n - 1 against k0 + 1. Where there is no parent and there was one occurrence, nothing is known of the
    spread: the variance is the layer's mean squared output, as if there were no answer.
    Distilled answers are used as they are, with the deviations that their means had: the plan does not change.

    Args:
        answers: as collected.
        layer: one of `answers.layers`.
        shrinkage: k0, weight of the prior in occurrences.

    Returns:
        The estimates.

    Raises:
        InputError: the layer was not collected.
    """
    if layer not in answers.layers:
        raise InputError(f"there are no answers of layer {layer}; collected were the layers {list(answers.layers)}")
    a = answers.layers.index(layer)
    mean, inputs, mass, m2, count = (getattr(answers, name)[a] for name in ("mean", "inputs", "mass", "m2", "count"))
    parent, depth = lineage(answers.keys, answers.entry[a], len(mass))
    if answers.distilled:
        rows, read = np.asarray(mean, np.float32), np.asarray(inputs, np.float32)
        return Estimate(rows, np.sqrt(m2 / _divisor(mass)).astype(np.float32), parent, read)
    prior = shrinkage * mass.sum() / max(count.sum(), 1)
    freedom = np.maximum(count - 1, 0)
    silent = np.sum(m2 + mass * _squared(mean)) / _divisor(mass.sum())  # variance of an answer that says nothing

    rows, read, variance = np.array(mean, np.float32), np.array(inputs, np.float32), np.zeros(len(mass))
    for level in range(depth.max(initial=0) + 1):  # every parent before its children
        here = np.flatnonzero(depth == level)
        root = parent[here] == NO_ANSWER
        share = np.where(root, 1.0, mass[here] / _divisor(mass[here] + prior))
        for shrinking, own in ((rows, mean), (read, inputs)):
            shrinking[here] = share[:, None] * own[here] + (1 - share)[:, None] * shrinking[parent[here]]
        fitted = (freedom[here] + 2 * share) / np.maximum(freedom[here], 1)
        scatter = fitted * m2[here] / _divisor(mass[here]) + _squared(mean[here] - rows[here])
        trust = np.where(root, freedom[here] > 0, freedom[here] / (freedom[here] + shrinkage + 1))
        variance[here] = trust * scatter + (1 - trust) * np.where(root, silent, variance[parent[here]])
    return Estimate(rows, np.sqrt(variance).astype(np.float32), parent, read)


def lineage(keys: np.ndarray, entry: np.ndarray, num_answers: int) -> tuple[np.ndarray, np.ndarray]:
    """The parents of the answers of one layer.

    Args:
        keys: int32 [R, C].
        entry: int32 [R, E].
        num_answers: N.

    Returns:
        int32 [N], the parent of each answer, NO_ANSWER for none; and int32 [N], how many ancestors it has.
    """
    above = _parents(keys)
    inherited = inherit(keys, entry, above)
    parent, depth = np.full(num_answers, NO_ANSWER, np.int32), np.zeros(num_answers, np.int32)
    for rows in _by_order(keys, above):
        known = (entry[rows] != NO_ANSWER) & (inherited[above[rows]] != NO_ANSWER)
        own, upper = entry[rows][known], inherited[above[rows]][known]
        parent[own], depth[own] = upper, 1 + depth[upper]
    return parent, depth


def inherit(keys: np.ndarray, entry: np.ndarray, above: np.ndarray | None = None) -> np.ndarray:
    """The answers of one layer, with that of the longest shorter key where a key has none.

    Args:
        keys: int32 [R, C].
        entry: int32 [R, E].
        above: `_parents(keys)`, where it is known already.

    Returns:
        int32 [R, E], NO_ANSWER where no shorter key has one either.
    """
    found, above = entry.copy(), _parents(keys) if above is None else above
    for rows in _by_order(keys, above):
        found[rows] = np.where(found[rows] != NO_ANSWER, found[rows], found[above[rows]])
    return found


def _parents(keys: np.ndarray) -> np.ndarray:
    """int32 [R]: the row of the longest key that lacks a key's earliest ids, order 0 last; -1 where there is none."""
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


def likeliest(stats: RoutingStats, keys: np.ndarray, layers: Sequence[int], bound: int) -> np.ndarray:
    """The pairs of key and expert that are worth room for an answer: those with the largest squared gate weight.

    That is n p^2 for n occurrences and a mean gate probability p. Pairs that the statistics do not know are left out.

    Args:
        stats: of the same model, over text of the kind that will be read.
        keys: int32 [R, C], the candidates.
        layers: those to collect.
        bound: pairs per layer.

    Returns:
        bool [A, R, E], at most `bound` of them true in each layer.
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

    Constant answers of order 0 stand in for no key: where they are not in use, they stay and do not count. Affine ones
    stand in for whatever is left out, so they count.

    Args:
        answers: as collected.
        used: layer -> int [U], the answers that a table would look up; NO_ANSWER among them does not count.
        bound: answers per layer.
        shrinkage: as in `shrunk`.

    Returns:
        Answers with fewer pairs.
    """
    entry = answers.entry.copy()
    for a, layer in enumerate(answers.layers):
        candidates = used[layer][used[layer] != NO_ANSWER]
        if answers.affine[a]:
            candidates = np.union1d(candidates, np.setdiff1d(_unconditional(answers, a), [NO_ANSWER]))
        if len(candidates) <= bound:
            continue
        best = np.argsort(-_worth(answers, layer, shrinkage)[candidates], kind="stable")[:bound]
        kept = np.zeros(answers.count.shape[1] + 1, bool)  # the last: NO_ANSWER itself
        kept[candidates[best]] = True
        kept[np.setdiff1d(_unconditional(answers, a), candidates)] = True
        kept[NO_ANSWER] = False
        entry[a] = np.where(kept[entry[a]], entry[a], NO_ANSWER)
    return replace(answers, entry=entry)


def _worth(answers: Answers, layer: int, shrinkage: float) -> np.ndarray:
    """float64 [N]: how much squared error each answer removes, over all occurrences and weighted by the gate.

    It is mass |answer - stand-in|^2, where the stand-in is what would be used without it: the same expert's answer at
    the longest shorter key, or nothing. Constant answers of order 0 stand in for no key. Two affine answers of an
    expert have the same map, so that they differ by the same vector for every input.
    """
    a = answers.layers.index(layer)
    estimate = shrunk(answers, layer, shrinkage)
    silent = estimate.parent == NO_ANSWER
    if not answers.affine[a]:
        silent |= np.isin(estimate.parent, _unconditional(answers, a))
    away = estimate.answers - np.where(silent[:, None], np.float32(0), estimate.answers[estimate.parent])
    if answers.maps is not None and answers.affine[a]:
        moved = estimate.inputs - np.where(silent[:, None], estimate.inputs, estimate.inputs[estimate.parent])
        away -= answers.maps.outputs(a, moved, answers.experts(layer))
    return answers.mass[a] * np.einsum("nd,nd->n", away, away, dtype=np.float64)


def _unconditional(answers: Answers, a: int) -> np.ndarray:
    """int32 [E]: the answers of order 0 in the layer `answers.layers[a]`."""
    return answers.entry[a][(answers.keys == ANY).all(axis=1)].reshape(-1)

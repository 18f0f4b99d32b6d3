"""What the experts say at each key: the mean output of every expert over the occurrences at which it was chosen.

Letters: A layers that are collected, R rows (keys), C key width, E experts, N answers of a layer, O orders, B
sequences, T positions, L layers, K experts per token, D hidden size.

An answer belongs to a key *and* an expert. The gate is nearly free and always runs, so a plan that drops some of the
gate's experts knows which, and how much each would have weighed: the sum of their answers, weighted, stands in for them
(`routing.LayerAnswers.total`). One set of answers serves every policy, and is much nearer to the truth than one mean
per key of whatever a policy leaves out.

A gate weight w and an output f make the slot output w f. The answer is the r that brings sum |w f - w r|^2 to its
minimum, sum w^2 f / sum w^2: what matters is the error where the expert weighs much. One key is that of order 0, which
every token has: the mean output of each expert whatever the token, as MoNE (arXiv 2507.00390) puts in a pruned expert's
place. It is where shrinkage starts.

    sums = init(answers)                                         # on the device, float32
    sums = update(sums, rows, slot_outputs, routing, mask)       # one batch; jitted, the old sums are donated
    sums, answers = flush(sums, answers)                         # into the host's float64, about every 2**16 tokens
    estimate = shrunk(answers, shrinkage)                        # the rows to look up, and how far the truth is off
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from varjax.keys import ANY, KeyIndex, distinct
from varjax.routing import NO_ANSWER, Routing


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Answers:
    """Sums and means over the occurrences of (key, expert) pairs. Host arrays; row r is `keys[r]`."""

    keys: np.ndarray  # int32 [R, C], as in `varjax.keys`, that of order 0 among them
    layers: tuple[int, ...] = field(metadata={"static": True})  # [A], ascending
    entry: np.ndarray  # int32 [A, R, E], the answer of an expert at a key, NO_ANSWER where there is none
    mean: np.ndarray  # float64 or float32 [A, N, D]; 0 where there are no occurrences
    mass: np.ndarray  # float64 [A, N], squared gate weights, summed over the occurrences
    square: np.ndarray  # float64 [A, N], squared norms of the slot outputs, summed
    count: np.ndarray  # int64 [A, N], occurrences
    nonfinite: np.ndarray  # int64 [A], slots left out because an expert gave NaN or infinity
    # The means were trained: they are used as they are, not shrunk.
    distilled: bool = field(default=False, metadata={"static": True})

    @classmethod
    def empty(cls, keys: np.ndarray, layers: Sequence[int], num_experts: int, hidden_size: int) -> Answers:
        """No occurrence yet; room for every expert at every key int32 [R, C], and at that of order 0 in front."""
        keys = np.concatenate([np.full((1, keys.shape[1]), ANY, np.int32), np.asarray(keys, np.int32)])
        entry = np.arange(len(keys) * num_experts, dtype=np.int32).reshape(len(keys), num_experts)
        return _nothing(keys, tuple(layers), np.broadcast_to(entry, (len(layers), *entry.shape)), hidden_size)

    @property
    def orders(self) -> tuple[int, ...]:
        """The context orders among the keys, 0 included."""
        return tuple(np.unique((self.keys != ANY).sum(axis=1)).tolist())


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AnswerSums:
    """One window of occurrences on the device."""

    entry: Array  # int32 [A, R, E]
    total: Array  # float32 [A, N, D], gate weight times slot output
    mass: Array  # float32 [A, N]
    square: Array  # float32 [A, N]
    count: Array  # int32 [A, N]
    nonfinite: Array  # int32 [A]
    layers: tuple[int, ...] = field(metadata={"static": True})


def init(answers: Answers) -> AnswerSums:
    """An empty window for the pairs of `answers`."""
    shape = answers.count.shape
    return AnswerSums(
        entry=jnp.asarray(answers.entry),
        total=jnp.zeros(answers.mean.shape, jnp.float32),
        mass=jnp.zeros(shape, jnp.float32),
        square=jnp.zeros(shape, jnp.float32),
        count=jnp.zeros(shape, jnp.int32),
        nonfinite=jnp.zeros(len(answers.layers), jnp.int32),
        layers=answers.layers,
    )


@partial(jax.jit, donate_argnums=0)
def update(sums: AnswerSums, rows: Array, slot_outputs: Array, routing: Routing, mask: Array) -> AnswerSums:
    """Adds one batch, run with all experts.

    Args:
        sums: donated, not to be used again.
        rows: int32 [O, B, T], from `keys.find_orders`; negative where there is no key. An occurrence counts at each.
        slot_outputs: [A, B, T, K, D], each slot's gate-weighted expert output in the layers `sums.layers`.
        routing: [L, B, T, K], the learned routers' decisions in all layers.
        mask: bool [B, T], False at padding and at tokens to leave out.
    """
    if len(slot_outputs) != len(sums.layers):
        raise ValueError(f"need the slot outputs of layers {sums.layers}, got {len(slot_outputs)} layers")
    num_answers, hidden_size = sums.total.shape[1:]
    num_experts = sums.entry.shape[-1]
    total, mass, square, count, nonfinite = sums.total, sums.mass, sums.square, sums.count, sums.nonfinite
    with jax.named_scope("answers_update"):
        for a, layer in enumerate(sums.layers):
            outputs = slot_outputs[a].astype(jnp.float32)  # [B, T, K, D]
            experts, weights = routing.experts[layer], routing.weights[layer].astype(jnp.float32)
            used = mask[..., None] & (experts < num_experts)
            sound = jnp.all(jnp.isfinite(outputs), axis=-1)
            nonfinite = nonfinite.at[a].add(jnp.sum(used & ~sound, dtype=jnp.int32))
            outputs = jnp.where(sound[..., None], outputs, 0.0)
            weighted = (weights[..., None] * outputs).reshape(-1, hidden_size)
            squared = jnp.sum(jnp.square(outputs), axis=-1).reshape(-1)
            for row in rows:
                found = sums.entry.at[a, row[..., None], experts].get(mode="clip")
                counts = used & sound & (row >= 0)[..., None] & (found != NO_ANSWER)
                place = jnp.where(counts, found, num_answers).reshape(-1)  # N: written nowhere
                total = total.at[a, place].add(weighted, mode="drop")
                mass = mass.at[a, place].add(jnp.square(weights).reshape(-1), mode="drop")
                square = square.at[a, place].add(squared, mode="drop")
                count = count.at[a, place].add(1, mode="drop")
    return replace(sums, total=total, mass=mass, square=square, count=count, nonfinite=nonfinite)


def flush(sums: AnswerSums, answers: Answers) -> tuple[AnswerSums, Answers]:
    """Move the window into the host's means, and begin the next one."""
    answers = absorb(sums, answers)
    return init(answers), answers


def absorb(sums: AnswerSums, answers: Answers) -> Answers:
    """The host's means with a window in them. Windows of several devices are absorbed one after the other."""
    fresh = np.asarray(sums.mass, np.float64)
    mass = answers.mass + fresh
    total = np.asarray(sums.total)
    mean = np.empty(answers.mean.shape)
    for a, old in enumerate(answers.mean):  # layer by layer: all at once would fill the memory with temporaries
        mean[a] = old + (total[a] - fresh[a, :, None] * old) / _divisor(mass[a])[:, None]
    return replace(
        answers,
        mean=mean,
        mass=mass,
        square=answers.square + np.asarray(sums.square, np.float64),
        count=answers.count + np.asarray(sums.count, np.int64),
        nonfinite=answers.nonfinite + np.asarray(sums.nonfinite, np.int64),
    )


def merge(a: Answers, b: Answers) -> Answers:
    """The means of both together, over the union of their keys and pairs: those of `a`, then the new ones of `b`.

    Raises:
        ValueError: different layers, experts or hidden sizes, or answers that were distilled.
    """
    ours, theirs = ((one.layers, one.entry.shape[-1], one.mean.shape[-1], one.distilled) for one in (a, b))
    if ours != theirs or a.distilled:
        raise ValueError(
            "answers merge only over the same layers, experts and hidden size, and not when distilled; "
            f"these have (layers, experts, hidden size, distilled) {ours} and {theirs}"
        )
    keys, place = distinct(np.concatenate([a.keys, b.keys]))
    parts = [(a, place[: len(a.keys)]), (b, place[len(a.keys) :])]
    num_layers, _, num_experts = a.entry.shape
    there = np.zeros((num_layers, len(keys), num_experts), bool)
    for part, rows in parts:
        there[:, rows] |= part.entry != NO_ANSWER
    entry = np.where(there, np.cumsum(there.reshape(num_layers, -1), axis=1).reshape(there.shape) - 1, NO_ANSWER)
    whole = _nothing(keys, a.layers, entry, a.mean.shape[-1])
    for part, rows in parts:
        for layer in range(num_layers):
            pairs = part.entry[layer] != NO_ANSWER
            source, target = part.entry[layer][pairs], entry[layer][rows][pairs]
            whole.count[layer, target] += part.count[layer, source]
            whole.square[layer, target] += part.square[layer, source]
            whole.mass[layer, target] += part.mass[layer, source]
            share = (part.mass[layer, source] / _divisor(whole.mass[layer, target]))[:, None]
            whole.mean[layer, target] += share * (part.mean[layer, source] - whole.mean[layer, target])
    return replace(whole, nonfinite=a.nonfinite + b.nonfinite)


def pruned(answers: Answers) -> Answers:
    """Without the pairs that never occurred. As many answers in every layer: those that fill up belong to no pair."""
    there = [entry[entry != NO_ANSWER] for entry in answers.entry]
    kept = [np.sort(pairs[answers.count[a, pairs] > 0]) for a, pairs in enumerate(there)]
    size = max(map(len, kept))
    entry = np.full_like(answers.entry, NO_ANSWER)
    parts = _nothing(answers.keys, answers.layers, entry, answers.mean.shape[-1], size)
    for a, pairs in enumerate(kept):
        place = np.full(answers.count.shape[1] + 1, NO_ANSWER, np.int32)  # the last: NO_ANSWER itself
        place[pairs] = np.arange(len(pairs))
        entry[a] = place[answers.entry[a]]
        for name in ("mean", "mass", "square", "count"):
            getattr(parts, name)[a, : len(pairs)] = getattr(answers, name)[a, pairs]
    return replace(parts, entry=entry, nonfinite=answers.nonfinite, distilled=answers.distilled)


class Estimate(NamedTuple):
    """What is looked up in one layer."""

    answers: np.ndarray  # float32 [N, D]
    deviation: np.ndarray  # float32 [N], root mean square distance of an output from its answer, on other text
    parent: np.ndarray  # int32 [N], the answer that each one shrank towards, NO_ANSWER for those of order 0


def shrunk(answers: Answers, layer: int, shrinkage: float) -> Estimate:
    """The answers of one layer as estimates of what the experts will say on other text.

    An answer of n occurrences is (n mean + k0 parent) / (n + k0), n in units of the layer's mean squared gate weight;
    the parent is the same expert's answer at the longest shorter key, shrunk already. Its deviation is that of the
    occurrences from the shrunk answer, times (n + 1) / (n - 1) for having been fitted to them, shrunk likewise.
    Distilled answers are used as they are, with the deviations of the means.

    Args:
        layer: one of `answers.layers`.
        shrinkage: k0, how many occurrences the prior weighs.

    Raises:
        ValueError: the layer was not collected.
    """
    if layer not in answers.layers:
        raise ValueError(f"there are no answers of layer {layer}; collected were the layers {list(answers.layers)}")
    a = answers.layers.index(layer)
    mean, mass, square, count = (getattr(answers, name)[a] for name in ("mean", "mass", "square", "count"))
    parent, depth = lineage(answers.keys, answers.entry[a], len(mass))
    unit = mass.sum() / max(count.sum(), 1)
    prior = shrinkage * (unit if unit > 0 else 1.0)

    rows = np.asarray(mean, np.float32).copy()
    variance = np.zeros(len(mass))
    for level in range(depth.max(initial=0) + 1):  # every parent before its children
        here = np.flatnonzero(depth == level)
        root = parent[here] == NO_ANSWER
        above = np.where(root[:, None], np.float32(0), rows[parent[here]])
        share = (mass[here] / _divisor(mass[here] + prior))[:, None]
        rows[here] = np.where(root[:, None], mean[here], share * mean[here] + (1 - share) * above)
        inner = np.einsum("nd,nd->n", mean[here], rows[here], dtype=np.float64)
        norm = np.einsum("nd,nd->n", rows[here], rows[here], dtype=np.float64)
        own = np.maximum(square[here] - 2 * mass[here] * inner + mass[here] * norm, 0) / _divisor(mass[here])
        occurrences = count[here]
        own *= (occurrences + 1) / np.maximum(occurrences - 1, 1)
        trust = np.where(root, 1.0, np.maximum(occurrences - 1, 0) / (np.maximum(occurrences - 1, 0) + shrinkage + 1))
        variance[here] = trust * own + (1 - trust) * np.where(root, 0.0, variance[parent[here]])
    if answers.distilled:
        rows = np.asarray(mean, np.float32)
    return Estimate(rows, np.sqrt(variance).astype(np.float32), parent)


def lineage(keys: np.ndarray, entry: np.ndarray, num_answers: int) -> tuple[np.ndarray, np.ndarray]:
    """int32 [N] each: the answer above each one, NO_ANSWER where there is none, and how many stand above it.

    Args:
        keys: int32 [R, C].
        entry: int32 [R, E], of one layer.
        num_answers: N.
    """
    inherited = inherit(keys, entry)
    parent, depth = np.full(num_answers, NO_ANSWER, np.int32), np.zeros(num_answers, np.int32)
    above = parents(keys)
    order = (keys != ANY).sum(axis=1)
    for level in np.unique(order[above >= 0]):
        rows = np.flatnonzero((order == level) & (above >= 0))
        own = entry[rows] != NO_ANSWER
        parent[entry[rows][own]] = inherited[above[rows]][own]
        known = own & (inherited[above[rows]] != NO_ANSWER)
        depth[entry[rows][known]] = 1 + depth[inherited[above[rows]][known]]
    return parent, depth


def inherit(keys: np.ndarray, entry: np.ndarray) -> np.ndarray:
    """int32 [R, E]: `entry` [R, E] of one layer, with the answer of the longest shorter key where a key has none."""
    found, above = entry.copy(), parents(keys)
    order = (keys != ANY).sum(axis=1)
    for level in np.unique(order):
        rows = np.flatnonzero((order == level) & (above >= 0))
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
        row = np.asarray(index.find(jnp.asarray(shorter)))
        found = np.where((found < 0) & (row != np.arange(len(keys))), row, found)
    return found


def _nothing(
    keys: np.ndarray, layers: tuple[int, ...], entry: np.ndarray, hidden_size: int, size: int | None = None
) -> Answers:
    """No occurrence of any pair; room for as many answers as `entry` names, or `size`."""
    shape = (len(layers), int(entry.max(initial=NO_ANSWER)) + 1 if size is None else size)
    return Answers(
        keys=keys,
        layers=layers,
        entry=np.asarray(entry, np.int32),
        mean=np.zeros((*shape, hidden_size)),
        mass=np.zeros(shape),
        square=np.zeros(shape),
        count=np.zeros(shape, np.int64),
        nonfinite=np.zeros(len(layers), np.int64),
    )


def _divisor(mass: np.ndarray) -> np.ndarray:
    return np.where(mass > 0, mass, 1.0)

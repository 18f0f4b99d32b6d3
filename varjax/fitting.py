"""Fits the maps of affine answers (`varjax.affine`): reduced-rank regression in closed form.

Letters: A layers that are collected, R rows (keys), E experts, N answers of a layer, O orders, B sequences, T
positions, K experts per token, L layers, D hidden size, Q directions of the inputs that are looked at, r rank.

For an expert's slot with gate weight w, input x and output f, at the longest key that has an answer for it, let dx and
dy be w times the deviations of x and f from the shrunk means at that key. Sums of dx dx' and dx dy' over a text are all
that a ridge regression of dy on dx needs, and sums over another text say how well any map does there. So the second
text chooses the ridge, and a map that explains nothing there is left out.

Means that were taken over the same text know its tokens: a key that was seen once would explain itself. With mass M
(squared weights) of a key and the prior's mass P, the deviation from the mean of the *other* occurrences is
(M + P) / (M + P - w^2) times the one from the shrunk mean, and that is what is summed up. (The parent's mean, which has
more occurrences, is not corrected.)

    known = targets(answers, shrinkage, own_text=True)
    sums = init(moments)                                                        # on the device, float32
    sums = update(sums, rows, expert_outputs, routing, mask, expert_inputs, known)  # one batch; jitted
    moments = merge(sums, moments)                                              # into the host's float64
    maps = fit(moments, held_out, rank=64)

Reduced rank follows Izenman (1975): the directions written are the leading ones of what the full maps predict. The
directions read are the leading ones of all experts' maps together, in units of the inputs' spread. Where D^2 sums per
expert do not fit the memory, only Q directions of the inputs are looked at, a basis given beforehand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from varjax.affine import Maps
from varjax.answers import OUTLIER, Answers
from varjax.errors import InputError
from varjax.routing import NO_ANSWER, Routing
from varjax.shrinkage import inherit, shrunk

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # in units of the mean diagonal entry of the experts' `gram`
_TINY = 1e-30
_BLOCK = 256  # slots of one expert that are multiplied at a time


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Targets:
    """What deviations are measured from, in one layer."""

    entry: Any  # int32 [R, E], the answer at a key, or that of the longest shorter key, order 0 included
    mean: Any  # float32 [N, D], shrunk mean output
    inputs: Any  # float32 [N, D], shrunk mean input
    limit: Any  # float32 [], norm of an output above which it is an outlier and left out
    per_mass: Any  # float32 [N], 1 / (mass of an answer and of its prior); 0 for a text that is not in the means
    basis: Any  # float32 [D, Q], the directions of the inputs that are looked at; None: all
    layer: int = field(metadata={"static": True})  # its number


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Moments:
    """Sums over the slots of one layer, by expert. Host arrays in float64, or a part of a window in float32."""

    gram: Any  # [E, Q, Q], dx dx'
    cross: Any  # [E, Q, D], dx dy'
    power: Any  # [E], |dy|^2
    count: Any  # [E], slots

    @classmethod
    def empty(cls, num_experts: int, hidden_size: int, directions: int | None = None) -> Moments:
        """Sums of no slot.

        Args:
            num_experts: E.
            hidden_size: D.
            directions: Q; None: D, all of them.

        Returns:
            Host arrays.
        """
        seen = directions or hidden_size
        shapes = ((num_experts, seen, seen), (num_experts, seen, hidden_size), (num_experts,), (num_experts,))
        return cls(*map(np.zeros, shapes))


def directions_within(num_bytes: int, num_layers: int, num_experts: int, hidden_size: int) -> int:
    """How many directions of the inputs can be looked at in a given memory.

    Args:
        num_bytes: for the sums on each device.
        num_layers: A.
        num_experts: E.
        hidden_size: D.

    Returns:
        Q, from 1 to D.
    """
    each = num_bytes / (4 * num_layers * num_experts)  # Q^2 + Q D
    most = (math.sqrt(hidden_size**2 + 4 * each) - hidden_size) / 2
    return max(1, min(hidden_size, int(most)))


def leading_directions(answers: Answers, directions: int) -> np.ndarray | None:
    """The directions in which the mean inputs of the answers differ most, which stand for those of single inputs.

    Args:
        answers: with the experts' mean inputs.
        directions: Q.

    Returns:
        float32 [A, D, Q], orthonormal columns; None for all of them.
    """
    hidden_size = answers.inputs.shape[-1]
    if directions >= hidden_size:
        return None
    found = []
    for mass, inputs in zip(answers.mass, answers.inputs, strict=True):
        center = mass @ inputs / max(mass.sum(), _TINY)
        spread = (inputs - center).T @ (mass[:, None] * (inputs - center))
        found.append(np.linalg.eigh(spread)[1][:, : -directions - 1 : -1])
    return np.stack(found).astype(np.float32)


def targets(
    answers: Answers, shrinkage: float, *, own_text: bool, basis: np.ndarray | None = None
) -> tuple[Targets, ...]:
    """What the deviations of a text are measured from.

    Args:
        answers: with the experts' mean inputs.
        shrinkage: as in `varjax.shrinkage.shrunk`.
        own_text: whether the text is the one that the means were taken over.
        basis: float32 [A, D, Q], orthonormal columns; None: all directions of the inputs.

    Returns:
        The targets of each layer [A].

    Raises:
        InputError: the answers hold no mean inputs.
    """
    if not answers.has_inputs:
        raise InputError("the answers hold no mean inputs of the experts: collect them with inputs=True")
    found = []
    for a, layer in enumerate(answers.layers):
        estimate = shrunk(answers, layer, shrinkage)
        prior = shrinkage * answers.mass[a].sum() / max(answers.count[a].sum(), 1)
        mass = answers.mass[a] + np.where(estimate.parent == NO_ANSWER, 0, prior)
        per_mass = (own_text / np.where(mass > 0, mass, 1)).astype(np.float32)
        entry = inherit(answers.keys, answers.entry[a])
        limit = np.float32(OUTLIER * answers.typical[a] if answers.typical[a] > 0 else np.inf)
        rows = entry, estimate.answers, estimate.inputs, limit, per_mass
        found.append(Targets(*rows, None if basis is None else basis[a], layer))
    return tuple(found)


def init(moments: Sequence[Moments]) -> tuple[Moments, ...]:
    """An empty window.

    Args:
        moments: what the window will be added to, of each layer [A].

    Returns:
        Sums, all zero. They are arrays of the host, which the first `update` moves to the device.
    """
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), tuple(moments))


def emptied(sums: tuple[Moments, ...]) -> tuple[Moments, ...]:
    """Empty windows, made on their devices from others of the same shapes.

    Args:
        sums: the windows.

    Returns:
        Windows, each equal to what `init` makes.
    """
    return jax.tree.map(jnp.zeros_like, sums)


@partial(jax.jit, donate_argnums=0)
def update(
    sums: tuple[Moments, ...],
    rows: Array,
    expert_outputs: Sequence[Array],
    routing: Routing,
    mask: Array,
    expert_inputs: Sequence[Array],
    targets: tuple[Targets, ...],
) -> tuple[Moments, ...]:
    """Add one batch.

    Args:
        sums: a window; donated, not to be used again.
        rows: int32 [O, B, T], from `keys.find_orders`, the longest order last; negative for none.
        expert_outputs: A arrays [B, T, K, D], each slot's gate-weighted expert output in the layers of `targets`.
        routing: [L, B, T, K], the learned routers' decisions in all layers.
        mask: bool [B, T], False at padding and at tokens to leave out.
        expert_inputs: A arrays [B, T, D], what the experts read.
        targets: of the layers [A].

    Returns:
        The window with the batch.
    """
    longest = rows[0]
    for row in rows[1:]:
        longest = jnp.where(row >= 0, row, longest)
    added = []
    with jax.named_scope("moments_update"):
        for own, target, outputs, inputs in zip(sums, targets, expert_outputs, expert_inputs, strict=True):
            decided = Routing(routing.experts[target.layer], routing.weights[target.layer])
            added.append(_with_slots(own, *_deviations(target, longest, outputs, inputs, decided, mask)))
    return tuple(added)


def _deviations(
    target: Targets, row: Array, outputs: Array, inputs: Array, routing: Routing, mask: Array
) -> tuple[Array, Array, Array]:
    """dx [M, Q], dy [M, D] and expert int32 [M] of the M = B T K slots; E for one that does not count."""
    num_experts, hidden_size = target.entry.shape[1], target.mean.shape[-1]
    outputs = outputs.astype(jnp.float32)
    answer = target.entry.at[row[..., None], routing.experts].get(mode="clip")
    weights = routing.weights.astype(jnp.float32)
    others = 1 - jnp.square(weights) * target.per_mass[answer]  # the share of the mass that is not the slot's own
    counts = mask[..., None] & (row >= 0)[..., None] & (routing.experts < num_experts) & (answer != NO_ANSWER)
    # An output that is not finite is not below the limit either.
    counts &= (others > 1e-6) & (jnp.linalg.norm(outputs, axis=-1) <= weights * target.limit)
    dx = (inputs.astype(jnp.float32)[..., None, :] - target.inputs[answer]) * weights[..., None]
    dy = outputs - weights[..., None] * target.mean[answer]
    if target.basis is not None:
        dx = dx @ target.basis
    dx, dy = (jnp.where(counts[..., None], d / jnp.where(counts, others, 1.0)[..., None], 0.0) for d in (dx, dy))
    expert = jnp.where(counts, routing.experts, num_experts)
    return dx.reshape(-1, dx.shape[-1]), dy.reshape(-1, hidden_size), expert.reshape(-1)


def _with_slots(moments: Moments, dx: Array, dy: Array, expert: Array) -> Moments:
    """Adds the slots, sorted by expert and multiplied in blocks."""
    slots, num_experts = len(expert), len(moments.count)
    order = jnp.argsort(expert, stable=True).astype(jnp.int32)
    ends = jnp.cumsum(jnp.zeros(num_experts, jnp.int32).at[expert].add(1, mode="drop"), dtype=jnp.int32)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])
    last_block = jnp.cumsum((ends - starts + _BLOCK - 1) // _BLOCK, dtype=jnp.int32)

    def add(block: Array, totals: tuple[Array, Array]) -> tuple[Array, Array]:
        gram, cross = totals
        index = jnp.sum(last_block <= block, dtype=jnp.int32)  # the expert of the block
        before = jnp.where(index > 0, last_block[index - 1], 0)
        place = starts[index] + (block - before) * _BLOCK + jnp.arange(_BLOCK, dtype=jnp.int32)
        slot = jnp.where(place < ends[index], order[jnp.minimum(place, slots - 1)], slots)
        x, y = (one.at[slot].get(mode="fill", fill_value=0) for one in (dx, dy))
        return gram.at[index].add(x.T @ x), cross.at[index].add(x.T @ y)

    gram, cross = lax.fori_loop(0, last_block[-1], add, (moments.gram, moments.cross))
    power = moments.power.at[expert].add(jnp.sum(dy * dy, axis=-1), mode="drop")
    return Moments(gram, cross, power, moments.count.at[expert].add(1.0, mode="drop"))


def merge(a: Sequence[Moments], b: Sequence[Moments]) -> tuple[Moments, ...]:
    """The sums over two texts, or of a window and those so far.

    Args:
        a: of each layer.
        b: of the same layers, from deviations from the same means.

    Returns:
        Their sums in float64.
    """
    return jax.tree.map(lambda one, other: np.asarray(one, np.float64) + np.asarray(other), tuple(a), tuple(b))


def fit(moments: Sequence[Moments], held_out: Sequence[Moments], rank: int, basis: np.ndarray | None = None) -> Maps:
    """The maps that explain most of `moments`, with the ridge that does best on `held_out`.

    Args:
        moments: of the text that the maps are fitted to, of each layer.
        held_out: of other text, which chooses the ridge and says how much the maps leave unexplained.
        rank: r, at most Q.
        basis: float32 [A, D, Q], as given to `targets`; None: all directions.

    Returns:
        The maps. An expert whose map explains nothing of `held_out` has one that adds nothing.

    Raises:
        InputError: `rank` is out of range.
    """
    seen = moments[0].gram.shape[-1]
    if not 1 <= rank <= seen:
        raise InputError(f"rank={rank}: expected an integer from 1 to {seen}")
    found = []
    for a, layers in enumerate(zip(moments, held_out, strict=True)):
        ours, theirs = ((one.gram, one.cross, one.power) for one in layers)
        full, ridge = _ridge(ours, theirs)
        read, mix, write = _reduced(ours, full, ridge, rank)
        left = np.array([_missed(read @ m @ write, *held) for m, *held in zip(mix, *theirs, strict=True)])
        useless = left >= theirs[2]  # also where the other text has nothing of an expert
        mix[useless] = 0
        share = np.where(useless, 1, np.maximum(left, 0) / np.where(useless, 1, theirs[2]))
        found.append((read if basis is None else basis[a] @ read, mix, write, share))
    read, mix, write, share = (np.stack(column) for column in zip(*found, strict=True))
    kind = np.float32
    return Maps(read.astype(kind), mix.astype(kind), write.astype(kind), share)


def _ridge(
    ours: tuple[np.ndarray, np.ndarray, np.ndarray], theirs: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> tuple[np.ndarray, float]:
    """Full maps [E, Q, D] of one layer, and the ridge that is best on the held-out text."""
    gram, cross, _ = ours
    unit = np.trace(gram, axis1=1, axis2=2).sum() / max(gram.shape[-1] * len(gram), 1)
    values, vectors = np.linalg.eigh(gram)  # once for all ridges
    turned = vectors.swapaxes(1, 2) @ cross
    best, least = np.zeros_like(cross), np.inf
    ridges = [factor * unit + _TINY for factor in RIDGES]
    chosen = ridges[-1]
    for ridge in ridges:
        maps = vectors @ (turned / (np.maximum(values, 0) + ridge)[..., None])
        missed = sum(_missed(one, *held) for one, *held in zip(maps, *theirs, strict=True))
        if missed < least:
            best, least, chosen = maps, missed, ridge
    return best, chosen


def _reduced(
    ours: tuple[np.ndarray, np.ndarray, np.ndarray], full: np.ndarray, ridge: float, rank: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """read [Q, r], mix [E, r, r] and write [r, D] nearest to the full maps [E, Q, D] where the inputs lie."""
    gram, cross, _ = ours
    predicted = np.einsum("eqd,eqp,epf->df", full, gram, full, optimize=True)
    write = np.linalg.eigh(predicted)[1][:, : -rank - 1 : -1].T  # [r, D], the leading directions first
    values, vectors = np.linalg.eigh(gram.sum(axis=0) + ridge * np.eye(gram.shape[-1]))
    root = np.sqrt(np.maximum(values, _TINY))
    every = np.concatenate(list(full @ write.T), axis=1)  # [Q, E r]
    leading = np.linalg.svd((root[:, None] * vectors.T) @ every, full_matrices=False)[0][:, :rank]
    read = vectors @ (leading / root[:, None])  # the inputs have unit spread behind it
    inner = read.T @ gram @ read
    mix = np.linalg.solve(inner + ridge * read.T @ read, read.T @ cross @ write.T)
    return read, mix, write


def _missed(full: np.ndarray, gram: np.ndarray, cross: np.ndarray, power: float) -> float:
    """The squared error sum |dy - dx map|^2 of one expert's map [Q, D]."""
    return float(power - 2 * np.sum(full * cross) + np.sum(full * (gram @ full)))

"""What the experts say at each key: the mean output of every expert over the occurrences at which it was chosen.

Letters: A layers that are collected, R rows (keys), C key width, E experts, N answers of a layer, O orders, B
sequences, T positions, L layers, K experts per token, D hidden size.

An answer belongs to a key *and* an expert. The gate is nearly free and always runs, so a plan that drops some of the
gate's experts knows which ones and their weights: the weighted sum of their answers stands in for them
(`routing.LayerAnswers.total`). One set of answers serves every policy, and is more accurate than one mean per key of
whatever a policy leaves out.

With gate weight w and output f, the slot output is w f. The answer is the r that minimizes sum |w f - w r|^2, which is
sum w^2 f / sum w^2: the error matters where the expert weighs much. One key is that of order 0, which every token has:
the mean output of each expert over all tokens, as MoNE (arXiv 2507.00390) uses for pruned experts. Shrinkage starts
from it (`varjax.shrinkage`).

    sums = init(answers)                                       # on the device, float32
    sums = update(sums, rows, expert_outputs, routing, mask)   # one batch; jitted, the old sums are donated
    answers = absorb(sums, answers)                            # into the host's float64, about every 2**18 tokens
    estimate = shrunk(answers, layer, shrinkage)               # the rows to look up, and their expected error

Some tokens, mostly the first of a text, have outputs a hundred times larger than all others in a few layers (massive
activations, Sun et al. 2024, arXiv 2402.17762). A mean with one of them says nothing about the others, so outputs of
more than `OUTLIER` times the typical norm are left out and counted.

The device updates means instead of sums of outputs, and squared distances from them, so neither the length of a window
nor outputs that hardly differ cost digits. The host joins windows by the formula of Chan, Golub and LeVeque.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from varjax.affine import Maps
from varjax.errors import InputError
from varjax.keys import ANY, distinct
from varjax.routing import NO_ANSWER, Routing

OUTLIER = 8.0  # outputs that are larger, in units of the layer's median norm, are left out
_JOINED = 64  # answers that the host joins at a time: few enough for its caches, which takes half of the time


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Answers:
    """Means and sums over the occurrences of (key, expert) pairs. Host arrays; row r is `keys[r]`."""

    keys: np.ndarray  # int32 [R, C], as in `varjax.keys`, that of order 0 among them
    layers: tuple[int, ...] = field(metadata={"static": True})  # [A], ascending
    entry: np.ndarray  # int32 [A, R, E], the answer of an expert at a key, NO_ANSWER where there is none
    mean: np.ndarray  # float64 or float32 [A, N, D]; 0 where there are no occurrences
    mass: np.ndarray  # float64 [A, N], squared gate weights, summed over the occurrences
    m2: np.ndarray  # float64 [A, N], squared distance from the mean, times the squared gate weight, summed
    count: np.ndarray  # int64 [A, N], occurrences
    nonfinite: np.ndarray  # int64 [A], slots left out because an expert gave NaN or infinity
    typical: np.ndarray  # float64 [A], median norm of an expert's output, in the first batch; 0: nothing was read yet
    outliers: np.ndarray  # int64 [A, 2], slots left out as outliers: at the first token of a window, at other tokens
    inputs: np.ndarray  # float64 or float32 [A, N, X], mean input of the expert by the same weights; X is D or 0
    maps: Maps | None = None  # what makes answers affine (`varjax.fitting`); None: they are constant
    # The means were trained: they are used as they are, not shrunk, and m2 is mass times the deviation squared.
    distilled: bool = field(default=False, metadata={"static": True})

    @classmethod
    def empty(
        cls,
        keys: np.ndarray,
        layers: Sequence[int],
        num_experts: int,
        hidden_size: int,
        pairs: np.ndarray | None = None,
        inputs: bool = False,
    ) -> Answers:
        """Answers without any occurrence. All experts have room at the key of order 0, which comes first.

        Args:
            keys: int32 [R, C], without that of order 0.
            layers: numbers of the layers to collect, ascending.
            num_experts: E.
            hidden_size: D.
            pairs: bool [A, R, E], which experts have room at which keys (`varjax.shrinkage.likeliest`); None: all.
            inputs: whether the experts' mean inputs are collected too, which affine answers need.

        Returns:
            Answers with R + 1 keys.
        """
        shape = (len(layers), 1 + len(keys), num_experts)
        there = np.ones(shape, bool)
        if pairs is not None:
            there[:, 1:] = pairs
        keys = np.concatenate([np.full((1, keys.shape[1]), ANY, np.int32), np.asarray(keys, np.int32)])
        return _nothing(keys, tuple(layers), _numbered(there), hidden_size, hidden_size if inputs else 0)

    def experts(self, layer: int) -> np.ndarray:
        """Whose answers those of a layer are.

        Args:
            layer: one of `layers`.

        Returns:
            int32 [N]; 0 for those that only fill up the layer.
        """
        entry = self.entry[self.layers.index(layer)]
        found = np.zeros(self.count.shape[1], np.int32)
        row, expert = np.nonzero(entry != NO_ANSWER)
        found[entry[row, expert]] = expert
        return found

    @property
    def has_inputs(self) -> bool:
        """Whether the experts' mean inputs were collected, so that maps can be fitted."""
        return self.inputs.shape[-1] > 0

    @cached_property
    def affine(self) -> np.ndarray:
        """bool [A], the layers whose answers read the hidden state: those with a map that adds something."""
        if self.maps is None:
            return np.zeros(len(self.layers), bool)
        return np.asarray(self.maps.mix.any(axis=(1, 2, 3)))

    @property
    def useful_orders(self) -> tuple[int, ...]:
        """The orders that a search lets answer: an answer for every token (order 0) is of use only if it is affine."""
        return tuple(order for order in self.ngram_orders if order > 0 or self.affine.any())

    @property
    def ngram_orders(self) -> tuple[int, ...]:
        """The orders of the keys, 0 included, ascending."""
        return tuple(np.unique((self.keys != ANY).sum(axis=1)).tolist())


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AnswerSums:
    """One window of occurrences on the device."""

    entry: Array  # int32 [A, R, E]
    mean: Array  # float32 [A, N, D]
    mass: Array  # float32 [A, N]
    m2: Array  # float32 [A, N]
    count: Array  # int32 [A, N]
    nonfinite: Array  # int32 [A]
    typical: Array  # float32 [A]
    outliers: Array  # int32 [A, 2]
    inputs: Array  # float32 [A, N, X]
    layers: tuple[int, ...] = field(metadata={"static": True})


def bytes_a_pair(num_layers: int, num_experts: int, hidden_size: int, inputs: bool = False) -> int:
    """Device memory of a pair of key and expert, in all layers together.

    Args:
        num_layers: A.
        num_experts: E.
        hidden_size: D.
        inputs: whether mean inputs are collected too.

    Returns:
        Bytes of its sums and of a row of `entry`, for there are no more keys than pairs.
    """
    return 4 * num_layers * (hidden_size * (1 + inputs) + 3 + num_experts)


def init(answers: Answers) -> AnswerSums:
    """An empty window for the pairs of `answers`.

    Args:
        answers: what the window will be absorbed into.

    Returns:
        Sums, all zero. They are arrays of the host, which the first `update` moves to the device.
    """
    shape = answers.count.shape
    window: dict[str, Any] = {
        "entry": answers.entry,
        "mean": np.zeros(answers.mean.shape, np.float32),
        "mass": np.zeros(shape, np.float32),
        "m2": np.zeros(shape, np.float32),
        "count": np.zeros(shape, np.int32),
        "nonfinite": np.zeros(len(answers.layers), np.int32),
        "typical": answers.typical.astype(np.float32),
        "outliers": np.zeros((len(answers.layers), 2), np.int32),
        "inputs": np.zeros(answers.inputs.shape, np.float32),
    }
    return AnswerSums(layers=answers.layers, **window)


def emptied(sums: AnswerSums) -> AnswerSums:
    """Empty windows for the same pairs, made on their devices from others that were read.

    Args:
        sums: the windows of all devices, each array with a leading axis [G].

    Returns:
        Windows [G, ...], each equal to what `init` makes of the answers that all of `sums` were absorbed into.
    """
    first = jnp.argmax(sums.typical > 0, axis=0)  # [A], the first device that has read something
    typical = jnp.take_along_axis(sums.typical, first[None], axis=0)
    known = {"entry": sums.entry, "typical": jnp.broadcast_to(typical, sums.typical.shape)}
    return replace(jax.tree.map(jnp.zeros_like, sums), **known)


@partial(jax.jit, donate_argnums=0)
def update(
    sums: AnswerSums,
    rows: Array,
    expert_outputs: Sequence[Array],
    routing: Routing,
    mask: Array,
    expert_inputs: Sequence[Array] | None = None,
) -> AnswerSums:
    """Add one batch, run with all experts.

    Args:
        sums: donated, not to be used again.
        rows: int32 [O, B, T], from `keys.find_orders`; negative for none. An occurrence counts at each key.
        expert_outputs: A arrays [B, T, K, D], each slot's gate-weighted expert output in the layers `sums.layers`.
        routing: [L, B, T, K], the learned routers' decisions in all layers.
        mask: bool [B, T], False at padding and at tokens to leave out.
        expert_inputs: A arrays [B, T, D], what the experts read, where mean inputs are collected.

    Returns:
        The sums with the batch.

    Raises:
        InputError: `expert_outputs` are of another number of layers, or `expert_inputs` are missing.
    """
    if sums.inputs.shape[-1] and expert_inputs is None:
        raise InputError("mean inputs are collected: pass expert_inputs, an array [B, T, hidden size] for each layer")
    if len(expert_outputs) != len(sums.layers):
        raise InputError(f"need the expert outputs of layers {sums.layers}, got {len(expert_outputs)} layers")
    hidden_size, num_experts = sums.mean.shape[-1], sums.entry.shape[-1]
    with jax.named_scope("answers_update"):
        for a, layer in enumerate(sums.layers):
            outputs = expert_outputs[a].astype(jnp.float32)  # [B, T, K, D]
            experts = routing.experts[layer]
            used = mask[..., None] & (experts < num_experts)
            sound = jnp.all(jnp.isfinite(outputs), axis=-1)
            nonfinite = sums.nonfinite.at[a].add(jnp.sum(used & ~sound, dtype=jnp.int32))
            outputs = jnp.where(sound[..., None], outputs, 0.0)
            norm = jnp.linalg.norm(outputs, axis=-1) / jnp.where(used, routing.weights[layer], 1.0)
            median = jnp.nan_to_num(jnp.nanmedian(jnp.where(used & sound, norm, jnp.nan)))
            typical = jnp.where(sums.typical[a] > 0, sums.typical[a], median)
            far = used & sound & (typical > 0) & (norm > OUTLIER * typical)
            outliers = jnp.stack([jnp.sum(some, dtype=jnp.int32) for some in (far[:, :1], far[:, 1:])])
            outputs = outputs.reshape(-1, hidden_size)
            weights = routing.weights[layer].astype(jnp.float32).reshape(-1, 1)
            read = None
            if sums.inputs.shape[-1] and expert_inputs is not None:
                slots = experts.shape[-1]
                read = jnp.repeat(expert_inputs[a].astype(jnp.float32).reshape(-1, hidden_size), slots, axis=0)
            add = partial(_with_order, a, used & sound & ~far, experts, outputs, weights, read)
            sums = replace(
                sums,
                nonfinite=nonfinite,
                typical=sums.typical.at[a].set(typical),
                outliers=sums.outliers.at[a].add(outliers),
            )
            # A loop, because XLA updates what a loop carries in place. Unrolled, it copies all means at every step.
            sums, _ = jax.lax.scan(add, sums, rows)
    return sums


def _with_order(
    a: int,
    used: Array,
    experts: Array,
    outputs: Array,
    weights: Array,
    read: Array | None,
    sums: AnswerSums,
    row: Array,
) -> tuple[AnswerSums, None]:
    """Add the slots of a layer at the keys of one order, `row` int32 [B, T]: the body of a `jax.lax.scan`.

    `used` and `experts` are [B, T, K], `outputs` float32 [B * T * K, D], `weights` float32 [B * T * K, 1], and `read`
    float32 [B * T * K, D] where mean inputs are collected.
    """
    mean, inputs, mass, m2, count = sums.mean, sums.inputs, sums.mass, sums.m2, sums.count
    found = sums.entry.at[a, row[..., None], experts].get(mode="clip")
    counts = used & (row >= 0)[..., None] & (found != NO_ANSWER)
    place = jnp.where(counts, found, mean.shape[1]).reshape(-1)  # N: written nowhere
    count = count.at[a, place].add(1, mode="drop")
    known = mass.at[a, place].get(mode="clip")[:, None] > 0
    mass = mass.at[a, place].add(jnp.square(weights[:, 0]), mode="drop")
    divisor = mass.at[a, place].get(mode="clip")[:, None]
    divisor = jnp.where(divisor > 0, divisor, 1.0)
    if read is not None:
        step = jnp.square(weights) * (read - inputs.at[a, place].get(mode="clip"))
        inputs = inputs.at[a, place].add(step / divisor, mode="drop")
    before = outputs - weights * mean.at[a, place].get(mode="clip")  # weight times distance from the mean
    mean = mean.at[a, place].add(weights * before / divisor, mode="drop")
    after = outputs - weights * mean.at[a, place].get(mode="clip")
    before = jnp.where(known, before, after)  # equal in sum, but the first mean was 0: far off
    m2 = m2.at[a, place].add(jnp.sum(before * after, axis=-1), mode="drop")
    return replace(sums, mean=mean, inputs=inputs, mass=mass, m2=m2, count=count), None


def absorb(sums: AnswerSums, answers: Answers, *, donate: bool = False) -> Answers:
    """Add a window to the host's means. Windows of several devices are absorbed one after the other.

    Args:
        sums: the window; begin the next one with `init`.
        answers: the means so far, for the same pairs.
        donate: give up `answers`, whose arrays the result takes over: they may fill half of the memory.

    Returns:
        The means of both.
    """
    from concurrent.futures import ThreadPoolExecutor  # here, because neither jax nor NumPy has brought it in

    answers = answers if donate else jax.tree.map(np.copy, answers)
    mass = np.asarray(sums.mass, np.float64)
    m2 = np.maximum(np.asarray(sums.m2, np.float64), 0)  # rounding may leave a little less than nothing
    window, count = np.asarray(sums.mean), np.asarray(sums.count)
    read = np.asarray(sums.inputs)

    def join(a: int) -> None:
        occurred = np.flatnonzero(count[a])
        for some in np.split(occurred, range(_JOINED, len(occurred), _JOINED)):
            ours = answers.mass[a, some], answers.mean[a, some], answers.m2[a, some]
            answers.inputs[a, some] = _mean_of_both(ours[0], answers.inputs[a, some], mass[a, some], read[a, some])
            answers.mean[a, some], answers.m2[a, some] = _joined(*ours, mass[a, some], window[a, some], m2[a, some])

    with ThreadPoolExecutor() as threads:  # NumPy lets go of the interpreter's lock
        list(threads.map(join, range(len(mass))))
    answers.mass[:] += mass
    answers.count[:] += count
    answers.nonfinite[:] += np.asarray(sums.nonfinite)
    answers.outliers[:] += np.asarray(sums.outliers)
    answers.typical[:] = np.where(answers.typical > 0, answers.typical, np.asarray(sums.typical))
    return answers


def merge(a: Answers, b: Answers) -> Answers:
    """The means of two collections, over the union of their keys and pairs: those of `a`, then the new ones of `b`.

    Args:
        a: answers.
        b: answers of other text.

    Returns:
        The means of both together.

    Raises:
        InputError: different layers, experts or hidden sizes, mean inputs in only one of the two, or answers that
            were distilled or have maps.
    """
    kind, other = (
        (one.layers, one.entry.shape[-1], one.mean.shape[-1], one.inputs.shape[-1], one.maps is not None, one.distilled)
        for one in (a, b)
    )
    if kind != other or a.maps is not None or a.distilled:
        raise InputError(
            "answers merge only over the same layers, experts and hidden size, with mean inputs in both or in neither, "
            "before maps are fitted and before they are distilled; these have (layers, experts, hidden size, "
            f"input size, maps, distilled) {kind} and {other}"
        )
    keys, place = distinct(np.concatenate([a.keys, b.keys]))
    parts = [(a, place[: len(a.keys)]), (b, place[len(a.keys) :])]
    num_layers, _, num_experts = a.entry.shape
    there = np.zeros((num_layers, len(keys), num_experts), bool)
    for part, rows in parts:
        there[:, rows] |= part.entry != NO_ANSWER
    entry = _numbered(there)
    whole = _nothing(keys, a.layers, entry, a.mean.shape[-1], a.inputs.shape[-1])
    for part, rows in parts:
        for layer in range(num_layers):
            pairs = part.entry[layer] != NO_ANSWER
            source, target = part.entry[layer][pairs], entry[layer][rows][pairs]
            ours = whole.mass[layer, target], whole.mean[layer, target], whole.m2[layer, target]
            theirs = part.mass[layer, source], part.mean[layer, source], part.m2[layer, source]
            whole.mean[layer, target], whole.m2[layer, target] = _joined(*ours, *theirs)
            read = whole.inputs[layer, target], part.inputs[layer, source]
            whole.inputs[layer, target] = _mean_of_both(ours[0], read[0], theirs[0], read[1])
            whole.mass[layer, target] += part.mass[layer, source]
            whole.count[layer, target] += part.count[layer, source]
    more = {name: getattr(a, name) + getattr(b, name) for name in ("nonfinite", "outliers")}
    return replace(whole, typical=np.where(a.typical > 0, a.typical, b.typical), **more)


def pruned(answers: Answers) -> Answers:
    """The answers without the pairs that never occurred.

    Args:
        answers: as collected.

    Returns:
        Answers with the same N in every layer; those that only fill up a layer belong to no pair.
    """
    there = [entry[entry != NO_ANSWER] for entry in answers.entry]
    kept = [np.sort(pairs[answers.count[a, pairs] > 0]) for a, pairs in enumerate(there)]
    size = max(map(len, kept))
    entry = np.full_like(answers.entry, NO_ANSWER)
    widths = answers.mean.shape[-1], answers.inputs.shape[-1]
    parts = _nothing(answers.keys, answers.layers, entry, *widths, size)
    for a, pairs in enumerate(kept):
        place = np.full(answers.count.shape[1] + 1, NO_ANSWER, np.int32)  # the last: NO_ANSWER itself
        place[pairs] = np.arange(len(pairs))
        entry[a] = place[answers.entry[a]]
        for name in ("mean", "mass", "m2", "count", "inputs"):
            getattr(parts, name)[a, : len(pairs)] = getattr(answers, name)[a, pairs]
    same = {name: getattr(answers, name) for name in ("nonfinite", "typical", "outliers", "maps", "distilled")}
    return replace(parts, entry=entry, **same)


def _numbered(there: np.ndarray) -> np.ndarray:
    """int32 [A, R, E]: the pairs bool [A, R, E] of each layer in a row, NO_ANSWER where there is none."""
    number = np.cumsum(there.reshape(len(there), -1), axis=1, dtype=np.int32).reshape(there.shape) - 1
    return np.where(there, number, np.int32(NO_ANSWER))


def _nothing(
    keys: np.ndarray,
    layers: tuple[int, ...],
    entry: np.ndarray,
    hidden_size: int,
    input_size: int,
    size: int | None = None,
) -> Answers:
    """No occurrence of any pair; room for as many answers as `entry` names, or `size`, but for one at least."""
    named = int(entry.max(initial=NO_ANSWER)) + 1 if size is None else size
    shape = (len(layers), max(named, 1))  # nothing can be gathered from no answers at all
    return Answers(
        keys=keys,
        layers=layers,
        entry=np.asarray(entry, np.int32),
        mean=np.zeros((*shape, hidden_size)),
        mass=np.zeros(shape),
        m2=np.zeros(shape),
        count=np.zeros(shape, np.int64),
        nonfinite=np.zeros(len(layers), np.int64),
        typical=np.zeros(len(layers)),
        outliers=np.zeros((len(layers), 2), np.int64),
        inputs=np.zeros((*shape, input_size)),
    )


def _joined(
    mass: np.ndarray, mean: np.ndarray, m2: np.ndarray, more: np.ndarray, its_mean: np.ndarray, its_m2: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The mean [n, D] and m2 [n] of two sets of occurrences together, given mass [n], mean and m2 of each."""
    share = more / np.where(mass + more > 0, mass + more, 1.0)
    step = its_mean - mean
    return mean + share[:, None] * step, m2 + its_m2 + mass * share * np.einsum("nd,nd->n", step, step)


def _mean_of_both(mass: np.ndarray, mean: np.ndarray, more: np.ndarray, its_mean: np.ndarray) -> np.ndarray:
    """The mean [n, D] of two sets of occurrences together, given mass [n] and mean of each."""
    share = more / np.where(mass + more > 0, mass + more, 1.0)
    return mean + share[:, None] * (its_mean - mean)

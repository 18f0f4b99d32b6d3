"""The answers of the fast tier: what the experts that a plan leaves out would have added, on average, at each key.

Letters: P rules, R rows (keys), C key width, O orders, B sequences, T positions, L layers, A layers that a rule
names, K experts per token, D hidden size.

A residual is collected by running all K experts and summing the gate-weighted outputs of those that a rule drops.
Its mean over a key's occurrences is then added where the plan drops them. An occurrence counts only if the rule drops
something there, and it counts at the key of every order.

    sums = init(answers)                                         # on the device, float32
    sums = update(sums, rows, slot_outputs, routing, mask)       # one batch; jitted, the old sums are donated
    sums, answers = flush(sums, answers)                         # into the host's float64, about every 2**16 tokens
    residuals = residual_rows(answers, rule, shrinkage)          # float32 [R, D]
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

from varjax.config import LayerPolicy
from varjax.keys import ANY, KeyIndex, distinct
from varjax.routing import Routing, dropped


class Rule(NamedTuple):
    """Which slots a planned token does without in one layer: see `routing.dropped`."""

    layer: int
    kept: int
    gate_ratio: float = 0.0

    @classmethod
    def of(cls, layer: int, policy: LayerPolicy) -> Rule:
        """The rule that a policy with a residual follows."""
        if policy.kept is None:
            raise ValueError(f"layer {layer}: a policy that leaves `kept` open has no residual")
        return cls(layer, policy.kept, policy.gate_ratio or 0.0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Answers:
    """The mean of what each rule leaves out, at each key. Host arrays; row r is `keys[r]`."""

    keys: np.ndarray  # int32 [R, C], as in `varjax.keys`
    rules: tuple[Rule, ...] = field(metadata={"static": True})
    mean: np.ndarray  # float64 or float32 [P, R, D]; 0 where there are no occurrences
    count: np.ndarray  # int64 [P, R], occurrences where the rule dropped something
    nonfinite: np.ndarray  # int64 [P], occurrences left out because an expert gave NaN or infinity
    # The rows were trained: they are used as they are, not shrunk.
    distilled: bool = field(default=False, metadata={"static": True})

    @classmethod
    def empty(cls, keys: np.ndarray, rules: Sequence[Rule], hidden_size: int) -> Answers:
        """No occurrence of any of the keys int32 [R, C].

        Raises:
            ValueError: no rule, or one that stands twice.
        """
        if not rules or len(set(rules)) < len(rules):
            raise ValueError(f"need at least one rule and each of them once, got {list(rules)}")
        shape = (len(rules), len(keys))
        return cls(
            keys=np.asarray(keys, np.int32),
            rules=tuple(rules),
            mean=np.zeros((*shape, hidden_size)),
            count=np.zeros(shape, np.int64),
            nonfinite=np.zeros(len(rules), np.int64),
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AnswerSums:
    """One window of occurrences on the device."""

    total: Array  # float32 [P, R, D]
    count: Array  # int32 [P, R]
    nonfinite: Array  # int32 [P]
    rules: tuple[Rule, ...] = field(metadata={"static": True})

    @property
    def layers(self) -> tuple[int, ...]:
        """[A]: the layers whose slot outputs `update` wants, ascending."""
        return tuple(sorted({rule.layer for rule in self.rules}))


def init(answers: Answers) -> AnswerSums:
    """An empty window for the keys and rules of `answers`."""
    return AnswerSums(
        total=jnp.zeros(answers.mean.shape, jnp.float32),
        count=jnp.zeros(answers.count.shape, jnp.int32),
        nonfinite=jnp.zeros(len(answers.rules), jnp.int32),
        rules=answers.rules,
    )


@partial(jax.jit, donate_argnums=0)
def update(sums: AnswerSums, rows: Array, slot_outputs: Array, routing: Routing, mask: Array) -> AnswerSums:
    """Adds one batch, run with all experts.

    Args:
        sums: donated, not to be used again.
        rows: int32 [O, B, T], from `keys.find_orders`; negative where there is no key.
        slot_outputs: [A, B, T, K, D], each slot's gate-weighted expert output in the layers `sums.layers`.
        routing: [L, B, T, K], the learned routers' decisions in all layers.
        mask: bool [B, T], False at padding and at tokens to leave out.
    """
    if len(slot_outputs) != len(sums.layers):
        raise ValueError(f"need the slot outputs of layers {sums.layers}, got {len(slot_outputs)} layers")
    num_rows, hidden_size = sums.total.shape[1:]
    top_k = slot_outputs.shape[-2]
    rows = jnp.where(mask & (rows >= 0), rows, num_rows).reshape(len(rows), -1)  # R: written nowhere
    total, count, nonfinite = sums.total, sums.count, sums.nonfinite
    with jax.named_scope("answers_update"):
        outputs = slot_outputs.reshape(len(sums.layers), -1, top_k, hidden_size).astype(jnp.float32)
        finite = jnp.all(jnp.isfinite(outputs), axis=-1)  # [A, B*T, K]
        for p, rule in enumerate(sums.rules):
            a = sums.layers.index(rule.layer)
            weights = routing.weights[rule.layer].reshape(-1, top_k)
            drop = dropped(weights, jnp.int8(rule.kept), jnp.float32(rule.gate_ratio))
            lost = jnp.any(drop, axis=-1)
            sound = jnp.all(finite[a] | ~drop, axis=-1)
            left_out = jnp.sum(jnp.where(drop[..., None], outputs[a], 0.0), axis=-2)
            for row in jnp.where(lost & sound, rows, num_rows):
                total = total.at[p, row].add(left_out, mode="drop")
                count = count.at[p, row].add(1, mode="drop")
            nonfinite = nonfinite.at[p].add(jnp.sum(lost & ~sound & mask.reshape(-1), dtype=jnp.int32))
    return replace(sums, total=total, count=count, nonfinite=nonfinite)


def flush(sums: AnswerSums, answers: Answers) -> tuple[AnswerSums, Answers]:
    """Move the window into the host's means, and begin the next one."""
    answers = absorb(sums, answers)
    return init(answers), answers


def absorb(sums: AnswerSums, answers: Answers) -> Answers:
    """The host's means with a window in them. Windows of several devices are absorbed one after the other."""
    fresh = np.asarray(sums.count, np.int64)
    count = answers.count + fresh
    total = np.asarray(sums.total)
    mean = np.empty(answers.mean.shape)
    for p, old in enumerate(answers.mean):  # rule by rule: all of them at once would fill the memory with temporaries
        mean[p] = old + (total[p] - fresh[p, :, None] * old) / np.maximum(count[p], 1)[:, None]
    nonfinite = answers.nonfinite + np.asarray(sums.nonfinite, np.int64)
    return replace(answers, mean=mean, count=count, nonfinite=nonfinite)


def merge(a: Answers, b: Answers) -> Answers:
    """The means of both together, over the union of their keys: those of `a`, then the new ones of `b`.

    Raises:
        ValueError: different rules or hidden sizes, or rows that were distilled.
    """
    ours, theirs = ((answers.rules, answers.mean.shape[-1], answers.distilled) for answers in (a, b))
    if ours != theirs or a.distilled:
        raise ValueError(
            "answers merge only over the same rules and hidden size, and not when distilled; "
            f"these have (rules, hidden size, distilled) {ours} and {theirs}"
        )
    keys, place = distinct(np.concatenate([a.keys, b.keys]))
    count = np.zeros((len(a.rules), len(keys)), np.int64)
    mean = np.zeros((*count.shape, a.mean.shape[-1]))
    for part, rows in ((a, place[: len(a.keys)]), (b, place[len(a.keys) :])):
        count[:, rows] += part.count
        for p in range(len(a.rules)):  # rule by rule: all at once would fill the memory with temporaries
            share = (part.count[p] / np.maximum(count[p, rows], 1))[:, None]
            mean[p, rows] += share * (part.mean[p] - mean[p, rows])
    return replace(a, keys=keys, mean=mean, count=count, nonfinite=a.nonfinite + b.nonfinite)


def residual_rows(answers: Answers, rule: Rule, shrinkage: float) -> np.ndarray:
    """float32 [R, D]: the rows to add under a rule.

    Args:
        shrinkage: k0, how many occurrences the prior weighs (see `shrink`); distilled rows are not shrunk.

    Raises:
        ValueError: the rule was not collected.
    """
    if rule not in answers.rules:
        raise ValueError(f"no residuals for {rule}; collected were {list(answers.rules)}")
    p = answers.rules.index(rule)
    if answers.distilled:
        return answers.mean[p].astype(np.float32)
    return shrink(answers.mean[p], answers.count[p], parents(answers.keys), shrinkage)


def shrink(mean: np.ndarray, count: np.ndarray, parent: np.ndarray, k0: float) -> np.ndarray:
    """float32 [R, D]: (n * mean + k0 * parent's row) / (n + k0), the parent's row being shrunk already.

    The prior of a key without a parent is 0. With k0 = 0 a key without occurrences takes its parent's row.

    Args:
        mean: [R, D].
        count: [R], n.
        parent: int [R], from `parents`.
        k0: occurrences that the prior weighs.
    """
    weight = count / np.where(count + k0 > 0, count + k0, 1)
    rows = (weight[:, None] * mean).astype(np.float32)
    depth = np.zeros(len(parent), int)
    step = parent
    while (step >= 0).any():
        depth += step >= 0
        step = np.where(step >= 0, parent[step], step)
    for level in range(1, depth.max(initial=0) + 1):  # every parent before its children
        here = np.flatnonzero(depth == level)
        rows[here] += ((1 - weight[here])[:, None] * rows[parent[here]]).astype(np.float32)
    return rows


def parents(keys: np.ndarray) -> np.ndarray:
    """int32 [R]: the row of the longest key that forgets a key's earliest ids; -1 where there is none.

    With all orders collected this is the key one id shorter.
    """
    index = KeyIndex.build(keys)
    found = np.full(len(keys), -1, np.int32)
    shorter = keys
    for _ in range(keys.shape[1] - 1):
        earliest = (shorter != ANY) & (np.cumsum(shorter != ANY, axis=1) == 1)
        earliest[:, -1] = False  # the current id stays
        shorter = np.where(earliest, np.int32(ANY), shorter)
        row = np.asarray(index.find(jnp.asarray(shorter)))
        found = np.where((found < 0) & (row != np.arange(len(keys))), row, found)
    return found

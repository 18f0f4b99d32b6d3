"""What a router decides, what a plan fixes beforehand, and how the two become one decision.

Letters: L layers, B sequences, T positions, E experts, K experts per token (slots, best first), R table rows, N answers
of a layer, D hidden size.

`resolve` is the only place that says what a plan means inside a layer. Everything else (the model, the
replay of a trace, the counters) calls it or reads what it returned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from varjax.affine import AffineMap
from varjax.errors import InputError

FAST, CACHED, LEARNED = 0, 1, 2  # tiers, in order of precedence; LEARNED: the plan leaves the token open
NO_ROW = -1  # the table row of a token that the table says nothing of
NO_ANSWER = -1  # the answer of an expert that is not known at a row, or that none stands in for


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Routing:
    """Which experts run and with which weights. An unused slot holds expert id E and weight 0."""

    experts: Array  # int32 [..., K]
    weights: Array  # float32 [..., K]

    @classmethod
    def unused(cls, shape: tuple[int, ...], num_experts: int) -> Routing:
        """Routing without any expert.

        Args:
            shape: of the result; the last axis is K.
            num_experts: E, the id of an unused slot.

        Returns:
            Routing [*shape].
        """
        return cls(jnp.full(shape, num_experts, jnp.int32), jnp.zeros(shape, jnp.float32))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerRules:
    """How each layer treats its planned tokens. Array data, so that another policy recompiles nothing."""

    gate_ratio: Array  # float32 [L], a slot under this share of slot 0's weight is dropped; 0 = never
    gate_mass: Array  # float32 [L], slots after those that reach this gate probability are dropped; inf = never
    tolerance: Array  # float32 [L], a slot whose weight times its answer's deviation is under this is dropped
    use_answers: Array  # bool [L], answers stand in for dropped slots; a slot without an answer is not dropped
    renormalize: Array  # bool [L], kept weights are rescaled to the sum before anything was dropped
    choice_from_table: Array  # bool [L], the table (or the cache) names the experts, not the gate
    weights_from_table: Array  # bool [L], it supplies the weights, slot by slot

    @classmethod
    def neutral(cls, num_layers: int) -> LayerRules:
        """Rules under which the gate chooses and weighs, and only `experts_kept` drops experts.

        Args:
            num_layers: L.

        Returns:
            Rules [L].
        """
        off, zero = jnp.zeros(num_layers, bool), jnp.zeros(num_layers, jnp.float32)
        return cls(zero, jnp.full_like(zero, jnp.inf), zero, off, off, off, off)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerAnswers:
    """The answers of the experts of one layer at the rows of the table, as far as they are known."""

    entry: Array  # int32 [R, E], which answer stands in for an expert at a row, NO_ANSWER where none does
    deviation: Array  # float32 [N], root mean square distance of an expert's output from its answer
    answers: Array  # [N, D], mean outputs, not weighted by the gate; float32, bfloat16 or int8
    scale: Array | None  # float32 [N], what int8 answers are multiplied by
    affine: AffineMap | None = None  # what an answer adds for the input at hand; None: answers are constant

    def find(self, row: Array, experts: Array) -> Array:
        """Look up the answers of experts.

        Args:
            row: int32 [...], rows of the table, NO_ROW for none.
            experts: int32 [..., K]; E for an unused slot.

        Returns:
            int32 [..., K], NO_ANSWER where there is none.
        """
        num_experts = self.entry.shape[1]
        known = (row != NO_ROW)[..., None] & (experts < num_experts)
        found = self.entry.at[row[..., None], experts].get(mode="clip")
        return jnp.where(known, found, NO_ANSWER)

    def total(self, dropped: Dropped) -> Array:
        """The output that stands in for the dropped experts.

        Args:
            dropped: from `resolve`, [..., K].

        Returns:
            float32 [..., D], the sum of the answers by their gate weights.
        """
        rows = self.rows(dropped.answer)
        weight = jnp.where(dropped.answer == NO_ANSWER, 0.0, dropped.weights)
        if self.scale is not None:
            weight = weight * self.scale[dropped.answer]
        total = jnp.sum(rows * weight[..., None], axis=-2)
        if self.affine is None or dropped.moved is None:
            return total
        return total + self.affine.output(dropped.moved)

    def rows(self, answer: Array) -> Array:
        """The mean outputs of some answers, before int8 ones are multiplied by their scale.

        Args:
            answer: int32 [...]; NO_ANSWER reads the last row.

        Returns:
            float32 [..., D].
        """
        return self.answers[answer].astype(jnp.float32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Dropped:
    """What a plan leaves out of one layer."""

    answer: Array  # int32 [..., K], the answer that stands in for a slot, NO_ANSWER where none does
    weights: Array  # float32 [..., K], the gate weights of the slots that were dropped, 0 elsewhere
    moved: Array | None = None  # float32 [..., r], by how much their inputs move affine answers; None: constant ones


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Plan:
    """Everything that is decided before layer 0 runs, for each layer and token. The gate decides the rest."""

    tier: Array  # int8 [L, B, T], FAST, CACHED or LEARNED
    experts_kept: Array  # int8 [L, B, T], slots that may run in a planned token, 0 to K
    row: Array  # int32 [L, B, T], row of the table whose answers may stand in, NO_ROW where there is none
    routing: Routing  # [L, B, T, K], what the table or the cache predicts, if anything
    rules: LayerRules  # [L]
    answers: Any = None  # LayerAnswers of each layer, a tuple [L]; None: the table that made the plan has none

    @classmethod
    def open(cls, num_layers: int, batch: int, length: int, top_k: int, num_experts: int) -> Plan:
        """A plan that decides nothing; a forward pass under it equals the plain model bit for bit.

        Args:
            num_layers: L.
            batch: B.
            length: T.
            top_k: K.
            num_experts: E.

        Returns:
            A plan [L, B, T].
        """
        shape = (num_layers, batch, length)
        return cls(
            tier=jnp.full(shape, LEARNED, jnp.int8),
            experts_kept=jnp.full(shape, top_k, jnp.int8),
            row=jnp.full(shape, NO_ROW, jnp.int32),
            routing=Routing.unused((*shape, top_k), num_experts),
            rules=LayerRules.neutral(num_layers),
        )

    def layer(self, index: int) -> Plan:
        """The plan of one layer.

        Args:
            index: number of the layer among those with experts, from 0.

        Returns:
            The same fields without their leading axis [L]; `answers` is the layer's LayerAnswers.
        """
        one = jax.tree.map(lambda leaf: leaf[index], replace(self, answers=None))
        return one if self.answers is None else replace(one, answers=self.answers[index])


def top_k(probs: Array, k: int, normalize: bool = True) -> Routing:
    """The learned router's own decision.

    Args:
        probs: float32 [..., E], softmax of the gate over all experts.
        k: experts per token.
        normalize: divide the k weights by their sum (Mixtral does, OLMoE does not).

    Returns:
        Routing [..., K].
    """
    return _weighted(*_best(probs, k), normalize)


def resolve(
    probs: Array, k: int, plan: Plan | None, normalize: bool = True, inputs: Array | None = None
) -> tuple[Routing, Dropped]:
    """What really runs in one layer, given its gate and its plan, and what stands in for the rest.

    1. Candidate: the table's experts where the layer lets the table choose and it predicts something, else
       the gate's top k. They carry the gate's weights (divided by their sum if `normalize`) or, where the layer takes
       weights from the table and it predicts something, the table's: slot j the j-th one.
    2. In a planned token, slot j is dropped if j >= experts_kept; or if j >= 1 and its weight is below gate_ratio times
       slot 0's, or the gate's probabilities of the slots before it reach gate_mass; or if its weight times the
       expected error of its answer is below the tolerance. But where the layer uses answers and the token has a row, a
       slot is only dropped if there is an answer: an expert whose output is not known runs.
    3. A dropped slot becomes unused. The others keep their weights, or are rescaled if the layer renormalizes. The
       answers of the dropped slots, by their gate weights, stand in for them.

    An open token gets exactly `top_k(probs, k, normalize)` and no answer.

    Args:
        probs: float32 [..., E], softmax of the gate over all experts.
        k: experts per token.
        plan: one layer's plan (`Plan.layer`) with fields [...] and [..., K]; None leaves every token open.
        normalize: as in `top_k`.
        inputs: [..., D], what the experts read; needed where the answers are affine.

    Returns:
        Routing [..., K], and what it lacks, [..., K].

    Raises:
        InputError: the answers are affine and there are no `inputs`.
    """
    experts, gate = _best(probs, k)
    if plan is None:
        return _weighted(experts, gate, normalize), Dropped(
            jnp.full(experts.shape, NO_ANSWER, jnp.int32), jnp.zeros_like(gate)
        )

    planned = (plan.tier < LEARNED)[..., None]
    predicted = planned & (plan.routing.experts[..., :1] < probs.shape[-1])
    chosen = predicted & plan.rules.choice_from_table
    experts = jnp.where(chosen, plan.routing.experts, experts)
    gate = jnp.where(chosen, _gate_of(probs, plan.routing.experts), gate)
    candidate = _weighted(experts, gate, normalize)
    supplied = predicted & plan.rules.weights_from_table
    candidate = replace(candidate, weights=jnp.where(supplied, plan.routing.weights, candidate.weights))
    used = candidate.experts < probs.shape[-1]
    answer = jnp.full(candidate.experts.shape, NO_ANSWER, jnp.int32)
    row = jnp.where(plan.rules.use_answers, plan.row, NO_ROW)
    error = deviations = None
    if plan.answers is not None:
        with jax.named_scope("answers"):
            answer = plan.answers.find(row, candidate.experts)
            error = plan.answers.deviation[answer]
            if plan.answers.affine is not None:
                if inputs is None:
                    raise InputError(
                        "the answers are affine: pass resolve the inputs of the experts, [..., hidden size]"
                    )
                deviations = plan.answers.affine.deviations(inputs, candidate.experts, answer)
                error = plan.answers.affine.error(error, candidate.experts, deviations)

    gone = planned & used & _superfluous(candidate.weights, gate, plan)
    if error is not None:
        predictable = candidate.weights * error < plan.rules.tolerance
        gone |= planned & used & predictable & (answer != NO_ANSWER)
    gone &= (row == NO_ROW)[..., None] | (answer != NO_ANSWER)
    lost = _over_slots(jnp.logical_or, gone)

    experts = jnp.where(gone, probs.shape[-1], candidate.experts)
    weights = jnp.where(gone, 0.0, candidate.weights)
    left = jnp.where(gone, candidate.weights, 0.0)
    answered = jnp.where(gone, answer, NO_ANSWER)
    moved = None
    if deviations is not None:
        with jax.named_scope("answers"):
            moved = jnp.sum(jnp.where(answered == NO_ANSWER, 0.0, left)[..., None] * deviations, axis=-2)
    dropped = Dropped(answered, left, moved)
    rest = _over_slots(jnp.add, weights)
    rescale = plan.rules.renormalize & lost & (rest > 0.0)
    scale = _over_slots(jnp.add, candidate.weights) / jnp.where(rescale, rest, 1.0)
    return Routing(experts, jnp.where(rescale, weights * scale, weights)), dropped


def slots_for_mass(weights: Array, threshold: Array) -> Array:
    """The fewest slots, at least one, that together reach a share of the weight.

    Args:
        weights: float32 [..., K], best slot first.
        threshold: float32 [], share of the sum of all K weights.

    Returns:
        int8 [...].
    """
    reached = jnp.cumsum(weights, axis=-1)
    short = reached < threshold * reached[..., -1:]
    return jnp.minimum(jnp.sum(short, axis=-1) + 1, weights.shape[-1]).astype(jnp.int8)


def _best(probs: Array, k: int) -> tuple[Array, Array]:
    """int32 and float32 [..., K]: the experts of the highest gate probabilities [..., E], and these."""
    gate, experts = jax.lax.top_k(probs, k)
    return experts.astype(jnp.int32), gate


def _gate_of(probs: Array, experts: Array) -> Array:
    """float32 [..., K]: the gate's probabilities [..., E] of some experts [..., K], 0 for an unused slot."""
    gate = jnp.take_along_axis(probs, experts, axis=-1, mode="clip")
    return jnp.where(experts < probs.shape[-1], gate, 0.0)


def _weighted(experts: Array, gate: Array, normalize: bool) -> Routing:
    """[..., K]: the gate's probabilities as weights."""
    if normalize:
        total = _over_slots(jnp.add, gate)
        gate = gate / jnp.where(total > 0.0, total, 1.0)
    return Routing(experts, gate)


def _over_slots(combine: Callable[[Array, Array], Array], slots: Array) -> Array:
    """[..., 1]: the slots [..., K] combined one by one; a reduction would be a kernel of its own on a GPU."""
    return reduce(combine, _apart(slots))


def _before(slots: Array) -> Array:
    """[..., K]: the sum of the slots before each, one by one for the same reason."""
    place = jax.lax.broadcasted_iota(jnp.int8, slots.shape, slots.ndim - 1)
    return reduce(jnp.add, [jnp.where(place > number, one, 0.0) for number, one in enumerate(_apart(slots))])


def _apart(slots: Array) -> list[Array]:
    return jnp.split(slots, slots.shape[-1], axis=-1)


def _superfluous(weights: Array, gate: Array, plan: Plan) -> Array:
    """bool [..., K]: the slots that a planned token drops by their weight, gate probability or number."""
    slot = jax.lax.broadcasted_iota(jnp.int8, weights.shape, weights.ndim - 1)
    covered = _before(gate) >= plan.rules.gate_mass
    light = weights < plan.rules.gate_ratio * weights[..., :1]
    return (slot >= plan.experts_kept[..., None]) | ((slot >= 1) & (light | covered))

"""What a router decides, what a plan fixes beforehand, and how the two become one decision.

Letters: L layers, B sequences, T positions, E experts, K experts per token (slots, best first), R table rows.

`resolve` is the single place that says what a plan means inside a layer. Everything else (the model, the
replay of a trace, the counters) calls it or reads what it returned.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

FAST, CACHED, LEARNED = 0, 1, 2  # tiers, in order of precedence; LEARNED: the plan leaves the token open
NO_ROW = -1  # the residual row of a token that receives none


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Routing:
    """Which experts run and with which weights. An unused slot holds expert id E and weight 0."""

    experts: Array  # int32 [..., K]
    weights: Array  # float32 [..., K]

    @classmethod
    def unused(cls, shape: tuple[int, ...], num_experts: int) -> Routing:
        """[*shape] (the last axis is K): every slot unused."""
        return cls(jnp.full(shape, num_experts, jnp.int32), jnp.zeros(shape, jnp.float32))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerRules:
    """How each layer treats its planned tokens. Array data, so that another policy recompiles nothing."""

    gate_ratio: Array  # float32 [L], a slot under this share of slot 0's weight is dropped; 0 = never
    renormalise: Array  # bool [L], kept weights are rescaled to the sum before anything was dropped
    choice_from_table: Array  # bool [L], the table (or the cache) names the experts, not the gate
    weights_from_table: Array  # bool [L], it also supplies their weights; idle where the gate chooses

    @classmethod
    def neutral(cls, num_layers: int) -> LayerRules:
        """[L]: the gate chooses and weighs, nothing is dropped by ratio, nothing is rescaled."""
        off = jnp.zeros(num_layers, bool)
        return cls(jnp.zeros(num_layers, jnp.float32), off, off, off)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Plan:
    """Everything that is settled before layer 0 runs, for each layer and token. The gate decides the rest."""

    tier: Array  # int8 [L, B, T], FAST, CACHED or LEARNED
    kept: Array  # int8 [L, B, T], slots that may run in a planned token, 0 to K
    row: Array  # int32 [L, B, T], row of the layer's residual table, NO_ROW where there is none
    routing: Routing  # [L, B, T, K], what the table or the cache predicts, if anything
    rules: LayerRules  # [L]

    @classmethod
    def open(cls, num_layers: int, batch: int, length: int, top_k: int, num_experts: int) -> Plan:
        """[L, B, T]: nothing planned; a forward pass under it equals the plain model bit for bit."""
        shape = (num_layers, batch, length)
        return cls(
            tier=jnp.full(shape, LEARNED, jnp.int8),
            kept=jnp.full(shape, top_k, jnp.int8),
            row=jnp.full(shape, NO_ROW, jnp.int32),
            routing=Routing.unused((*shape, top_k), num_experts),
            rules=LayerRules.neutral(num_layers),
        )

    def layer(self, index: int) -> Plan:
        """The plan of one layer: the same fields without their leading axis [L]."""
        return jax.tree.map(lambda leaf: leaf[index], self)


def top_k(probs: Array, k: int, normalise: bool = True) -> Routing:
    """The learned router's own decision.

    Args:
        probs: float32 [..., E], softmax of the gate over all experts.
        k: experts per token.
        normalise: divide the k weights by their sum (Mixtral does, OLMoE does not).
    """
    weights, experts = jax.lax.top_k(probs, k)
    if normalise:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return Routing(experts.astype(jnp.int32), weights)


def resolve(probs: Array, k: int, plan: Plan | None, normalise: bool = True) -> tuple[Routing, Array]:
    """What really runs in one layer, given its gate and its plan.

    1. Candidate: the table's experts where the layer lets the table choose and it predicts something, else
       the gate's top k. The table's experts carry the table's weights or the gate's (divided by their sum if
       `normalise`).
    2. In a planned token, slot j is dropped if j >= kept, or if j >= 1 and its weight is under gate_ratio
       times slot 0's. A dropped slot becomes unused. The others keep their weights, or are rescaled if the
       layer renormalises.
    3. The residual row stands in for what was dropped: a token that lost nothing receives none.

    An open token gets exactly `top_k(probs, k, normalise)` and no row.

    Args:
        probs: float32 [..., E], softmax of the gate over all experts.
        k: experts per token.
        plan: one layer's plan (`Plan.layer`) with fields [...] and [..., K]; None leaves every token open.
        normalise: as in `top_k`.

    Returns:
        Routing [..., K], and the residual row int32 [...] to add (NO_ROW for none).
    """
    learned = top_k(probs, k, normalise)
    if plan is None:
        return learned, jnp.full(probs.shape[:-1], NO_ROW, jnp.int32)

    planned = (plan.tier < LEARNED)[..., None]
    candidate = _candidate(probs, learned, planned, plan, normalise)

    used = candidate.experts < probs.shape[-1]
    gone = planned & used & dropped(candidate.weights, plan.kept, plan.rules.gate_ratio)
    lost = jnp.any(gone, axis=-1, keepdims=True)

    experts = jnp.where(gone, probs.shape[-1], candidate.experts)
    weights = jnp.where(gone, 0.0, candidate.weights)
    rest = jnp.sum(weights, axis=-1, keepdims=True)
    rescale = plan.rules.renormalise & lost & (rest > 0.0)
    scale = jnp.sum(candidate.weights, axis=-1, keepdims=True) / jnp.where(rescale, rest, 1.0)
    weights = jnp.where(rescale, weights * scale, weights)
    return Routing(experts, weights), jnp.where(lost[..., 0], plan.row, NO_ROW)


def dropped(weights: Array, kept: Array, gate_ratio: Array) -> Array:
    """bool [..., K]: the slots that a planned token does without.

    Args:
        weights: float32 [..., K], of the slots in order.
        kept: int8 [...], slots that may run.
        gate_ratio: float32 [...], least weight of a later slot as a share of the first one's; 0 = any.
    """
    slot = jnp.arange(weights.shape[-1], dtype=jnp.int8)
    light = (slot >= 1) & (weights < gate_ratio[..., None] * weights[..., :1])
    return (slot >= kept[..., None]) | light


def slots_for_mass(weights: Array, threshold: Array) -> Array:
    """int8 [...]: the fewest slots, one at least, that together reach a share of the weight.

    Args:
        weights: float32 [..., K], best slot first.
        threshold: float32 [], share of the sum of all K weights.
    """
    reached = jnp.cumsum(weights, axis=-1)
    short = reached < threshold * reached[..., -1:]
    return jnp.minimum(jnp.sum(short, axis=-1) + 1, weights.shape[-1]).astype(jnp.int8)


def _candidate(probs: Array, learned: Routing, planned: Array, plan: Plan, normalise: bool) -> Routing:
    """[..., K]: the decision before anything is dropped. `planned` is bool [..., 1]."""
    named = plan.routing.experts < probs.shape[-1]
    chosen = planned & plan.rules.choice_from_table & jnp.any(named, axis=-1, keepdims=True)

    gate = jnp.take_along_axis(probs, plan.routing.experts, axis=-1, mode="clip")
    gate = jnp.where(named, gate, 0.0)
    if normalise:
        total = jnp.sum(gate, axis=-1, keepdims=True)
        gate = gate / jnp.where(total > 0.0, total, 1.0)
    weights = jnp.where(plan.rules.weights_from_table, plan.routing.weights, gate)
    return Routing(
        jnp.where(chosen, plan.routing.experts, learned.experts), jnp.where(chosen, weights, learned.weights)
    )

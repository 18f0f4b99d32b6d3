"""The fast tier: what the statistics say about a context, ready to be looked up for all layers at once.

Letters: L layers, R rows (keys) of the table, O orders, B sequences, T positions, C ids per context, E experts, K
experts per token, D hidden size.

    table = build(stats, config, k, answers)          # on the host, once
    plan = fast_plan(table, contexts)                 # pure, fit for jit

A policy is array data. Tables built from the same statistics and answers with `keep_shapes=True` have equal shapes
under any policy, so a search over policies compiles once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from varjax.answers import Answers, Rule, residual_rows
from varjax.config import LayerPolicy, VARConfig
from varjax.keys import ABSENT, KeyIndex, find_orders
from varjax.routing import FAST, LEARNED, NO_ROW, LayerRules, Plan, Routing, slots_for_mass, top_k
from varjax.stats import RoutingStats


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RouteTable:
    """The admitted keys and, per layer, what is known and done at each. Row r belongs to `index.keys[r]`."""

    index: KeyIndex
    eligible: Array  # bool [L, R], the layer may answer from this row
    kept: Array  # int8 [L, R], experts to run
    routing: Routing  # [L, R, K], the most probable experts and their mean gate weights
    has_residual: Array  # bool [L], the layer adds residual rows
    residuals: tuple[Array, ...] | None  # per layer float32 [R, D], or [1, D] where none are added; None: no answers
    rules: LayerRules  # [L]
    num_experts: int = field(metadata={"static": True})
    orders: tuple[int, ...] = field(metadata={"static": True})  # ascending

    @property
    def num_layers(self) -> int:
        return self.eligible.shape[0]

    @property
    def top_k(self) -> int:
        return self.routing.experts.shape[-1]


def lookup(table: RouteTable, contexts: Array) -> Array:
    """int32 [L, B, T]: the row of the longest order that may answer in each layer, ABSENT where none may.

    Args:
        contexts: int32 [B, T, >= max(orders)], from `keys.contexts`.
    """
    row = jnp.full((table.num_layers, *contexts.shape[:-1]), ABSENT, jnp.int32)
    for found in find_orders(table.index, contexts, table.orders):
        row = jnp.where((found != ABSENT) & table.eligible[:, found], found, row)
    return row


def fast_plan(table: RouteTable, contexts: Array) -> Plan:
    """[L, B, T]: the plan of the fast tier alone; what it does not know is open.

    Args:
        contexts: int32 [B, T, >= max(orders)], from `keys.contexts`.
    """
    row = lookup(table, contexts)
    known = row != ABSENT
    layer = jnp.arange(table.num_layers)[:, None, None]
    unused = Routing.unused((*row.shape, table.top_k), table.num_experts)
    return Plan(
        tier=jnp.where(known, jnp.int8(FAST), jnp.int8(LEARNED)),
        kept=jnp.where(known, table.kept[layer, row], jnp.int8(table.top_k)),
        row=jnp.where(known & table.has_residual[:, None, None], row, NO_ROW),
        routing=jax.tree.map(
            lambda leaf, none: jnp.where(known[..., None], leaf[layer, row], none), table.routing, unused
        ),
        rules=table.rules,
    )


def build(
    stats: RoutingStats,
    config: VARConfig,
    k: int,
    answers: Answers | None = None,
    normalise: bool = True,
    keep_shapes: bool = False,
) -> RouteTable:
    """Select what may be answered and lay it out for the device.

    A row is eligible in a layer if the layer's policy looks at its order, it was seen often enough there, the
    gate was sure enough on average, and, where the policy adds residuals, there is one.

    Args:
        stats: what the routers did at each key.
        k: experts per token in the model.
        answers: residuals, over the same keys or some of them.
        normalise: as in `routing.top_k`: table weights sum to one, or are the mean probabilities themselves.
        keep_shapes: keep every row and every layer that has residuals, whatever the policy wants.

    Raises:
        ValueError: naming each layer whose policy does not fit the model, the statistics or the answers.
    """
    if len(stats.keys) == 0:
        raise ValueError("the statistics hold no key at all; collect them over more text or admit rarer contexts")
    policies = [config.policy(layer) for layer in range(len(stats.count))]
    _check_policies(config, policies, stats, k, answers)

    own_row = np.full(len(stats.keys), ABSENT)  # where each key lies in the answers
    if answers is not None:
        own_row = np.asarray(KeyIndex.build(answers.keys).find(jnp.asarray(stats.keys)))
    eligible = np.stack([_eligible(l, policy, stats, answers, own_row) for l, policy in enumerate(policies)])
    rows = np.arange(len(stats.keys)) if keep_shapes else np.flatnonzero(eligible.any(axis=0))
    if len(rows) == 0:
        rows = np.array([0])  # not eligible, but there must be something to gather from

    routing = _mean_routing(stats, rows, k, normalise)
    asked = {order for policy in policies if policy is not None for order in policy.orders}
    return RouteTable(
        index=KeyIndex.build(stats.keys[rows]),
        eligible=jnp.asarray(eligible[:, rows]),
        kept=jnp.asarray(_kept(policies, routing, config.mass_threshold)),
        routing=routing,
        has_residual=jnp.array([policy is not None and policy.residual for policy in policies]),
        residuals=_residuals(policies, config, answers, own_row[rows], keep_shapes),
        rules=_rules(policies),
        num_experts=stats.num_experts,
        orders=tuple(sorted(stats.orders if keep_shapes or not asked else asked)),
    )


def _check_policies(
    config: VARConfig,
    policies: list[LayerPolicy | None],
    stats: RoutingStats,
    k: int,
    answers: Answers | None,
) -> None:
    named = {*dict(config.layers), *(config.cache_layers or ())}
    faults = [
        f"layer {layer}: the statistics have only layers 0 to {len(policies) - 1}"
        for layer in sorted(named)
        if layer >= len(policies)
    ]
    for layer, policy in enumerate(policies):
        if policy is None:
            continue
        if policy.kept is not None and policy.kept > k:
            faults.append(f"layer {layer}: kept={policy.kept}, but the model runs only {k} experts per token")
        strange = sorted(set(policy.orders) - set(stats.orders))
        if strange:
            faults.append(f"layer {layer}: orders {strange} are not in the statistics, which have {stats.orders}")
        if policy.residual and (answers is None or Rule.of(layer, policy) not in answers.rules):
            have = "there are none" if answers is None else f"there are {list(answers.rules)}"
            faults.append(
                f"layer {layer}: no residuals for {Rule.of(layer, policy)} ({have}); collect them or set residual=False"
            )
    if faults:
        raise ValueError("the policies cannot be carried out: " + "; ".join(faults))


def _eligible(
    layer: int,
    policy: LayerPolicy | None,
    stats: RoutingStats,
    answers: Answers | None,
    own_row: np.ndarray,
) -> np.ndarray:
    """bool [keys of the statistics]. `own_row` int [keys] says where each of them lies in the answers."""
    if policy is None:
        return np.zeros(len(stats.keys), bool)
    admitted = (
        np.isin(stats.row_orders, policy.orders)
        & (stats.count[layer] >= policy.frequency_threshold)
        & (stats.entropy.mean[layer] <= policy.entropy_threshold)
    )
    if policy.residual and answers is not None:
        count = answers.count[answers.rules.index(Rule.of(layer, policy))]
        admitted &= (own_row != ABSENT) & (count[own_row] > 0)
    return admitted


def _mean_routing(stats: RoutingStats, rows: np.ndarray, k: int, normalise: bool) -> Routing:
    """[L, R, K]: the top K of the mean gate probabilities; unused slots where a layer never saw the key."""
    layers = []
    for count, sum_probs in zip(stats.count, stats.sum_probs, strict=True):  # [L, R, E] at once could be large
        seen = count[rows, None] > 0
        mean = sum_probs[rows] / np.where(seen, count[rows, None], 1)
        best = top_k(jnp.asarray(np.where(seen, mean, 1.0), jnp.float32), k, normalise)
        unused = Routing.unused(best.experts.shape, stats.num_experts)
        layers.append(jax.tree.map(lambda leaf, none, seen=seen: jnp.where(seen, leaf, none), best, unused))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


def _kept(policies: list[LayerPolicy | None], routing: Routing, mass_threshold: float) -> np.ndarray:
    """int8 [L, R]: what the policy says, or as many as reach the mass threshold."""
    kept = np.array(slots_for_mass(routing.weights, jnp.float32(mass_threshold)))
    for layer, policy in enumerate(policies):
        if policy is not None and policy.kept is not None:
            kept[layer] = policy.kept
    return kept


def _residuals(
    policies: list[LayerPolicy | None],
    config: VARConfig,
    answers: Answers | None,
    own_row: np.ndarray,
    keep_shapes: bool,
) -> tuple[Array, ...] | None:
    """Per layer float32 [R, D] or [1, D]. `own_row` int [R] says where each row of the table lies in the answers."""
    if answers is None:
        return None
    known = (own_row != ABSENT)[:, None]
    hidden_size = answers.mean.shape[-1]
    collected = {rule.layer for rule in answers.rules}
    residuals = []
    for layer, policy in enumerate(policies):
        if policy is not None and policy.residual:
            means = residual_rows(answers, Rule.of(layer, policy), config.residual_shrinkage)
            residuals.append(jnp.asarray(np.where(known, means[own_row], np.float32(0))))
        else:
            num_rows = len(own_row) if keep_shapes and layer in collected else 1
            residuals.append(jnp.zeros((num_rows, hidden_size), jnp.float32))
    return tuple(residuals)


def _rules(policies: list[LayerPolicy | None]) -> LayerRules:
    """[L]; a layer that is left open has neutral ones."""
    given = [policy or LayerPolicy(residual=False) for policy in policies]
    return LayerRules(
        gate_ratio=jnp.array([policy.gate_ratio or 0.0 for policy in given], jnp.float32),
        renormalise=jnp.array([policy.renormalise for policy in given]),
        choice_from_table=jnp.array([policy.choice_from == "table" for policy in given]),
        weights_from_table=jnp.array([policy.weights_from == "table" for policy in given]),
    )

"""The fast tier: what the statistics say about a context, ready to be looked up for all layers at once.

Letters: L layers, R rows (keys) of the table, N answers of a layer, O orders, B sequences, T positions, C ids per
context, E experts, K experts per token, D hidden size.

    table = build_table(config, stats, answers, top_k=2)   # on the host, once
    plan = fast_plan(table, contexts)                      # pure, fit for jit

A policy is array data. Tables built from the same statistics and answers with `keep_shapes=True` have equal shapes
under any policy, so a search over policies compiles once. The key of order 0 is at every token: a policy of that order
plans all of them, known or not, as the simple alternatives to VAR do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from varjax import routing as routings
from varjax.answers import Answers
from varjax.config import LayerPolicy, VARConfig
from varjax.errors import InputError
from varjax.keys import ABSENT, ANY, NONE, KeyIndex, distinct, find_orders
from varjax.routing import FAST, LEARNED, NO_ANSWER, LayerAnswers, LayerRules, Plan, Routing, slots_for_mass
from varjax.shrinkage import inherit, most_valuable, shrunk
from varjax.stats import RoutingStats
from varjax.transfer import to_device

_top_k = jax.jit(routings.top_k, static_argnums=(1, 2))
_slots_for_mass = jax.jit(slots_for_mass)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RouteTable:
    """The admitted keys and, per layer, what is known and done at each. Row r belongs to `index.keys[r]`."""

    index: KeyIndex
    eligible: Array  # bool [L, R], the layer may answer from this row
    experts_kept: Array  # int8 [L, R], experts to run
    routing: Routing  # [L, R, K], the most probable experts and their mean gate weights
    answers: tuple[LayerAnswers, ...] | None  # [L], their `entry` is [R, E]; None: nothing stands in for anything
    rules: LayerRules  # [L]
    # What decided the answers in addition to the policies: answer_shrinkage and answers_per_layer (inf where there is
    # no bound). An array, so that tables that differ in it share their programs.
    made_with: Array  # float32 [2]
    num_experts: int = field(metadata={"static": True})
    ngram_orders: tuple[int, ...] = field(metadata={"static": True})  # ascending
    # Layers that leave the first token of a text open: those in which its output was an outlier (`varjax.answers`), and
    # those with affine answers of order 0, because no statistics cover a begin token.
    first_open: tuple[int, ...] = field(default=(), metadata={"static": True})
    files_sha256: str = field(default="", metadata={"static": True})  # `TableFiles.digest`; "": built in memory

    @property
    def num_layers(self) -> int:
        """L."""
        return self.eligible.shape[0]

    @property
    def context_width(self) -> int:
        """The ids of a context that a look-up needs; the one before tells the first token of a text."""
        return max(self.ngram_orders[-1], 2 if self.first_open else 1)

    @property
    def top_k(self) -> int:
        """K."""
        return self.routing.experts.shape[-1]


def _lookup(table: RouteTable, contexts: Array) -> Array:
    """int32 [L, B, T]: the row of the longest order that may answer in each layer, ABSENT where none may."""
    row = jnp.full((table.num_layers, *contexts.shape[:-1]), ABSENT, jnp.int32)
    for found in find_orders(table.index, contexts, table.ngram_orders):
        row = jnp.where((found != ABSENT)[None] & table.eligible[:, found], found[None], row)
    if table.first_open:
        first = contexts[..., -2] == NONE
        spared = jnp.isin(jnp.arange(table.num_layers), jnp.array(table.first_open))
        row = jnp.where(spared[:, None, None] & first[None], ABSENT, row)
    return row


def fast_plan(table: RouteTable, contexts: Array) -> Plan:
    """The plan of the fast tier alone; what it does not know is left open.

    Args:
        table: L layers.
        contexts: int32 [B, T, >= context_width], from `keys.contexts`.

    Returns:
        A plan [L, B, T].
    """
    row = _lookup(table, contexts)
    known = row != ABSENT
    layer = jnp.arange(table.num_layers, dtype=jnp.int32)[:, None, None]
    unused = Routing.unused((*row.shape, table.top_k), table.num_experts)
    return Plan(
        tier=jnp.where(known, jnp.int8(FAST), jnp.int8(LEARNED)),
        experts_kept=jnp.where(known, table.experts_kept[layer, row], jnp.int8(table.top_k)),
        row=row,
        routing=jax.tree.map(
            lambda leaf, none: jnp.where(known[..., None], leaf[layer, row], none), table.routing, unused
        ),
        rules=table.rules,
        answers=table.answers,
    )


def build_table(
    config: VARConfig,
    stats: RoutingStats,
    answers: Answers | None = None,
    *,
    top_k: int,
    normalize: bool = True,
    keep_shapes: bool = False,
) -> RouteTable:
    """Select what may be answered and lay it out for the device.

    A row is eligible in a layer if the layer's policy looks at its order, it was seen often enough there, the
    gate was certain enough on average, and, where the policy uses answers, some expert has an answer there. Where a key
    has no answer for an expert, the longest shorter key's answer stands in; but an expert's mean output over all
    tokens (order 0), unless it is affine, answers for a policy of order 0 alone: tokens that are not known stay with
    the router.

    Args:
        config: the policies.
        stats: what the routers did at each key.
        answers: the experts' mean outputs at the same keys or some of them; None: nothing stands in for an expert.
        top_k: experts per token in the model.
        normalize: as in `varjax.routing.top_k`: table weights sum to one, or are the mean probabilities themselves.
        keep_shapes: keep every row, order 0 and every answer, whatever the policy wants, so that tables of
            other policies have the same shapes.

    Returns:
        The table.

    Raises:
        InputError: naming each layer whose policy does not fit the model, the statistics or the answers.
    """
    if len(stats.keys) == 0:
        raise InputError("the statistics hold no key at all; collect them over more text or admit rarer contexts")
    policies = [config.policy(layer) for layer in range(len(stats.count))]
    _check_policies(config, policies, stats, top_k, answers)

    keys = np.concatenate([stats.keys, np.full((1, stats.keys.shape[1]), ANY, np.int32)])  # order 0 comes last
    entries = _entries(keys, answers, len(policies), stats.num_experts)
    eligible = np.stack([_eligible(l, policy, stats, entries[l]) for l, policy in enumerate(policies)])
    if answers is not None and config.answers_per_layer is not None:
        used = {l: np.unique(entries[l][eligible[l]]) for l in answers.layers}
        fewer = most_valuable(answers, used, config.answers_per_layer, config.answer_shrinkage)
        entries = _entries(keys, fewer, len(policies), stats.num_experts)
        eligible = np.stack([_eligible(l, policy, stats, entries[l]) for l, policy in enumerate(policies)])
    rows = np.arange(len(keys)) if keep_shapes else np.flatnonzero(eligible.any(axis=0))
    if len(rows) == 0:
        rows = np.array([0])  # not eligible, but there must be something to gather from

    routing = _mean_routing(stats, rows, top_k, normalize)
    asked = asked_orders(config, len(policies))
    return RouteTable(
        index=KeyIndex.build(keys[rows]),
        eligible=to_device(eligible[:, rows]),
        experts_kept=to_device(_kept(policies, routing, config.mass_threshold)),
        routing=routing,
        answers=_answers(policies, config, answers, entries[:, rows], keep_shapes),
        rules=_rules(policies),
        made_with=to_device(_made_with(config)),
        num_experts=stats.num_experts,
        ngram_orders=asked if asked and not keep_shapes else tuple(sorted({0, *stats.ngram_orders})),
        first_open=_first_open(answers),
    )


def with_policies(
    table: RouteTable, config: VARConfig, stats: RoutingStats, answers: Answers | None = None
) -> RouteTable:
    """A table that was built with `keep_shapes`, under the policies of another config; its rows and answers stay.

    Under a bound (`answers_per_layer`) those are the answers that were the most valuable to the policies that the table
    was built for: they are not chosen again.

    Args:
        table: built with `keep_shapes=True`.
        config: with the other policies.
        stats: those that `table` was built from.
        answers: those that `table` was built from.

    Returns:
        A table of the same shapes.

    Raises:
        InputError: as `build_table`; the table does not hold all rows of `stats`; its answers were made under
            another `answer_dtype`, `answer_shrinkage` or `answers_per_layer` than those of `config`; or their maps
            have another rank than those of `answers`.
    """
    rows = table.index.keys.shape[0]
    if rows != len(stats.keys) + 1:
        raise InputError(
            f"the table has {rows} rows, the statistics {len(stats.keys)} keys and order 0; "
            "build the table from these statistics with keep_shapes=True"
        )
    _check_answers(table, config, answers)
    policies = [config.policy(layer) for layer in range(table.num_layers)]
    _check_policies(config, policies, stats, table.top_k, answers)
    shape = (table.eligible.shape[1], table.num_experts)
    entries = [np.full(shape, NO_ANSWER)] * len(policies)
    if table.answers is not None:
        entries = [np.broadcast_to(np.asarray(known.entry), shape) for known in table.answers]
    eligible = [_eligible(l, policy, stats, entries[l]) for l, policy in enumerate(policies)]
    return replace(
        table,
        eligible=to_device(np.stack(eligible)),
        experts_kept=to_device(_kept(policies, table.routing, config.mass_threshold)),
        rules=_rules(policies),
    )


def _check_answers(table: RouteTable, config: VARConfig, answers: Answers | None) -> None:
    """Raises InputError unless the table holds answers as `config` wants them: their dtype, shrinkage and bound."""
    if (table.answers is None) != (answers is None):
        there = "the table holds none" if table.answers is None else "the table holds some, and none are given"
        raise InputError(f"answers: {there}; give those that the table was built from")
    if table.answers is None or answers is None or not answers.layers:
        return
    ours = answers.maps.rank if answers.maps is not None and answers.affine.any() else 0
    theirs = max((known.affine.read.shape[1] for known in table.answers if known.affine is not None), default=0)
    if ours != theirs:
        raise InputError(
            f"answers: the table's have maps of rank {theirs}, those given of rank {ours} (0: constant answers); give "
            "those that the table was built from"
        )
    names = ("answer_dtype", "answer_shrinkage", "answers_per_layer")
    dtype = str(table.answers[answers.layers[0]].answers.dtype)
    made = (dtype, *np.asarray(table.made_with).tolist())
    asked = (config.answer_dtype, *_made_with(config).tolist())
    different = [
        f"{name} {'unbounded' if ours == math.inf else ours}, the config has {getattr(config, name)}"
        for name, ours, theirs in zip(names, made, asked, strict=True)
        if ours != theirs
    ]
    if different:
        raise InputError(
            f"the table was built with {'; '.join(different)}: other policies cannot change that; build it for this "
            "config with keep_shapes=True"
        )


def _made_with(config: VARConfig) -> np.ndarray:
    """float32 [2]: `RouteTable.made_with`."""
    bound = math.inf if config.answers_per_layer is None else config.answers_per_layer
    return np.array([config.answer_shrinkage, bound], np.float32)


def asked_orders(config: VARConfig, num_layers: int) -> tuple[int, ...]:
    """The context orders that any layer's policy looks at.

    Args:
        config: the policies.
        num_layers: L.

    Returns:
        Orders, ascending.
    """
    policies = [config.policy(layer) for layer in range(num_layers)]
    return tuple(sorted({order for policy in policies if policy is not None for order in policy.ngram_orders}))


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
    if answers is not None:
        theirs, ours = (answers.keys.shape[1], answers.entry.shape[2]), (stats.keys.shape[1], stats.num_experts)
        if theirs != ours:
            faults.append(f"the answers have (ids per key, experts) {theirs}, the statistics {ours}")
    for layer, policy in enumerate(policies):
        if policy is None:
            continue
        if policy.experts_kept is not None and policy.experts_kept > k:
            faults.append(
                f"layer {layer}: experts_kept={policy.experts_kept}, but the model runs only {k} experts per token"
            )
        strange = sorted(set(policy.ngram_orders) - {0, *stats.ngram_orders})
        if strange:
            faults.append(f"layer {layer}: orders {strange} are not in the statistics, which have {stats.ngram_orders}")
        if policy.use_answers and (answers is None or layer not in answers.layers):
            have = "there are none" if answers is None else f"there are those of layers {list(answers.layers)}"
            faults.append(f"layer {layer}: it has no answers ({have}); collect them or set use_answers=False")
    if faults:
        raise InputError("the policies cannot be carried out: " + "; ".join(faults))


def _entries(keys: np.ndarray, answers: Answers | None, num_layers: int, num_experts: int) -> np.ndarray:
    """int32 [L, R, E]: the answer that stands in for each expert at the keys int32 [R, C], or NO_ANSWER."""
    entries = np.full((num_layers, len(keys), num_experts), NO_ANSWER, np.int32)
    if answers is None:
        return entries
    every, place = distinct(np.concatenate([answers.keys, keys]))
    unconditional = (every == ANY).all(axis=1)
    for layer, entry, affine in zip(answers.layers, answers.entry, answers.affine, strict=True):
        known = np.full((len(every), num_experts), NO_ANSWER, np.int32)
        known[place[: len(entry)]] = entry
        found = inherit(every, known if affine else np.where(unconditional[:, None], NO_ANSWER, known))
        found[unconditional] = known[unconditional]
        entries[layer] = found[place[len(entry) :]]
    return entries


def _first_open(answers: Answers | None) -> tuple[int, ...]:
    """The layers that leave the first token of a text to the router."""
    if answers is None:
        return ()
    return tuple(np.array(answers.layers)[(answers.outliers[:, 0] > 0) | answers.affine].tolist())


def _eligible(layer: int, policy: LayerPolicy | None, stats: RoutingStats, entry: np.ndarray) -> np.ndarray:
    """bool [R]: the keys of the statistics, then order 0. `entry` int32 [R, E] is the layer's."""
    if policy is None:
        return np.zeros(len(entry), bool)
    admitted = (
        np.isin(stats.row_orders, policy.ngram_orders)
        & (stats.count[layer] >= policy.frequency_threshold)
        & (stats.entropy.mean[layer] <= policy.entropy_threshold)
    )
    admitted = np.append(admitted, 0 in policy.ngram_orders)
    return admitted & (entry != NO_ANSWER).any(axis=1) if policy.use_answers else admitted


def _mean_routing(stats: RoutingStats, rows: np.ndarray, k: int, normalize: bool) -> Routing:
    """[L, R, K]: the top K of the mean gate probabilities; unused slots at order 0 and where a key was never seen."""
    experts, weights = [], []
    nothing = np.zeros((1, stats.num_experts))
    for count, sum_probs in zip(stats.count, stats.sum_probs, strict=True):  # [L, R, E] at once could be large
        occurrences = np.append(count, 0)[rows, None]
        seen = occurrences > 0
        mean = np.concatenate([sum_probs, nothing])[rows] / np.where(seen, occurrences, 1)
        best = jax.device_get(_top_k(to_device(np.where(seen, mean, 1.0).astype(np.float32)), k, normalize))
        experts.append(np.where(seen, best.experts, np.int32(stats.num_experts)))
        weights.append(np.where(seen, best.weights, np.float32(0)))
    return Routing(to_device(np.stack(experts)), to_device(np.stack(weights)))


def _kept(policies: list[LayerPolicy | None], routing: Routing, mass_threshold: float) -> np.ndarray:
    """int8 [L, R]: what the policy says, or as many as reach the mass threshold."""
    kept = np.array(_slots_for_mass(routing.weights, to_device(np.float32(mass_threshold))))
    for layer, policy in enumerate(policies):
        if policy is not None and policy.experts_kept is not None:
            kept[layer] = policy.experts_kept
        elif policy is not None and policy.tolerance is not None:
            kept[layer] = routing.experts.shape[-1]
    return kept


def _answers(
    policies: list[LayerPolicy | None],
    config: VARConfig,
    answers: Answers | None,
    entries: np.ndarray,
    keep_shapes: bool,
) -> tuple[LayerAnswers, ...] | None:
    """[L]; a layer that needs none has one empty answer. `entries` int32 [L, R, E] are of the table's rows."""
    if answers is None:
        return None
    built = []
    for layer, policy in enumerate(policies):
        wanted = layer in answers.layers and (keep_shapes or (policy is not None and policy.use_answers))
        entry = entries[layer] if wanted else np.full_like(entries[layer, :1], NO_ANSWER)
        rows, deviation = np.zeros((1, answers.mean.shape[-1]), np.float32), np.zeros(1, np.float32)
        affine = None
        if wanted and (keep_shapes or (entry != NO_ANSWER).any()):
            rows, deviation, _, inputs = shrunk(answers, layer, config.answer_shrinkage)
            used = np.arange(len(rows)) if keep_shapes else np.unique(entry[entry != NO_ANSWER])
            if answers.maps is not None:
                of_layer = answers.layers.index(layer), inputs, answers.experts(layer), deviation
                affine, deviation = answers.maps.of_layer(*of_layer)
                affine = affine and replace(affine, center=affine.center[used])
            place = np.full(len(rows) + 1, NO_ANSWER, np.int32)  # the last: NO_ANSWER itself
            place[used] = np.arange(len(used))
            entry, rows, deviation = place[entry], rows[used], deviation[used]
        encoded, scale = _encoded(to_device(rows), config.answer_dtype)
        affine = affine and affine.stored("float32" if config.answer_dtype == "float32" else "bfloat16")
        found, left = to_device((entry, deviation))
        built.append(LayerAnswers(found, left, encoded, scale, affine))
    return tuple(built)


@partial(jax.jit, static_argnums=1)
def _encoded(rows: Array, dtype: str) -> tuple[Array, Array | None]:
    """The answers [N, D] in their stored form and, for int8, the scale float32 [N] that gives them back."""
    if dtype != "int8":
        return rows.astype(dtype), None
    scale = jnp.max(jnp.abs(rows), axis=-1) / 127
    return jnp.round(rows / jnp.where(scale > 0, scale, 1)[:, None]).astype(jnp.int8), scale


def _rules(policies: list[LayerPolicy | None]) -> LayerRules:
    """[L]; a layer that is left open has neutral ones."""
    given = [policy or LayerPolicy(use_answers=False) for policy in policies]

    def column(values: list[float]) -> Array:
        return to_device(np.array(values, np.float32))

    def flags(values: list[bool]) -> Array:
        return to_device(np.array(values, bool))

    return LayerRules(
        gate_ratio=column([policy.gate_ratio or 0.0 for policy in given]),
        gate_mass=column([math.inf if policy.gate_mass is None else policy.gate_mass for policy in given]),
        tolerance=column([policy.tolerance or 0.0 for policy in given]),
        use_answers=flags([policy.use_answers for policy in given]),
        renormalize=flags([policy.renormalize for policy in given]),
        choice_from_table=flags([policy.choice_from == "table" for policy in given]),
        weights_from_table=flags([policy.weights_from == "table" for policy in given]),
    )

"""Replaying a VARConfig against a routing trace, without the model.

Letters: N tokens replayed, L layers, E experts, K experts per token, A age buckets.

The documents of the trace are split by a hash of their ids. On one part the table is built, from statistics taken from
the trace; through the others goes the real thing, `varjax.step.plan` and `commit`, one document after the other, `step`
tokens at a time; the router's own decision is the trace's. Everything that depends on hidden states is missing: there
are no answers and no logits, so a replay does not tell what the plans cost in quality. The clock is the trace's:
`seconds_per_token` for every token replayed, in one stream; a server that interleaves many texts sees other ages and
evictions.

All of it is teacher-forced: the ids are those of the trace, whatever the plans would have done to the text. Generated
text (phase `decode`) repeats itself more than prose does, and flatters every cache. A look-up sees earlier steps only:
with a long step, as in prefill, repetitions inside a step are lost; a step of one token is decoding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from analysis.traces.capture import on_all_layers
from analysis.traces.replay_steps import run_steps, unlimited_cache
from analysis.traces.statistics import trace_statistics
from analysis.traces.trace import NO_ROUTING, Trace, TraceError
from varjax.config import LayerPolicy, VARConfig
from varjax.errors import InputError
from varjax.routing import CACHED, FAST
from varjax.stats import RoutingStats
from varjax.step import TIERS
from varjax.table import build_table

MAX_KEYS = 50_000  # of the table
_MAX_CELLS = 1 << 26  # keys x layers x experts, of the statistics: about 1 GB
_AGE_BUCKETS = 18  # up to one step, then each twice as long; the last has no end


@dataclass(frozen=True)
class ReplaySums:
    """Sums over the tokens replayed, by layer and tier (fast, cached, learned), or by layer and age of a decision."""

    tokens: np.ndarray  # int64 [L, 3]
    active: np.ndarray  # int64 [L, 3], experts that ran
    agreements: np.ndarray  # int64 [L, 3], predicted first = the router's first; an open token agrees
    recalled: np.ndarray  # int64 [L, 3], chosen experts that were predicted
    mass: np.ndarray  # float64 [L, 3], their share of the chosen experts' probability
    experts_kept: np.ndarray  # int64 [L, 3], predicted experts that the plan keeps
    kept_chosen: np.ndarray  # int64 [L, 3], of these, those that the router chose
    aged: np.ndarray  # int64 [L, A], cached decisions
    aged_agreements: np.ndarray  # int64 [L, A]
    unlimited: np.ndarray  # int64 [L], decisions of a cache without bounds
    unlimited_agreements: np.ndarray  # int64 [L]
    constant_agreements: np.ndarray  # int64 [L], tokens whose first expert is the layer's most frequent first
    constant_recalled: np.ndarray  # int64 [L], chosen experts among the layer's K busiest


@dataclass(frozen=True)
class Replay:
    """What a config would have decided on a trace."""

    config: VARConfig  # as applied
    notes: tuple[str, ...]  # what could not be applied, and what figures rest on
    origin: dict[str, Any]  # of the trace
    build_documents: int
    build_tokens: int
    documents: int
    tokens: int
    keys: int  # of the table
    step: int  # tokens
    seconds_per_token: float
    ranked: bool  # False: agreement means nothing
    has_probs: bool  # False: mass means nothing
    num_experts: int
    top_k: int
    age_edges: np.ndarray  # int64 [A], tokens, where each age bucket begins; the last has no end
    sums: ReplaySums

    def fields(self) -> dict[str, Any]:
        """Convert the replay for a result file.

        Returns:
            The settings, and `rates` of all layers together and of each.
        """
        plain = {name: value for name, value in vars(self).items() if name not in ("config", "sums", "age_edges")}
        return {**plain, **self.rates(), "layers": [self.rates(layer) for layer in range(len(self.sums.tokens))]}

    def rates(self, layer: int | None = None) -> dict[str, Any]:
        """Divide the sums.

        Args:
            layer: index of a layer; None: all layers together.

        Returns:
            Shares by name; None where there is nothing to divide or judge.
        """
        at = {name: values.sum(axis=0) if layer is None else values[layer] for name, values in vars(self.sums).items()}
        total = int(at["tokens"].sum())

        def agreement(agreed: Any, of: Any) -> float | None:
            return _ratio(agreed, of) if self.ranked else None

        tiers = {}
        for tier in (FAST, CACHED):
            tokens = at["tokens"][tier]
            tiers[TIERS[tier]] = {
                "agreement": agreement(at["agreements"][tier], tokens),
                "recall": _ratio(at["recalled"][tier], tokens * self.top_k),
                "experts_kept": _ratio(at["kept_chosen"][tier], at["experts_kept"][tier]),
                "mass": _ratio(at["mass"][tier], tokens) if self.has_probs else None,
                "experts_per_token": _ratio(at["active"][tier], tokens),
            }
        agreed = map(agreement, at["aged_agreements"], at["aged"])
        return {
            "shares": {name: _ratio(count, total) for name, count in zip(TIERS, at["tokens"], strict=True)},
            **tiers,
            "experts_per_token": _ratio(at["active"].sum(), total),
            "unlimited_cache": {
                "share": _ratio(at["unlimited"], total),
                "agreement": agreement(at["unlimited_agreements"], at["unlimited"]),
            },
            "constant": {
                "agreement": agreement(at["constant_agreements"], total),
                "recall": _ratio(at["constant_recalled"], total * self.top_k),
            },
            "mispredictions_by_age": [
                {"from_tokens": int(edge), "decisions": int(n), "mispredictions": rate if rate is None else 1 - rate}
                for edge, n, rate in zip(self.age_edges, at["aged"], agreed, strict=True)
                if n
            ],
        }


def _ratio(part: Any, whole: Any) -> float | None:
    return float(part) / float(whole) if whole else None


def replay(
    trace: Trace,
    config: VARConfig,
    *,
    build_share: float = 0.7,
    step: int = 64,
    seconds_per_token: float = 0.01,
) -> Replay:
    """Replay a config on the documents of a trace that its table is not built on.

    Args:
        trace: the trace, which the table is built from as well.
        config: the config.
        build_share: share of the documents that the table is built on.
        step: tokens between a look-up and the commit of what was learned; steps end with their document.
        seconds_per_token: the clock; 0.01 is a stream of 100 tokens per second.

    Returns:
        What the config would have decided.

    Raises:
        TraceError: the trace has too few documents for both parts.
        InputError: a setting out of range, VAR switched off, or a policy that does not fit the trace.
    """
    if step < 1 or not 0 < seconds_per_token < math.inf or not 0 < build_share < 1:
        raise InputError(
            f"step={step}, seconds_per_token={seconds_per_token}, build_share={build_share}: "
            "expected at least 1, above 0, and between 0 and 1"
        )
    config, notes = _applicable(config, trace)
    captured = trace.captured
    judged = _with_stand_ins(trace.captured_part())
    own = _on_captured_layers(config, captured)
    building = trace.build_documents(build_share)
    ours, theirs = judged.of(building), judged.of(~building)
    if not len(ours.token_id) or not len(theirs.token_id):
        raise TraceError(
            f"{len(np.unique(trace.document))} documents with tokens, of which {len(np.unique(ours.document))} build "
            f"the table at build_share={build_share}: both parts need one; give more documents or another share"
        )
    stats, more = _table_statistics(ours, own)
    table = build_table(own, stats, top_k=trace.top_k, keep_shapes=True)  # another policy recompiles nothing
    edges = np.append(0, step << np.arange(_AGE_BUCKETS - 1))
    sums, tier = run_steps(theirs, table, own, step, seconds_per_token, edges)
    sums["unlimited"], sums["unlimited_agreements"] = unlimited_cache(theirs, tier == FAST, own, step)
    sums["constant_agreements"], sums["constant_recalled"] = _constant_table(ours, theirs)
    return Replay(
        config=config,
        notes=(*trace.remarks(), *notes, *more),
        origin=dict(trace.origin),
        build_documents=len(np.unique(ours.document)),
        build_tokens=len(ours.token_id),
        documents=len(np.unique(theirs.document)),
        tokens=len(theirs.token_id),
        keys=int(np.sum(np.any(np.asarray(table.eligible), axis=0))),
        step=step,
        seconds_per_token=seconds_per_token,
        ranked=trace.ranked,
        has_probs=trace.probs is not None,
        num_experts=trace.num_experts,
        top_k=trace.top_k,
        age_edges=edges,
        sums=ReplaySums(**{name: on_all_layers(values, captured, 0) for name, values in sums.items()}),
    )


def _applicable(config: VARConfig, trace: Trace) -> tuple[VARConfig, list[str]]:
    """The config as far as a trace can carry it out, and notes on what was dropped or is judged less exactly."""
    if not config.enable_var:
        raise InputError("enable_var is False: every token stays with the router, there is nothing to replay")
    notes = []
    if any(policy is not None and policy.use_answers for policy in map(config.policy, range(trace.num_layers))):
        notes.append("answers and tolerances are left out (use_answers=False), since a trace has no expert outputs")
        config = _with_policies(config, lambda policy: _without_answers(policy, trace.top_k))
    if trace.probs is None:
        notes.append(
            "the trace has no probabilities: entropy, confidence, gate-ratio and mass thresholds are lifted, and the "
            "table ranks experts by how often " + ("and how early " if trace.ranked else "") + "they were chosen"
        )
        config = _with_policies(
            config, lambda policy: replace(policy, entropy_threshold=None, gate_ratio=None, gate_mass=None)
        )
        lifted = math.log(trace.num_experts) + 1
        config = replace(config, entropy_threshold=lifted, confidence_threshold=0.0, mass_threshold=1.0)
    elif trace.probs_over == "chosen":
        notes.append(
            f"probabilities are over the {trace.top_k} chosen experts: entropy is at most ln {trace.top_k} = "
            f"{math.log(trace.top_k):.2f} nats and confidence at least 1/{trace.top_k}; thresholds pass more than they "
            "would on the whole gate"
        )
    elif trace.entropy is None:
        notes.append(
            f"the trace has the {trace.top_k} chosen experts' probabilities: confidence is exact, entropy is the least "
            "that they allow; entropy thresholds pass more than they would on the whole gate"
        )
    if trace.num_experts == 1:
        notes.append(f"every layer has one expert: {NO_ROUTING}, and nothing to predict")
    if not trace.ranked:
        notes.append("the experts are not ranked: there is no agreement, and no misprediction, only recall")
    return config, notes


def _with_stand_ins(trace: Trace) -> Trace:
    """The trace, with probabilities where it has none: falling evenly with the rank, or equal if there is no rank."""
    if trace.probs is not None:
        return trace
    weight = np.arange(trace.top_k, 0, -1) if trace.ranked else np.ones(trace.top_k)
    probs = np.broadcast_to((weight / weight.sum()).astype(np.float32), trace.experts.shape)
    return replace(trace, probs=probs, probs_over="chosen", ranked=True)


def _table_statistics(trace: Trace, config: VARConfig) -> tuple[RoutingStats, list[str]]:
    """The statistics that a config's table needs, and notes on them."""
    policies = [policy for policy in map(config.policy, range(trace.num_layers)) if policy is not None]
    orders = sorted({order for policy in policies for order in policy.ngram_orders} - {0}) or [1]
    least = min((policy.frequency_threshold or 1 for policy in policies), default=1)
    max_keys = min(MAX_KEYS, _MAX_CELLS // (trace.num_layers * trace.num_experts))
    stats = trace_statistics(trace, orders, least, max_keys)
    if len(stats.keys) == max_keys:
        return stats, [f"the table holds the {max_keys:,} most frequent keys only"]
    if len(stats.keys) == 0:  # a table needs a row; this one is not frequent enough for any layer
        note = f"no context occurs {least} times in the documents that build the table: the fast tier is empty"
        return trace_statistics(trace, orders, 1, 1), [note]
    return stats, []


def _constant_table(build: Trace, scored: Trace) -> tuple[np.ndarray, np.ndarray]:
    """A table that gives every token the busiest experts of `build`: int64 [L] scored tokens whose first expert is the
    most frequent first one, and int64 [L] scored assignments to one of the K busiest experts."""
    agreements, recalled = np.zeros((2, scored.num_layers), np.int64)
    for layer in range(scored.num_layers):
        firsts = np.bincount(build.experts[:, layer, 0], minlength=build.num_experts)
        busiest = np.argsort(-np.bincount(build.experts[:, layer].ravel(), minlength=build.num_experts), kind="stable")
        agreements[layer] = np.sum(scored.experts[:, layer, 0] == firsts.argmax())
        recalled[layer] = np.sum(np.isin(scored.experts[:, layer], busiest[: scored.top_k]))
    return agreements, recalled


def _on_captured_layers(config: VARConfig, captured: np.ndarray) -> VARConfig:
    """The config for a trace's captured layers, bool [L], renumbered from 0."""
    if captured.all():
        return config
    layers, cached = dict(config.layers), config.cache_layers
    for layer in sorted({*layers, *(cached or ())}):
        if layer >= len(captured):
            raise InputError(f"layer {layer}: the trace has only layers 0 to {len(captured) - 1}; correct the config")
    numbers = np.flatnonzero(captured).tolist()
    return replace(
        config,
        layers={new: layers[old] for new, old in enumerate(numbers) if old in layers},
        cache_layers=None if cached is None else tuple(new for new, old in enumerate(numbers) if old in cached),
    )


def _without_answers(policy: LayerPolicy, top_k: int) -> LayerPolicy:
    """The policy without answers; without them a tolerance lets all experts run that `experts_kept` lets run."""
    kept = top_k if policy.experts_kept is None and policy.tolerance is not None else policy.experts_kept
    return replace(policy, use_answers=False, tolerance=None, experts_kept=kept)


def _with_policies(config: VARConfig, change: Callable[[LayerPolicy], LayerPolicy]) -> VARConfig:
    changed = {layer: policy and change(policy) for layer, policy in dict(config.layers).items()}
    return replace(config, default=config.default and change(config.default), layers=changed)

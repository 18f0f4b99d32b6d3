"""What a trace can carry out of a VARConfig, and what the replay's table is built from.

Letters: L layers, E experts, K experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from analysis.traces.statistics import trace_statistics
from analysis.traces.trace import Trace
from varjax.config import LayerPolicy, VARConfig
from varjax.errors import InputError
from varjax.stats import RoutingStats

MAX_KEYS = 50_000  # of the table
_MAX_CELLS = 1 << 26  # keys x layers x experts, of the statistics: about 1 GB


def applicable(config: VARConfig, trace: Trace) -> tuple[VARConfig, list[str]]:
    """The config as far as a trace can carry it out, and what had to give way or is judged by less than the whole gate.

    Raises:
        InputError: VAR is switched off in the config.
    """
    if not config.enable_var:
        raise InputError("enable_var is False: every token stays with the router, there is nothing to replay")
    notes = []
    if any(policy is not None and policy.use_answers for policy in map(config.policy, range(trace.num_layers))):
        notes.append("answers are left out, and tolerances with them (residual=False): a trace has no expert outputs")
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
    if not trace.ranked:
        notes.append("the experts are not ranked: there is no agreement, and no misprediction, only recall")
    return config, notes


def on_captured_layers(config: VARConfig, captured: np.ndarray) -> VARConfig:
    """The config for a trace's captured layers alone, numbered anew from 0.

    Args:
        captured: bool [L].

    Raises:
        InputError: the config names a layer that the trace does not have.
    """
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


def with_stand_ins(trace: Trace) -> Trace:
    """The trace, with probabilities where it has none: falling evenly with the rank, or equal if there is no rank."""
    if trace.probs is not None:
        return trace
    weight = np.arange(trace.top_k, 0, -1) if trace.ranked else np.ones(trace.top_k)
    probs = np.broadcast_to((weight / weight.sum()).astype(np.float32), trace.experts.shape)
    return replace(trace, probs=probs, probs_over="chosen", ranked=True)


def table_statistics(trace: Trace, config: VARConfig) -> tuple[RoutingStats, list[str]]:
    """The statistics that `config`'s table needs, and what is to be said about them."""
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


def _without_answers(policy: LayerPolicy, top_k: int) -> LayerPolicy:
    """The policy without answers: a tolerance then lets run whatever `experts_kept` lets run."""
    kept = top_k if policy.experts_kept is None and policy.tolerance is not None else policy.experts_kept
    return replace(policy, use_answers=False, tolerance=None, experts_kept=kept)


def _with_policies(config: VARConfig, change: Callable[[LayerPolicy], LayerPolicy]) -> VARConfig:
    changed = {layer: policy and change(policy) for layer, policy in dict(config.layers).items()}
    return replace(config, default=config.default and change(config.default), layers=changed)

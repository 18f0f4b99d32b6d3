"""Do experts share the load? How the tokens of a trace are distributed over the experts.

Letters: N tokens, D documents, L layers, E experts, K experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from analysis.questions.data import RoutingData, TraceSettings, needs_selection
from analysis.questions.nulls import mean
from analysis.questions.question import Finding, Question
from analysis.report.figures import heat_map, subplots
from analysis.report.report import Column, ReportFigure, Table
from analysis.resampling import Measure, bootstrap, measure, ratio, ratio_with_interval
from analysis.traces.trace import Trace
from varjax.errors import NotTestableError


@dataclass(frozen=True)
class Load:
    """Shares of the assignments (each token makes K in every layer) and how evenly they are distributed."""

    share: Measure  # one row per expert: its share of the layer's assignments; 1 / E if even
    imbalance: Measure  # one row: the busiest expert's share over the mean share, 1 to E
    evenness: Measure  # one row: entropy of the shares over ln E, 0 to 1
    unused: np.ndarray  # int64 [L], experts that no token chose
    tokens: int
    documents: int


def _expert_load(trace: Trace, settings: TraceSettings) -> Load:
    """Load of each expert in each layer, with bootstrap intervals over documents.

    The interval of the imbalance takes the busiest expert of each draw, so it reaches further up than down.
    """
    if len(trace.token_id) == 0:
        raise NotTestableError("the trace has no token; give one that has")
    counts = _assignments(trace).transpose(0, 2, 1)  # [D, E, L]
    every = np.broadcast_to(counts.sum(axis=1, keepdims=True), counts.shape)
    total = counts.sum(axis=0)
    drawn = {"samples": settings.samples, "seed": settings.seed}

    def with_interval(name: str, unit: str, statistic: Callable[[np.ndarray], np.ndarray]) -> Measure:
        return measure(name, unit, statistic(total), bootstrap(statistic, counts, **drawn))

    return Load(
        share=measure("load", "share", *ratio_with_interval(counts, every, **drawn)),
        imbalance=with_interval("imbalance", "ratio", _imbalance),
        evenness=with_interval("evenness", "share", _evenness),
        unused=np.sum(total == 0, axis=0),
        tokens=len(trace.token_id),
        documents=len(counts),
    )


def _assignments(trace: Trace) -> np.ndarray:
    """How often the tokens of each document that has any chose each expert, float64 [D, L, E]."""
    different, document = np.unique(trace.document, return_inverse=True)
    size = len(different) * trace.num_experts
    cells = document[:, None] * trace.num_experts + trace.experts.transpose(1, 0, 2)  # [L, N, K]
    counts = [np.bincount(one.ravel(), minlength=size).reshape(len(different), -1) for one in cells]
    return np.stack(counts, axis=1).astype(np.float64)


def _imbalance(counts: np.ndarray) -> np.ndarray:
    """Largest over mean count: [..., E, L] to [..., 1, L]."""
    return ratio(counts.max(axis=-2, keepdims=True), counts.mean(axis=-2, keepdims=True))


def _evenness(counts: np.ndarray) -> np.ndarray:
    """Entropy over its largest value: [..., E, L] to [..., 1, L]; a single expert is even."""
    share = ratio(counts, counts.sum(axis=-2, keepdims=True))
    entropy = -np.sum(share * np.log(np.where(share > 0, share, 1)), axis=-2, keepdims=True)
    return entropy / math.log(counts.shape[-2]) if counts.shape[-2] > 1 else np.ones_like(entropy)


def _examine(data: RoutingData) -> Finding:
    found = data.on_trace(lambda trace: _expert_load(trace, data.settings))
    share = found.share.value  # [E, L]
    names = ("imbalance", "low", "high", "evenness", "evenness low", "evenness high")
    columns = (Column("layer"), *(Column(name, ".3f") for name in names))
    columns += (Column("busiest expert"), Column("its share", ".1%"), Column("unused experts"))
    measures = (found.imbalance, found.evenness)
    numbers = np.stack([getattr(one, part)[0] for one in measures for part in ("value", "low", "high")], axis=-1)
    body = tuple(
        (layer, *numbers[layer].tolist(), int(share[:, layer].argmax()), float(share[:, layer].max()), unused)
        for layer, unused in enumerate(found.unused.tolist())
        if unused >= 0  # else the layer was not captured
    )
    words = [
        f"Shares of the assignments of {found.tokens:,} tokens in {found.documents:,} documents. imbalance: the "
        "busiest expert's share over the mean share; evenness: entropy of the shares over the largest possible one.",
    ]
    figure = ReportFigure(
        "expert_load",
        "Expert load",
        "Each row is a layer, and each column is an expert. The darker a cell, the larger the expert's share of the "
        "layer's assignments, in multiples of an even share (1: as many as every other expert).",
        "The load depends on the corpus: in other domains, other experts are busy.",
        lambda: _draw(found),
    )
    outcome = (
        f"busiest expert over the mean: {mean(found.imbalance.value):.2f}x, mean over layers; "
        f"{int(found.unused[found.unused > 0].sum())} experts unused; no published bound"
    )
    section = QUESTION.section("reported", outcome, words, [Table("Per layer", columns, body)], [figure])
    return Finding((section,), {"expert_load": found.share})  # of every expert: too wide for a table


def _draw(found: Load) -> Figure:
    share = found.share.value.T  # [L, E]
    layers, experts = share.shape
    figure, axis = subplots(figsize=(min(2.5 + 0.12 * experts, 9), min(1.8 + 0.15 * layers, 8)))
    image = heat_map(axis, share * experts, vmin=0)
    figure.colorbar(image, label="load / even load")
    axis.set(xlabel="expert", ylabel="layer")
    for ticks in (axis.xaxis, axis.yaxis):
        ticks.get_major_locator().set_params(integer=True)
    axis.set_title(f"Expert load — {found.tokens:,} tokens, {found.documents:,} documents", fontsize="medium")
    return figure


QUESTION = Question("load", "Experts share the load", _examine, needs_selection)

"""Figures of the sources of VAR's error and of its drift, readable in grayscale, and how to read them.

`analysis.report.figures.save` writes them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from analysis.report.figures import panels, subplots
from analysis.report.report import ReportFigure
from analysis.resampling import Estimate
from analysis.studies.error_sources import ErrorSources
from analysis.studies.generation_drift import Drift

KINDS = ReportFigure(
    "error_kinds",
    "Kinds of error",
    "Dots with 95 % intervals: the change of perplexity when the planned tokens are treated in one way. Above: choice "
    "and weights from the table, all experts run; and the policy, which runs fewer. Below: what is dropped with and "
    "without answers in its place, kept weights rescaled or not. Each panel has a scale of its own.",
    "Choice and weight errors save nothing: they are there to say where an error comes from, not as policies, and they "
    "need not add up. Rows run different numbers of experts: see the tables.",
)
LAYERS = ReportFigure(
    "error_layers",
    "Layers one at a time",
    "Dots with 95 % intervals: loss added when one layer alone is planned. The last two rows: their sum, and all of "
    "them together.",
    "A layer's own change is measured under layers that are left alone, so it is its price on top of the plain model, "
    "not on top of the policy. Layers that drop more experts may cost more for that reason only.",
)
GROUPS = ReportFigure(
    "error_groups",
    "Where the loss falls",
    "Dots with 95 % intervals: loss added per token of a group, at the position that made the prediction. Dashed: the "
    "mean of all tokens.",
    "A prediction also suffers from what was dropped at the tokens before it, so a group is not alone to blame for its "
    "loss; open tokens lose for that reason only. Groups differ in how hard their tokens are. Small groups have wide "
    "intervals, and none where they come from fewer than 10 documents: see the tables for their size.",
)
DRIFT = ReportFigure(
    "generation_drift",
    "Agreement with the plain model's text",
    "At each new position, with 95 % intervals over prompts: the share of prompts whose token is the plain model's "
    "(free), that have not diverged yet (together), and where the model under VAR would write the same token if fed "
    "the plain model's text (single step). Only the last says how good a step is; the distance from the others is "
    "what one different token does to all later ones.",
    "Greedy texts part at near-ties, where either token is as good: a low curve is no loss of quality by itself. A "
    "small model's greedy text repeats itself, which brings agreement back. Neighboring positions are of the same "
    "prompts, and the intervals are for each position alone; where all prompts agree an interval is a point, which is "
    "too narrow. Later positions rest on the prompts whose plain text goes on, so that (together) may even rise.",
)


def draw(sources: ErrorSources | None = None, drifted: Drift | None = None) -> Iterator[tuple[str, Figure]]:
    """The name and the figure of everything that was measured."""
    if sources is not None:
        yield KINDS.name, _draw_kinds(sources)
        yield LAYERS.name, _draw_layers(sources)
        yield GROUPS.name, _draw_groups(sources)
    if drifted is not None:
        yield DRIFT.name, _draw_drift(drifted)


def _draw_kinds(found: ErrorSources) -> Figure:
    parts = (found.kinds, found.dropping)
    figure, axes = subplots(2, 1, figsize=(6.4, 4.4), height_ratios=[len(part) for part in parts])
    for axis, part in zip(axes, parts, strict=True):
        _dot_rows(axis, [(change.name, change.perplexity) for change in part], scale=100)
    axes[0].set(title=_size(found))
    axes[1].set(xlabel="change of perplexity [%]")
    figure.tight_layout()
    return figure


def _draw_layers(found: ErrorSources) -> Figure:
    rows = [(change.name, change.nats) for change in found.layers.alone]
    rows += [("their sum", found.layers.total), ("all together", found.layers.joint.nats)]
    figure, axis = subplots(figsize=(6.4, 0.3 * len(rows) + 1.2))
    _dot_rows(axis, rows)
    axis.set(xlabel="loss added [nats per token]", title=_size(found))
    figure.tight_layout()
    return figure


def _dot_rows(axis: Any, rows: Sequence[tuple[str, Estimate]], scale: float = 1.0) -> None:
    """One row for each estimate, the first on top."""
    values = scale * np.array([dataclasses.astuple(one) for _, one in rows]).reshape(-1, 3)
    places = np.arange(len(rows))
    axis.hlines(places, values[:, 1], values[:, 2], color="0.5")
    axis.plot(values[:, 0], places, "o", color="0", markersize=4)
    axis.axvline(0, color="0.8", linewidth=0.8, zorder=0)
    axis.set_yticks(places, [name for name, _ in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)


def _draw_groups(found: ErrorSources) -> Figure:
    named = {"what answered": found.groups.key, "experts that ran": found.groups.experts}
    named["occurrences of the id"] = found.groups.frequency
    figure, axes = panels(len(named), width=4.0)
    for axis, (title, groups) in zip(axes, named.items(), strict=True):
        _dot_rows(axis, [(group.name, group.change) for group in groups])
        axis.axvline(found.groups.whole.nats.value, color="0.4", linewidth=0.8, linestyle="--")
        axis.set(title=title)
    figure.supxlabel("loss added [nats per token of the group]")
    figure.suptitle(_size(found))
    figure.tight_layout()
    return figure


def _draw_drift(found: Drift) -> Figure:
    figure, axis = subplots(figsize=(5.6, 3.8))
    agreed, position = found.agreement, np.arange(1, found.new_tokens + 1)
    named = {"single step": agreed.single_step, "free": agreed.free, "together": agreed.together}
    for style, (name, curve) in zip(("-", "--", ":"), named.items(), strict=True):
        axis.fill_between(position, curve.low, curve.high, color="0.5", alpha=0.2, linewidth=0)
        axis.plot(position, curve.value, style, color="0", label=name)
    axis.set(xlabel="new token", ylabel="share of prompts", ylim=(0, 1.02), title=f"{found.prompts} prompts, greedy")
    axis.legend(fontsize="small")
    figure.tight_layout()
    return figure


def _size(found: ErrorSources) -> str:
    return f"{found.documents:,} documents, {found.tokens:,} tokens"

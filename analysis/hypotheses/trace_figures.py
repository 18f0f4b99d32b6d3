"""Figures of what a routing trace says (phase 1), readable in grayscale; `analysis.report.figures.save` writes them.

Letters: L layers, O context orders, E experts. Every figure says how many tokens and documents it rests on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from analysis.estimators.choice_entropy import ChoiceEntropy
from analysis.estimators.co_activation import CoActivation
from analysis.estimators.expert_load import Load
from analysis.estimators.predictability import Predictability
from analysis.estimators.repetition import Repetition
from analysis.hypotheses.trace_findings import TraceFindings
from analysis.report.figures import heat_map, over_the_depth, subplots
from analysis.resampling import Measure

SHORTEST = "_of_shortest"  # ends the names of what the shortest order gets at another order's tokens


def draw(found: TraceFindings) -> Iterator[tuple[str, Figure]]:
    """The name and the figure of everything that was found, one after the other."""
    size = f"{found.tokens:,} tokens, {found.documents:,} documents"
    if not isinstance(found.predictability, str):
        yield "predictability", predictability_by_layer(found.predictability)
    if not isinstance(found.choice_entropy, str):
        yield "choice_entropy", choice_entropy_by_layer(found.choice_entropy)
    if not isinstance(found.repetition, str):
        yield "repetition", repetition_by_layer(found.repetition, size)
    if not isinstance(found.load, str):
        yield "expert_load", expert_load(found.load)
    if not isinstance(found.co_activation, str):
        yield "co_activation", co_activation_ratios(found.co_activation, size)


def predictability_by_layer(found: Predictability) -> Figure:
    """A row of panels per measure, a column per order; the coverage stands in the column's title.

    Dotted: what the shortest order gets at the same tokens.
    """
    names = [name for name in found.measures if name != "coverage" and not name.endswith(SHORTEST)]
    coverage = found.measures["coverage"].value[:, 0]
    figure, axes = _grid(len(names), len(found.orders))
    for row, name in enumerate(names):
        for column in range(len(found.orders)):
            against_null(axes[row, column], found.measures[name], column)
            axes[row, column].set_ylim(0, 1.02)
            shortest = found.measures.get(f"{name}{SHORTEST}")
            if shortest is not None and column > 0:
                axes[row, column].plot(shortest.value[column], color="0.0", linestyle=":", linewidth=1)
        axes[row, 0].set_ylabel(f"{name} [{found.measures[name].unit}]")
    for column, order in enumerate(found.orders):
        axes[0, column].set_title(f"order {order}: {coverage[column]:.0%} of tokens", fontsize="medium")
    figure.supxlabel("layer")
    figure.suptitle(
        f"Held-out predictability — {found.held_out_tokens:,} tokens, {found.held_out_documents:,} documents; "
        f"tables from {found.build_tokens:,} tokens\ndots: observed; dashed and gray: shuffled within documents; "
        f"dotted: order {min(found.orders)} at the same tokens"
    )
    figure.tight_layout()
    return figure


def choice_entropy_by_layer(found: ChoiceEntropy) -> Figure:
    """A panel per order: the corrected entropy, its null, and the entropy whatever the ids."""
    figure, axes = _grid(1, len(found.orders))
    layers = np.arange(found.unconditional.value.shape[1])
    for column, (axis, order) in enumerate(zip(axes.flat, found.orders, strict=True)):
        against_null(axis, found.measures["conditional_entropy"], column)
        axis.plot(layers, found.unconditional.value[0], color="0.5", linestyle=":", linewidth=1)
        axis.set_title(f"order {order}: {found.measures['coverage'].value[column, 0]:.0%} of tokens", fontsize="medium")
    figure.supxlabel("layer")
    axes[0, 0].set(ylabel="entropy [nats]", ylim=(0, None))  # of all panels, once all are drawn
    figure.suptitle(
        f"H(first choice | last n ids) — {found.tokens:,} tokens, {found.documents:,} documents\n"
        "dots: observed; dashed and gray: shuffled within documents; dotted: no ids"
    )
    figure.tight_layout()
    return figure


def repetition_by_layer(found: Repetition, size: str) -> Figure:
    """A panel per kind of repetition; `size` says how many tokens and documents."""
    figure, axes = _grid(1, len(found.measures), sharey=False)
    for axis, (name, measure) in zip(axes.flat, found.measures.items(), strict=True):
        against_null(axis, measure, 0)
        axis.axhline(found.uniform[name], color="0.5", linestyle=":", linewidth=1)
        axis.set_ylim(0, None)
        axis.set_title(name.replace("_", " "), fontsize="medium")
    figure.supxlabel("layer")
    axes[0, 0].set_ylabel("share of consecutive pairs")
    figure.suptitle(
        f"Repetition — {found.pairs:,} pairs; {size}\n"
        "dots: observed; dashed and gray: shuffled within documents; dotted: uniform"
    )
    figure.tight_layout()
    return figure


def expert_load(found: Load) -> Figure:
    """Load of every expert in every layer, in multiples of the even share."""
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


def co_activation_ratios(found: CoActivation, size: str, layers: int = 4) -> Figure:
    """How much more often than by load two experts are chosen together, in layers spread over the depth.

    Args:
        size: how many tokens and documents, for the caption.
        layers: how many panels at most.
    """
    known = np.flatnonzero(~np.isnan(found.share).all(axis=(1, 2)))  # the others were not captured
    shown = over_the_depth(known, layers)
    figure, axes = subplots(1, len(shown), figsize=(2.4 * len(shown) + 1.2, 2.9), squeeze=False, sharey=True)
    for axis, layer in zip(axes.flat, shown, strict=True):
        ratio = found.ratio[layer]
        drawn = np.where(ratio > 0, ratio, np.where(np.isnan(ratio), np.nan, 0.25))  # never together: the lightest
        image = heat_map(axis, np.log2(drawn), vmin=-2, vmax=2)
        axis.set(title=f"layer {layer}", xlabel="expert")
        for ticks in (axis.xaxis, axis.yaxis):
            ticks.get_major_locator().set_params(integer=True)
    axes[0, 0].set_ylabel("expert")
    figure.colorbar(image, ax=list(axes.flat), label="log2(share / expected)", extend="both")
    figure.suptitle(f"Co-activation of experts — {size}", y=1.04)
    return figure


def against_null(axis: Any, measure: Measure, row: int) -> None:
    """One row of a measure over the layers: dots with intervals, and the null as a dashed line in its band."""
    layers = np.arange(measure.value.shape[1])
    if measure.null is not None and measure.null_low is not None and measure.null_high is not None:
        axis.fill_between(layers, measure.null_low[row], measure.null_high[row], color="0.8", linewidth=0)
        axis.plot(layers, measure.null[row], color="0.5", linestyle="--", linewidth=1)
    value = measure.value[row]
    # A percentile interval need not hold its own estimate; a bar cannot have a negative length.
    bars = np.maximum([value - measure.low[row], measure.high[row] - value], 0)
    axis.errorbar(layers, value, bars, color="0", marker="o", markersize=3, linewidth=0.8)
    axis.xaxis.get_major_locator().set_params(integer=True)


def _grid(rows: int, columns: int, sharey: str | bool = "row") -> tuple[Figure, np.ndarray]:
    size = (max(3.2 * columns, 5.5), 2.2 * rows + 1.3)
    return subplots(rows, columns, figsize=size, sharex=True, sharey=sharey, squeeze=False)

"""Figures of the phases, as PNG and PDF, readable in greyscale.

Letters: L layers, R keys.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")  # files only: no window, no display

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from varjax.files import replacing
from varjax.stats import RoutingStats

_MARKERS = "os^Dv<>ph*"


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """`folder/name.png` (200 dpi) and `.pdf`, each whole or not at all; the figure is closed."""
    written = []
    for kind in ("png", "pdf"):
        path = folder / f"{name}.{kind}"
        with replacing(path) as temporary:
            figure.savefig(temporary, format=kind, dpi=200, bbox_inches="tight")
        written.append(path)
    plt.close(figure)
    return written


def frequency_against_entropy(stats: RoutingStats) -> Figure:
    """Mean gate entropy of each token id over its frequency, one panel per layer."""
    layers = len(stats.count)
    ones = stats.row_orders == 1
    columns = min(layers, 4)
    rows = -(-layers // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.0 * columns, 2.6 * rows), sharex=True, sharey=True, squeeze=False
    )
    for layer, axis in enumerate(axes.flat):
        if layer >= layers:
            axis.set_visible(False)
            continue
        seen = ones & (stats.count[layer] > 0)
        axis.scatter(
            stats.count[layer, seen], stats.entropy.mean[layer, seen], s=3, c="0.25", alpha=0.4, rasterized=True
        )
        axis.axhline(math.log(stats.num_experts), color="0.6", linewidth=0.8, linestyle=":")
        axis.axhline(0.5, color="0.0", linewidth=0.8, linestyle="--")
        axis.set(xscale="log", title=f"layer {layer}")
    figure.supxlabel("occurrences of the token id")
    figure.supylabel("mean gate entropy [nats]")
    figure.suptitle(f"Frequency and gate entropy — {_size(stats)}\ndashed: 0.5 nats; dotted: ln {stats.num_experts}")
    figure.tight_layout()
    return figure


def entropy_distribution(stats: RoutingStats) -> Figure:
    """Share of occurrences whose token id has at most a given mean gate entropy, by layer."""
    figure, axis = plt.subplots(figsize=(5.2, 3.6))
    ones = stats.row_orders == 1
    for layer in range(len(stats.count)):
        seen = ones & (stats.count[layer] > 0)
        entropy, weight = stats.entropy.mean[layer, seen], stats.count[layer, seen]
        order = np.argsort(entropy)
        shade = str(0.7 * layer / max(len(stats.count) - 1, 1))
        share = np.cumsum(weight[order]) / weight.sum()
        style = {"color": shade, "marker": _MARKERS[layer % len(_MARKERS)], "markevery": 0.1, "markersize": 4}
        axis.plot(entropy[order], share, label=f"layer {layer}", **style)
    for threshold in (0.5, 1.0, 1.5):
        axis.axvline(threshold, color="0.6", linewidth=0.8, linestyle="--")
    most = f"ln {stats.num_experts} = {math.log(stats.num_experts):.2f}"
    axis.set(
        xlabel=f"mean gate entropy of the token id [nats], at most {most}",
        ylabel="share of occurrences",
        title=f"Gate entropy — {_size(stats)}",
        xlim=(0, None),
        ylim=(0, 1),
    )
    axis.legend(fontsize="small")
    return figure


def quality_against_experts(series: Mapping[str, Sequence[tuple[float, float]]], budget: float, caption: str) -> Figure:
    """What fewer experts cost.

    Args:
        series: name -> points (experts per token and layer, relative change of perplexity).
        budget: the change that is still acceptable, drawn as a line.
        caption: which documents were scored.
    """
    figure, axis = plt.subplots(figsize=(5.2, 3.6))
    for index, (name, points) in enumerate(series.items()):
        experts, change = np.array(sorted(points)).T
        shade = str(0.6 * index / max(len(series) - 1, 1))
        line = "-" if len(points) > 1 else ""
        axis.plot(experts, 100 * change, line, color=shade, marker=_MARKERS[index % len(_MARKERS)], label=name)
    axis.axhline(100 * budget, color="0.6", linewidth=0.8, linestyle="--")
    axis.axhline(0, color="0.8", linewidth=0.8)
    axis.set(xlabel="experts run per token and layer", ylabel="change of perplexity [%]", title=caption)
    axis.legend(fontsize="small")
    return figure


def _size(stats: RoutingStats) -> str:
    return f"{stats.tokens:,} tokens of {stats.documents:,} documents"

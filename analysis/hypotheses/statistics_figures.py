"""Figures of routing statistics (phase 1), readable in grayscale; `analysis.report.figures.save` writes them.

Letters: L layers, R keys, E experts. Every figure says how many tokens and documents it rests on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from analysis.hypotheses.consistency import DECILES, Consistency
from analysis.hypotheses.criteria import ENTROPIES, GRID_ENTROPIES, GRID_FREQUENCIES, LOW_ENTROPY, MIN_COVERED, Coverage
from analysis.report.figures import MARKERS, heat_map, over_the_depth, panels, shade, subplots
from varjax.config import PRESETS
from varjax.stats import RoutingStats

_LINES = 8  # layers that lines can still tell apart; more become a heat map
_BINS = 40  # of entropy, in the heat map


def frequency_against_entropy(stats: RoutingStats, experts_in_entropy: int | None = None) -> Figure:
    """Mean gate entropy of each token id over its frequency, one panel per layer.

    Args:
        experts_in_entropy: how many probabilities the entropy is of; None: all E experts.
    """
    most = experts_in_entropy or stats.num_experts
    ones = stats.row_orders == 1
    figure, axes = panels(len(stats.count), sharex=True, sharey=True)
    for layer, axis in enumerate(axes):
        seen = ones & (stats.count[layer] > 0) & ~np.isnan(stats.entropy.mean[layer])
        axis.scatter(
            stats.count[layer, seen], stats.entropy.mean[layer, seen], s=3, c="0.25", alpha=0.4, rasterized=True
        )
        axis.axhline(math.log(most), color="0.6", linewidth=0.8, linestyle=":")
        axis.axhline(LOW_ENTROPY, color="0.0", linewidth=0.8, linestyle="--")
        axis.set(xscale="log", title=f"layer {layer}")
    figure.supxlabel("occurrences of the token id")
    figure.supylabel("mean gate entropy [nats]")
    figure.suptitle(f"Frequency and gate entropy — {size(stats)}\ndashed: {LOW_ENTROPY} nats; dotted: ln {most}")
    figure.tight_layout()
    return figure


def entropy_distribution(stats: RoutingStats, experts_in_entropy: int | None = None) -> Figure:
    """Share of occurrences by the mean gate entropy of their token id: lines, or a heat map of many layers.

    Args:
        experts_in_entropy: how many probabilities the entropy is of; None: all E experts.
    """
    most = math.log(experts_in_entropy or stats.num_experts)
    layers = len(stats.count)
    measured = stats.entropy.mean[:, stats.row_orders == 1]
    bins = np.linspace(0, max(most, measured[~np.isnan(measured)].max(initial=1e-3)), _BINS + 1)
    shares = np.full((layers, _BINS), np.nan)
    figure, axis = subplots(figsize=(5.2, 3.6 if layers <= _LINES else max(3.6, 0.16 * layers + 1.2)))
    for layer in range(layers):
        entropy = stats.entropy.mean[layer]
        seen = (stats.row_orders == 1) & (stats.count[layer] > 0) & ~np.isnan(entropy)
        if not seen.any():
            continue
        entropy, weight = entropy[seen], stats.count[layer, seen]
        shares[layer] = np.histogram(np.clip(entropy, 0, bins[-1]), bins, weights=weight / weight.sum())[0]
        if layers <= _LINES:
            order = np.argsort(entropy)
            reached = np.cumsum(weight[order]) / weight.sum()
            style = {"marker": MARKERS[layer % len(MARKERS)], "markevery": 0.1, "markersize": 4}
            axis.plot(entropy[order], reached, label=f"layer {layer}", color=shade(layer, layers), **style)
    named = f"mean gate entropy of the token id [nats], at most {most:.2f}"
    if layers <= _LINES:
        axis.set(xlabel=named, ylabel="share of occurrences at or below", xlim=(0, None), ylim=(0, 1))
        if axis.lines:
            axis.legend(fontsize="small")
    else:
        image = heat_map(axis, shares, extent=(0, bins[-1], layers - 0.5, -0.5), vmin=0)
        figure.colorbar(image, label=f"share of occurrences per {bins[1]:.3f} nats")
        axis.set(xlabel=named, ylabel="layer")
    for threshold in ENTROPIES:
        if threshold <= bins[-1]:
            axis.axvline(threshold, color="0.4", linewidth=0.8, linestyle="--")
    axis.set_title(f"Gate entropy — {size(stats)}", fontsize="medium")
    return figure


def consistency_by_decile(found: Consistency, stats: RoutingStats) -> Figure:
    """Mean routing consistency by decile of frequency, with its mean and range by chance, a panel per layer."""
    figure, axes = panels(len(found.value), sharex=True, sharey=True)
    decile = np.arange(1, DECILES + 1)
    for layer, axis in enumerate(axes):
        value, low, high, null, null_low, null_high = (
            getattr(found, name)[layer, -DECILES:] for name in ("value", "low", "high", "null", "null_low", "null_high")
        )
        if not np.isnan(value).all():
            axis.fill_between(decile, null_low, null_high, color="0.8", linewidth=0)
            axis.plot(decile, null, color="0.5", linestyle="--", linewidth=1)
            axis.errorbar(decile, value, [value - low, high - value], color="0", marker="o", markersize=3, linewidth=1)
        axis.set(ylim=(0, 1.02), title=f"layer {layer}")
    figure.supxlabel("decile of token ids by frequency, 10: the most frequent")
    figure.supylabel("share of the commonest first choice")
    figure.suptitle(
        f"Routing consistency (in sample) — {size(stats)}\ndots: observed; dashed and gray: by chance alone"
    )
    figure.tight_layout()
    return figure


def fast_path_coverage(found: Coverage, stats: RoutingStats) -> Figure:
    """Coverage by layer under the presets, and its mean over layers by threshold."""
    layers = np.arange(len(stats.count))
    figure, (by_layer, grid) = subplots(1, 2, figsize=(10.5, 3.8))
    for index, (name, values) in enumerate(found.presets.items()):
        preset = PRESETS[name]
        label = f"{name}: ≥ {preset['frequency_threshold']}, ≤ {preset['entropy_threshold']} nats"
        by_layer.errorbar(
            layers + 0.15 * (index - 1),
            100 * values.value,
            100 * np.stack([values.value - values.low, values.high - values.value]),
            color=shade(index, len(found.presets)),
            marker=MARKERS[index],
            markersize=4,
            linewidth=0,
            elinewidth=1,
            label=label,
        )
    by_layer.axhline(100 * MIN_COVERED, color="0.6", linewidth=0.8, linestyle="--")
    by_layer.set(xlabel="layer", ylabel="occurrences covered [%]", ylim=(-2, 102))
    by_layer.xaxis.get_major_locator().set_params(integer=True)
    by_layer.legend(fontsize="small")
    testable = ~np.isnan(found.grid).all(axis=(1, 2))
    mean = found.grid[testable].mean(axis=0) if testable.any() else np.full(found.grid.shape[1:], np.nan)
    image = heat_map(grid, 100 * mean, ".0f", vmin=0, vmax=100)
    figure.colorbar(image, label="occurrences covered [%]")
    grid.set(xlabel="most mean gate entropy [nats]", ylabel="least occurrences of the token id")
    grid.set_xticks(range(len(GRID_ENTROPIES)), [f"{most:g}" for most in GRID_ENTROPIES])
    grid.set_yticks(range(len(GRID_FREQUENCIES)), [str(least) for least in GRID_FREQUENCIES])
    grid.set_title(f"mean over {testable.sum()} layers", fontsize="medium")
    by_layer.set_title("dashed: the criterion, balanced preset", fontsize="medium")
    figure.suptitle(f"Fast-path coverage — {size(stats)}")
    figure.tight_layout()
    return figure


def token_experts(stats: RoutingStats, strings: Mapping[int, str], ids: int = 30, layers: int = 4) -> Figure:
    """Share of each expert among the first choices of the most frequent token ids, in layers spread over the depth.

    Args:
        strings: the text of each id, as far as known.
        ids: how many rows.
        layers: how many panels at most.
    """
    known = np.flatnonzero(stats.count.any(axis=1))  # a layer without rows was not captured
    known = known if len(known) else np.arange(len(stats.count))
    shown = over_the_depth(known, layers)
    ones = np.flatnonzero(stats.row_orders == 1)
    frequency = stats.count[:, ones].max(axis=0, initial=0)
    rows = ones[np.argsort(-frequency, kind="stable")[:ids]]
    labels = [readable(strings.get(int(one), f"id {one}")) for one in stats.keys[rows, -1]]
    width = min(1.0 + 0.09 * stats.num_experts, 6)
    figure, axes = subplots(
        1, len(shown), figsize=(1.4 + width * len(shown), 0.9 + 0.17 * max(len(rows), 4)), squeeze=False, sharey=True
    )
    for axis, layer in zip(axes.flat, shown, strict=True):
        count = stats.count[layer, rows][:, None]
        share = np.where(count > 0, stats.top1_counts[layer, rows] / np.maximum(count, 1), np.nan)
        image = heat_map(axis, 100 * share.reshape(len(rows), stats.num_experts), vmin=0, vmax=100)
        axis.set(title=f"layer {layer}", xlabel="expert")
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes.flat[0].set_yticks(range(len(rows)), labels, fontsize=6, parse_math=False)
    figure.colorbar(image, ax=list(axes.flat), label="share of first choices [%]")
    figure.suptitle(f"First choices of the {len(rows)} most frequent token ids — {size(stats)}")
    return figure


def readable(text: str) -> str:
    """A token's text in one line of characters that the font has, spaces as dots; others are escaped."""
    known = (one if one.isprintable() and (ord(one) < 0x250 or one == "▁") else ascii(one)[1:-1] for one in text)
    return "".join(known).replace(" ", "·")


def size(stats: RoutingStats) -> str:
    """How many tokens and documents, for a caption."""
    documents = f"{stats.documents:,} documents" if stats.documents else "documents not known"
    return f"{stats.tokens:,} tokens, {documents}"

"""Figures of a replay; how to read them is said in `analysis.traces.replay_report`.

Letters: L layers, A age buckets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from analysis.report.figures import stacked_tiers, subplots
from varjax.step import TIERS

if TYPE_CHECKING:
    from analysis.replay import Replay


def tiers_by_layer(found: Replay) -> Figure:
    """Who decides in each layer, and how well the fast and the cached tier foretell the router's choice."""
    layers = [found.rates(layer) for layer in range(len(found.sums.tokens))]
    figure, (shares, quality) = subplots(2, 1, figsize=(6.4, 6.0), sharex=True)
    # None, of a layer that was not captured, becomes NaN and is not drawn.
    by_tier = [{tier: np.nan if share is None else share for tier, share in one["shares"].items()} for one in layers]
    stacked_tiers(shares, by_tier)
    # The unlimited cache comes after the same fast tier.
    unlimited = np.array([rates["unlimited_cache"]["share"] for rates in layers], float)
    bound = np.array([one["fast"] for one in by_tier]) + unlimited
    shares.plot(range(len(layers)), bound, "k_", markersize=10, label="fast + unlimited cache")
    shares.set(title=_caption(found))
    shares.legend(fontsize="small", ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.02))

    lines = (("agreement", "-"), ("recall", ":"))
    for tier, shade, marker in zip(TIERS[:2], ("0.25", "0.6"), "os", strict=True):
        for name, style in lines:
            values = np.array([rates[tier][name] for rates in layers], float)  # None becomes NaN, and is not drawn
            if np.isfinite(values).any():
                label = f"{tier}, {name}"
                quality.plot(values, style, color=shade, marker=marker, markersize=4, label=label)
    for name, style in lines:
        values = np.array([rates["constant"][name] for rates in layers], float)
        if np.isfinite(values).any():
            quality.plot(values, style, color="0.75", linewidth=0.9, label=f"constant table, {name}")
    quality.set(xlabel="layer", ylabel="first expert, all experts foretold", ylim=(0, 1.02))
    quality.xaxis.set_major_locator(MaxNLocator(integer=True))
    quality.legend(fontsize="small", ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    quality.yaxis.set_major_formatter(PercentFormatter(1))
    return figure


def mispredictions_by_age(found: Replay) -> Figure:
    """False hits of the cached tier by the age of the decision, in each layer. Hatched: fewer than 20 decisions."""
    buckets = 1 + int(np.max(np.flatnonzero(found.sums.aged.any(axis=0)), initial=0))  # up to the last with any
    decisions, agreed = found.sums.aged[:, :buckets], found.sums.aged_agreements[:, :buckets]
    enough = decisions >= 20
    rate = np.where(enough, 1 - agreed / np.maximum(decisions, 1), np.nan)
    figure, axis = subplots(figsize=(6.4, 1.8 + 0.16 * len(decisions)))
    top = max(0.01, float(np.max(rate, where=enough, initial=0)))
    image = axis.imshow(rate, cmap="Greys", vmin=0, vmax=top, aspect="auto", origin="lower")
    figure.colorbar(image, ax=axis, label="mispredictions", format=PercentFormatter(1))
    edges = [f"{edge:,}" for edge in found.age_edges[:buckets]]
    axis.patch.set(hatch="xxx", edgecolor="0.8")  # shows where there is nothing
    axis.set_xticks(range(len(edges)), edges, rotation=45, ha="right")
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    unit = f"age of the decision, from [tokens of {found.seconds_per_token:g} s]"
    axis.set(xlabel=unit, ylabel="layer", title=_caption(found))
    return figure


def _caption(found: Replay) -> str:
    name = found.origin.get("model", "a trace")
    return f"Replay on {name}\n{found.tokens:,} tokens of {found.documents:,} documents"

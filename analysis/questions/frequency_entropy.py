"""Are frequent token ids routed with more certainty? Spearman's correlation of frequency and mean gate entropy."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from analysis.criteria import LOW_ENTROPY, MAX_RHO
from analysis.questions import by_layer
from analysis.questions.data import RoutingData, needs_routing
from analysis.questions.drawn import LayerDraws
from analysis.questions.question import Question
from analysis.report.figures import panels
from analysis.report.report import ReportFigure, Section
from analysis.resampling import holm, ratio
from varjax.stats import RoutingStats


@dataclass(frozen=True)
class Correlation:
    """Spearman's rho of frequency and mean gate entropy."""

    rho: by_layer.Values  # interval of Bonett and Wright (2000)
    p: np.ndarray  # float64 [L], of rho = 0, Student's t
    p_holm: np.ndarray  # float64 [L], over layers
    used: by_layer.UsedIds


def _frequency_entropy(stats: RoutingStats) -> Correlation:
    """Rho of every layer."""
    used = by_layer.used_ids(stats, "entropy")
    rho, p = np.full((2, len(stats.count)), np.nan)
    untestable = list(used.untestable)
    for layer in np.flatnonzero(used.testable).tolist():
        frequency, entropy = (one[layer, used.rows[layer]] for one in (stats.count, stats.entropy.mean))
        for name, values in (("frequency", frequency), ("mean entropy", entropy)):
            if np.all(values == values[0]):
                untestable[layer] = untestable[layer] or f"every {name} is {values[0]:g}: no ranks to compare"
        if not untestable[layer]:
            rho[layer], p[layer] = spearmanr(frequency, entropy)
    inside = np.clip(rho, -1 + 1e-12, 1 - 1e-12)
    half = by_layer.Z95 * np.sqrt((1 + inside**2 / 2) / np.maximum(used.number - 3, 1))
    low, high = np.tanh(np.arctanh(inside) - half), np.tanh(np.arctanh(inside) + half)
    used = by_layer.UsedIds(used.rows, used.left_out, untestable)
    return Correlation(by_layer.Values(rho, low, high), p, holm(p), used)


def _drawn_rho(drawn: LayerDraws) -> np.ndarray:
    """Rho in each draw, over the ids that it contains, float64 [B]."""
    present, entropy, ids = drawn.block.rank, drawn.entropy_rank, drawn.block.ids
    middle = ids * np.square((ids + 1) / 2)  # ranks of n ids, with ties or not, have the mean (n + 1) / 2
    pairs = ((present, entropy), (present, present), (entropy, entropy))
    product, own, other = (np.einsum("br,br->b", one, two) - middle for one, two in pairs)
    return ratio(product, np.sqrt(np.maximum(own * other, 0)))


def _examine(data: RoutingData) -> Section:
    found = _frequency_entropy(data.stats)
    used, rho = found.used, by_layer.over_documents(data, found.rho, _drawn_rho, least=-1)
    verdict, outcome, verdicts = by_layer.verdict(data, used, rho.value < MAX_RHO, f"rho < {MAX_RHO:g}")
    words = [
        "Spearman's rho of a token id's frequency and its mean gate entropy. The criterion is on rho alone, as "
        "published; with few ids, a rho below the bound can be due to chance: see p (for rho = 0, treating ids as "
        "independent).",
        *(["Intervals of Bonett and Wright (2000)."] if data.draws is None else []),
        *data.entropy.caution,
        *used.words(data, "mean entropy"),
    ]
    columns = {name: (values, "+.3f") for name, values in zip(("rho", "low", "high"), rho, strict=True)}
    columns |= {"p": (found.p, ".1e"), "p, Holm": (found.p_holm, ".1e")}
    table = by_layer.table("Per layer", columns, used, verdicts)
    figures = [frequency_figure(data.stats, data.entropy.experts)] if used.testable.any() else []
    return QUESTION.section(verdict, outcome, words, [table], figures)


def frequency_figure(stats: RoutingStats, experts: int | None = None) -> ReportFigure:
    """Describe the figure of frequency and gate entropy.

    Args:
        stats: routing statistics.
        experts: how many probabilities the entropy is of; None: of all experts.

    Returns:
        The figure, which is drawn later.
    """
    return ReportFigure(
        "frequency_entropy",
        "Frequency and gate entropy",
        "Each dot is a token id, at its frequency and the mean entropy of the gate over its occurrences. A cloud that "
        "falls to the right shows that frequent ids are routed with more certainty.",
        "The mean entropy of rare ids is noisy, which widens the cloud on the left. Where dots overlap, their number "
        "cannot be seen.",
        lambda: _draw(stats, experts or stats.num_experts),
    )


def _draw(stats: RoutingStats, experts: int) -> Figure:
    figure, axes = panels(len(stats.count), sharex=True, sharey=True)
    used = by_layer.used_ids(stats, "entropy")
    for layer, (axis, rows) in enumerate(zip(axes, used.rows, strict=True)):
        axis.scatter(
            stats.count[layer, rows], stats.entropy.mean[layer, rows], s=3, c="0.25", alpha=0.4, rasterized=True
        )
        axis.axhline(math.log(experts), color="0.6", linewidth=0.8, linestyle=":")
        axis.axhline(LOW_ENTROPY, color="0.0", linewidth=0.8, linestyle="--")
        axis.set(xscale="log", title=f"layer {layer}")
    figure.supxlabel("occurrences of the token id")
    figure.supylabel("mean gate entropy [nats]")
    figure.suptitle(
        f"Frequency and gate entropy — {by_layer.size(stats)}\ndashed: {LOW_ENTROPY} nats; dotted: ln {experts}"
    )
    figure.tight_layout()
    return figure


QUESTION = Question("frequency_entropy", "Frequent token ids are routed with more certainty", _examine, needs_routing)

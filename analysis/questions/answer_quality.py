"""How much of the experts' output do the answers explain, layer by layer?

Letters: A layers with answers, N answers of a layer, O orders.

A share of 0 means that the expert's output is known from the token ids alone (or, for affine answers, from a small map
of its input), 1 that the answer says nothing.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.questions.question import Finding, Question
from analysis.report.figures import subplots
from analysis.report.report import Column, ReportFigure, Table
from varjax.answers import Answers
from varjax.config import VARConfig
from varjax.keys import ANY
from varjax.routing import NO_ANSWER
from varjax.shrinkage import shrunk


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer. Shares are of the squared output of the experts, weighted by the gate."""

    layer: int
    typical: float  # median norm of an expert's output
    outliers: int  # outputs left out because they are far larger, see `varjax.answers`
    unexplained: tuple[float | None, ...]  # by order, at tokens that have such a key; None: there is none
    left_by_map: float | None  # share of the squared deviation from the mean that the map leaves, held out


def layer_quality(answers: Answers, layer: int, shrinkage: float) -> Layer:
    """Measure the answers of one layer.

    Args:
        answers: as they were collected.
        layer: one of `answers.layers`.
        shrinkage: as in `varjax.shrinkage.shrunk`, whose estimate of the error on other text is used.

    Returns:
        The measurements.
    """
    a = answers.layers.index(layer)
    mass, power = answers.mass[a], answers.m2[a] + answers.mass[a] * np.square(answers.mean[a]).sum(axis=-1)
    missed = mass * np.square(shrunk(answers, layer, shrinkage).deviation, dtype=np.float64)
    order = np.full(len(mass), -1)
    row, expert = np.nonzero(answers.entry[a] != NO_ANSWER)
    order[answers.entry[a][row, expert]] = (answers.keys[row] != ANY).sum(axis=1)
    shares = [
        float(missed[order == n].sum() / total) if (total := power[order == n].sum()) > 0 else None
        for n in answers.ngram_orders
    ]
    left = None
    if answers.maps is not None:
        # Order 0 sees how often each expert was chosen.
        root = answers.entry[a][(answers.keys == ANY).all(axis=1)].ravel()
        weight = np.where(root == NO_ANSWER, 0, missed[root])
        left = float(np.average(answers.maps.unexplained[a], weights=weight)) if weight.any() else None
    outliers = int(answers.outliers[a].sum())
    return Layer(layer, float(answers.typical[a]), outliers, tuple(shares), left)


def _examine(answers: Answers) -> Finding:
    found = [layer_quality(answers, layer, VARConfig().answer_shrinkage) for layer in answers.layers]
    orders = answers.ngram_orders
    columns = (
        *(Column("layer"), Column("typical norm", ".3g"), Column("outliers", ",")),
        *(Column(f"order {order}", ".3f") for order in orders),
        *((Column("left by the map", ".3f"),) if answers.maps is not None else ()),
    )
    rows = [
        (one.layer, one.typical, one.outliers, *one.unexplained, *([one.left_by_map] if answers.maps else []))
        for one in found
    ]
    words = [
        "Order n: the share of the experts' squared output, weighted by the gate, that the mean at the last n token "
        "ids leaves unexplained on other text, as estimated from these documents, at tokens that have such a key. "
        "Order 0: one mean per expert.",
    ]
    best = [min((share for share in one.unexplained if share is not None), default=np.nan) for one in found]
    outcome = f"the best order leaves {np.nanmean(best):.0%} of the squared output unexplained, mean over layers"
    headline = f"{np.nanmean(best):.0%} unexplained by means"
    if answers.maps is not None:
        left = np.nanmean([np.nan if one.left_by_map is None else one.left_by_map for one in found])
        words.append(
            f"Left by the map: the share of the squared deviation from the mean that remains when a map of rank "
            f"{answers.maps.rank} reads the deviation of the input, on held-out documents. 1: the map adds nothing."
        )
        outcome += f"; maps of rank {answers.maps.rank} leave {left:.0%} of the deviation from the mean"
        headline += f", {left:.0%} of the rest left by maps"
    figure = ReportFigure(
        "answers",
        "What answers leave unexplained",
        "One line per order: the share of the squared output that the mean at the last n token ids leaves. Dashed: the "
        "share of the deviation from the mean that the map leaves.",
        "Orders are measured at different tokens: those that have such a key. A longer key is not worse than a shorter "
        "one because its line is higher.",
        lambda: _draw(found, orders),
    )
    section = QUESTION.section(
        "reported", outcome, words, [Table("By layer", columns, tuple(rows))], [figure], headline
    )
    return Finding((section,), {"answers": found})


def _draw(found: list[Layer], orders: tuple[int, ...]) -> Figure:
    figure, axis = subplots(figsize=(4.5, 2.8))
    layers = [one.layer for one in found]
    for place, (order, shade) in enumerate(zip(orders, np.linspace(0.75, 0, len(orders)), strict=True)):
        shares = [np.nan if (share := one.unexplained[place]) is None else share for one in found]
        axis.plot(layers, shares, "o-", color=str(shade), markersize=3, linewidth=1, label=f"order {order}")
    if any(one.left_by_map is not None for one in found):
        left = [np.nan if one.left_by_map is None else one.left_by_map for one in found]
        axis.plot(layers, left, "--", color="0", linewidth=1, label="left by the map")
    axis.set(xlabel="layer", ylabel="unexplained share", ylim=(0, 1.05))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(fontsize="x-small", ncols=2)
    figure.tight_layout()
    return figure


QUESTION = Question("answers", "How much of the experts' output the answers explain", _examine)

"""Is routing consistent? How often a token id's most common first choice came first, against what chance would give.

Letters: L layers, G groups of token ids, E experts, B draws of a block.

Consistency is *in sample*: the most common choice is picked on the very occurrences that it is scored on, so a rare id
is consistent by itself (one occurrence: 1). The null shows by how much: every occurrence draws its expert from the
layer's own shares of first choices, whatever the id. It knows no documents: where documents have favorite experts, an
id that occurs in few documents is more consistent than the null without any influence of the id.

The null is simulated, and all ids of one frequency share its draws. So its mean has an error of its own, the same for
all of them, and the band covers both chance in the data and this error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from matplotlib.figure import Figure

from analysis.questions import by_layer
from analysis.questions.data import RoutingData, needs_routing
from analysis.questions.drawn import LayerDraws
from analysis.questions.question import Question
from analysis.report.figures import heat_map, over_the_depth, panels, subplots
from analysis.report.report import Column, ReportFigure, Section, Table
from analysis.resampling import ratio
from varjax.stats import RoutingStats

TOP = 1000  # most frequent token ids, a group of their own
DECILES = 10
GROUPS = (
    *("all token ids", "all occurrences", f"top {TOP:,} ids", "decile 1 (rarest)"),
    *(f"decile {number}" for number in range(2, DECILES)),
    f"decile {DECILES} (most frequent)",
)


@dataclass(frozen=True)
class Consistency:
    """Mean consistency of GROUPS; those of fewer than MIN_KEYS ids have neither interval nor band: NaN."""

    values: by_layer.Values  # [L, G]
    null: by_layer.Values  # [L, G]: the mean under the null, and where 95% of such means are
    keys: np.ndarray  # int64 [L, G]
    frequencies: np.ndarray  # int64 [L, G, 2], of the rarest and of the most frequent id
    used: by_layer.UsedIds


def _consistency(
    stats: RoutingStats, first_choices_known: bool = True, samples: int = 100, seed: int = 0
) -> Consistency:
    """Consistency of GROUPS: all ids, all occurrences, the most frequent ids, and deciles of ids by frequency.

    Args:
        stats: routing statistics with keys of order 1.
        first_choices_known: False where `top1_counts` names the most common choice only; the layer's shares are then
            estimated from the mean probabilities, which the reader of the file filled in.
        samples: simulated draws of every different frequency; as many as it has ids, if these are more.
        seed: of the simulation.
    """
    used = by_layer.used_ids(stats, "consistency")
    shape = (len(stats.count), len(GROUPS))
    figures = np.full((6, *shape), np.nan)
    keys, frequencies = np.zeros(shape, np.int64), np.zeros((*shape, 2), np.int64)
    rng = np.random.default_rng(seed)
    for layer in np.flatnonzero(used.testable).tolist():
        rows = used.rows[layer]
        rows = rows[np.argsort(stats.count[layer, rows], kind="stable")]
        count, share = stats.count[layer, rows], stats.routing_consistency[layer, rows]
        marginal = (stats.top1_counts if first_choices_known else stats.sum_probs)[layer, rows].sum(axis=0)
        different, which, ids = np.unique(count, return_inverse=True, return_counts=True)
        draws = np.maximum(ids, samples)
        mean, variance = _largest_shares(different, marginal / marginal.sum(), draws, rng)
        every, ones = np.arange(len(rows)), np.ones(len(rows))
        for group, part in enumerate([every, every, every[-TOP:], *np.array_split(every, DECILES)]):
            weight = (count if group == 1 else ones)[part]
            weight = weight / weight.sum()
            value, null = weight @ share[part], weight @ mean[which[part]]
            together = np.bincount(which[part], weight, len(different))  # weight of each frequency
            chance = np.square(weight) @ variance[which[part]] + np.square(together) @ (variance / draws)
            enough = 1 if len(part) >= by_layer.MIN_KEYS else np.nan
            half = enough * by_layer.Z95 * np.sqrt(np.square(weight) @ np.square(share[part] - value))
            null_half = enough * by_layer.Z95 * np.sqrt(chance)
            figures[:, layer, group] = (value, value - half, value + half, null, null - null_half, null + null_half)
            keys[layer, group] = len(part)
            frequencies[layer, group] = count[part[0]], count[part[-1]]
    figures = np.clip(figures, 0, 1)
    return Consistency(by_layer.Values(*figures[:3]), by_layer.Values(*figures[3:]), keys, frequencies, used)


def _largest_shares(
    count: np.ndarray, marginal: np.ndarray, draws: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance [n] of the most common expert's share, if counts [n] draw from shares [E], `draws` times."""
    made = [rng.multinomial(n, marginal, times).max(axis=-1) / n for n, times in zip(count, draws, strict=True)]
    return np.array([one.mean() for one in made]), np.array([one.var() for one in made])


def _drawn_groups(drawn: LayerDraws) -> np.ndarray:
    """Mean consistency of the groups in each draw, float64 [B, G]."""
    block, largest = drawn.block, drawn.largest
    of_id = np.divide(largest, block.count, out=np.zeros_like(largest), where=block.count > 0)
    reached = np.zeros((len(largest), largest.shape[1] + 1))  # sums of the rarest ids
    np.cumsum(np.take_along_axis(of_id, block.order, axis=1), axis=1, out=reached[:, 1:])
    absent = largest.shape[1] - block.ids
    length, more = np.divmod(block.ids, DECILES)  # as np.array_split: the first ones have one id more
    edges = [absent + part * length + np.minimum(part, more) for part in range(DECILES + 1)]
    groups = [(edges[0], edges[-1]), (np.maximum(edges[-1] - TOP, edges[0]), edges[-1]), *pairwise(edges)]

    def until(edge: np.ndarray) -> np.ndarray:
        return np.take_along_axis(reached, edge[:, None], axis=1)[:, 0]

    ids, top, *deciles = (ratio(until(end) - until(start), end - start) for start, end in groups)
    return np.stack([ids, ratio(largest.sum(axis=1), block.total), top, *deciles], axis=-1)


def _examine(data: RoutingData) -> Section:
    stats = data.stats
    estimated = "top1_counts" in data.source.meta.get("filled", {})
    found = _consistency(stats, not estimated, seed=data.settings.seed)
    used, null, testable = found.used, found.null, np.flatnonzero(found.used.testable)
    some = found.values._replace(value=np.where(found.keys < by_layer.MIN_KEYS, np.nan, found.values.value))
    values = by_layer.over_documents(data, some, _drawn_groups)._replace(value=found.values.value)
    above = int(np.sum(values.value[testable, 0] > null.high[testable, 0]))
    layers = len(used.untestable)
    missing = by_layer.not_testable(layers - len(testable))
    columns = [Column("layer"), Column("group")]
    columns += [Column(one, ".3f") for one in ("consistency", "low", "high", "null", "null low", "null high")]
    columns += [Column(one, ",") for one in ("ids", "least", "most")]
    numbers = np.stack([*values, *null], axis=-1).tolist()
    rows = tuple(
        (layer, group, *numbers[layer][at], int(found.keys[layer, at]), *found.frequencies[layer, at].tolist())
        for layer in testable.tolist()
        for at, group in enumerate(GROUPS)
    )
    words = [
        "Share of a token id's occurrences with its most common first choice, in sample. Null: every occurrence "
        "draws its expert from the layer's own shares. Only the distance between the two says something about "
        "routing. Least and most: occurrences of the rarest and the most frequent id of a group.",
        "Caution: the null does not account for documents. Routing that depends on the document alone is above it too, "
        "because an id occurs in few documents. Held-out predictability rules that out.",
        "Intervals of ±1.96 standard errors."
        if data.draws is None
        else "Intervals hold for as many documents; in longer texts, less of the consistency is due to chance.",
    ]
    if estimated:
        words.append(
            "The file names only the most common first choice of an id, so the layer's shares are estimated (the "
            "rest in equal parts) and the null is too low: read the distance from it as an upper bound."
        )
    figures = [
        ReportFigure(
            "routing_consistency",
            "Routing consistency by frequency",
            "The consistency of a token id is the share of its occurrences with its most common first choice. Dots: "
            "mean over a tenth of the ids, the rarest on the left, with intervals. Dashed line and gray: what chance "
            "alone gives for ids of this frequency. Only the distance between the two says something about routing.",
            "On the left, both are high because ids with few occurrences look consistent by chance. The section on "
            "predictability shows how well choices are predicted on unseen text.",
            lambda: _draw(values, null, stats),
        ),
        ReportFigure(
            "token_experts",
            "First choices of the most frequent token ids",
            "Each row is a token id, and each column is an expert. The darker a cell, the more often the expert is the "
            "id's first choice. A row with a single dark cell is an id whose first choice is almost always the same "
            "expert.",
            "Only the most frequent ids are shown, and they differ from the rest. A dark column is a popular expert, "
            "not a rule about tokens.",
            lambda: _token_experts(stats, data.source.strings),
        ),
    ]
    return QUESTION.section(
        "reported" if len(testable) else "not testable",
        f"above its null over all ids in {above} of {layers} layers{missing}; no published bound",
        [*words, *used.words(data, "consistency")],
        [Table("", tuple(columns), rows)] if rows else (),
        figures if len(testable) else (),
    )


def _draw(values: by_layer.Values, null: by_layer.Values, stats: RoutingStats) -> Figure:
    figure, axes = panels(len(values.value), sharex=True, sharey=True)
    decile = np.arange(1, DECILES + 1)
    for layer, axis in enumerate(axes):
        value, low, high, chance, chance_low, chance_high = (one[layer, -DECILES:] for one in (*values, *null))
        if not np.isnan(value).all():
            axis.fill_between(decile, chance_low, chance_high, color="0.8", linewidth=0)
            axis.plot(decile, chance, color="0.5", linestyle="--", linewidth=1)
            axis.errorbar(decile, value, [value - low, high - value], color="0", marker="o", markersize=3, linewidth=1)
        axis.set(ylim=(0, 1.02), title=f"layer {layer}")
    figure.supxlabel("decile of token ids by frequency, 10: the most frequent")
    figure.supylabel("share of the most common first choice")
    figure.suptitle(
        f"Routing consistency (in sample) — {by_layer.size(stats)}\ndots: observed; dashed and gray: by chance alone"
    )
    figure.tight_layout()
    return figure


def _token_experts(stats: RoutingStats, strings: Mapping[int, str], ids: int = 30, layers: int = 4) -> Figure:
    """Share of each expert among the first choices of the most frequent ids, in at most 4 layers over the depth."""
    known = np.flatnonzero(stats.count.any(axis=1))  # a layer without rows was not captured
    shown = over_the_depth(known if len(known) else np.arange(len(stats.count)), layers)
    ones = np.flatnonzero(stats.row_orders == 1)
    frequency = stats.count[:, ones].max(axis=0, initial=0)
    rows = ones[np.argsort(-frequency, kind="stable")[:ids]]
    labels = [_readable(strings.get(int(one), f"id {one}")) for one in stats.keys[rows, -1]]
    width = min(1.0 + 0.09 * stats.num_experts, 6)
    figure, axes = subplots(
        1, len(shown), figsize=(1.4 + width * len(shown), 0.9 + 0.17 * max(len(rows), 4)), squeeze=False, sharey=True
    )
    for axis, layer in zip(axes.flat, shown, strict=True):
        share = ratio(stats.top1_counts[layer, rows], stats.count[layer, rows][:, None])
        image = heat_map(axis, 100 * share.reshape(len(rows), stats.num_experts), vmin=0, vmax=100)
        axis.set(title=f"layer {layer}", xlabel="expert")
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes.flat[0].set_yticks(range(len(rows)), labels, fontsize=6, parse_math=False)
    figure.colorbar(image, ax=list(axes.flat), label="share of first choices [%]")
    figure.suptitle(f"First choices of the {len(rows)} most frequent token ids — {by_layer.size(stats)}")
    return figure


def _readable(text: str) -> str:
    """A token's text in one line of characters that the font has: spaces as dots, others escaped."""
    known = (one if one.isprintable() and (ord(one) < 0x250 or one == "▁") else ascii(one)[1:-1] for one in text)
    return "".join(known).replace(" ", "·")


QUESTION = Question("consistency", "Routing is consistent", _examine, needs_routing)

"""Could a fast path cover many occurrences? The share at token ids that are frequent enough and certain enough."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from analysis.criteria import MIN_COVERED
from analysis.questions import by_layer
from analysis.questions.data import RoutingData, needs_routing
from analysis.questions.drawn import LayerDraws
from analysis.questions.question import Question
from analysis.report.figures import MARKERS, heat_map, shade, subplots
from analysis.report.report import Column, ReportFigure, Section, Table
from analysis.resampling import ratio
from varjax.config import PRESETS
from varjax.stats import RoutingStats

GRID_FREQUENCIES = (5, 10, 25, 50, 100, 200)
GRID_ENTROPIES = (0.1, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0)  # nats
_BALANCED = list(PRESETS).index("balanced")


@dataclass(frozen=True)
class Coverage:
    """Share of occurrences at token ids that pass a frequency and an entropy threshold, of all tokens of the layer."""

    presets: by_layer.Values  # [L, P], by `varjax.config.PRESETS`; Wilson intervals
    grid: np.ndarray  # float64 [L, F, H]: frequency >= GRID_FREQUENCIES[f] and entropy <= GRID_ENTROPIES[h]
    unknown: np.ndarray  # float64 [L], share of occurrences at ids whose entropy is NaN, which pass no threshold
    used: by_layer.UsedIds


def _coverage(stats: RoutingStats) -> Coverage:
    """Shares of all tokens that a layer routed, also of those at ids that are not keys."""
    used = by_layer.used_ids(stats, "entropy", 1)
    known = np.where(stats.row_orders == 1, stats.count, 0)
    whole = np.maximum(stats.tokens - stats.nonfinite, known.sum(axis=1)).astype(np.float64)

    def covered(least: float, most: float) -> np.ndarray:
        inside = (known >= least) & (stats.entropy.mean <= most)  # NaN is not
        return np.where(used.testable, np.sum(known * inside, axis=1) / np.maximum(whole, 1), np.nan)

    # Tokens at ids that are not keys are counted as ids of their own, seen once.
    squares = np.square(known.astype(np.float64)).sum(axis=1) + whole - known.sum(axis=1)
    effective = np.maximum(np.square(whole) / np.maximum(squares, 1), 1)
    thresholds = [(one["frequency_threshold"], one["entropy_threshold"]) for one in PRESETS.values()]
    presets = np.stack([covered(*one) for one in thresholds], axis=-1)
    grid = [[covered(least, most) for most in GRID_ENTROPIES] for least in GRID_FREQUENCIES]
    unknown = np.sum(known * np.isnan(stats.entropy.mean), axis=1) / np.maximum(whole, 1)
    return Coverage(by_layer.wilson(presets, effective[:, None]), np.moveaxis(np.array(grid), -1, 0), unknown, used)


def _drawn_presets(drawn: LayerDraws) -> np.ndarray:
    """Coverage of the presets in each draw, float64 [B, P]."""
    count, entropy = drawn.block.count, drawn.mean_entropy
    covered = [
        np.sum(count, axis=1, where=(entropy <= one["entropy_threshold"]) & (count >= one["frequency_threshold"]))
        for one in PRESETS.values()
    ]
    return ratio(np.stack(covered, axis=-1), drawn.block.total[:, None])


def _examine(data: RoutingData) -> Section:
    found = _coverage(data.stats)
    used, presets = found.used, by_layer.over_documents(data, found.presets, _drawn_presets)
    frequency, entropy = (PRESETS["balanced"][name] for name in ("frequency_threshold", "entropy_threshold"))
    criterion = f"more than {MIN_COVERED:.0%} of occurrences at ids seen ≥ {frequency} times with ≤ {entropy:g} nats"
    passed = presets.value[:, _BALANCED] > MIN_COVERED
    verdict, outcome, verdicts = by_layer.verdict(data, used, passed, criterion, fails_are_valid=True)
    columns = {
        name: (values[:, at], by_layer.SHARE)
        for at, preset in enumerate(PRESETS)
        for name, values in zip((preset, f"{preset[:4]}. low", f"{preset[:4]}. high"), presets, strict=True)
    }
    columns["unknown"] = (found.unknown, by_layer.SHARE)
    grid = Table(
        "Mean over layers by least frequency (rows) and most mean entropy (columns, "
        f"nats){by_layer.not_testable(int(np.sum(~used.testable)))}",
        (Column("frequency ≥"), *(Column(f"≤ {most:g}", by_layer.SHARE) for most in GRID_ENTROPIES)),
        tuple((least, *row) for least, row in zip(GRID_FREQUENCIES, _grid_mean(found).tolist(), strict=True)),
    )
    words = [
        "Share of all tokens of a layer at token ids that pass the frequency and the entropy threshold of a preset of "
        "VARConfig. Covered does not mean correct: this counts ids with low entropy, not agreement of their choices.",
        by_layer.WILSON if data.draws is None else by_layer.NARROW_ENDS,
        *data.entropy.caution,
        *used.words(data, "mean entropy", "they pass no threshold, but count as tokens of the layer"),
    ]
    shown = ReportFigure(
        "fast_path_coverage",
        "Fast-path coverage",
        "Coverage is the share of tokens whose id is frequent enough and routed with low enough entropy for a preset. "
        "Left: the coverage of each preset in each layer, with intervals. Right: the mean over layers for other "
        "thresholds; where neighboring cells differ a lot, the choice of the threshold decides the result.",
        "The frequency threshold is a count in this corpus: in twice as much text, every id is twice as frequent, and "
        "coverage rises although the routing is the same.",
        lambda: _draw(data.stats, found, presets),
    )
    tables = [by_layer.table("Per layer", columns, used, verdicts), grid]
    if not used.testable.any():
        return QUESTION.section(verdict, outcome, words, tables)
    headline = f"{np.nanmean(presets.value[:, _BALANCED]):.0%} covered"
    return QUESTION.section(verdict, outcome, words, tables, [shown], headline)


def _grid_mean(found: Coverage) -> np.ndarray:
    """Mean over the layers that were tested, float64 [F, H]; NaN if none was."""
    tested = found.grid[found.used.testable]
    return tested.mean(axis=0) if len(tested) else np.full(found.grid.shape[1:], np.nan)


def _draw(stats: RoutingStats, found: Coverage, presets: by_layer.Values) -> Figure:
    layers = np.arange(len(stats.count))
    figure, (bars, grid) = subplots(1, 2, figsize=(10.5, 3.8))
    for index, (name, preset) in enumerate(PRESETS.items()):
        value, low, high = (100 * one[:, index] for one in presets)
        bars.errorbar(
            layers + 0.15 * (index - 1),
            value,
            np.stack([value - low, high - value]),
            color=shade(index, len(PRESETS)),
            marker=MARKERS[index],
            markersize=4,
            linewidth=0,
            elinewidth=1,
            label=f"{name}: ≥ {preset['frequency_threshold']}, ≤ {preset['entropy_threshold']} nats",
        )
    bars.axhline(100 * MIN_COVERED, color="0.6", linewidth=0.8, linestyle="--")
    bars.set(xlabel="layer", ylabel="occurrences covered [%]", ylim=(-2, 102))
    bars.xaxis.get_major_locator().set_params(integer=True)
    bars.legend(fontsize="small")
    bars.set_title("dashed: the criterion, balanced preset", fontsize="medium")
    image = heat_map(grid, 100 * _grid_mean(found), ".0f", vmin=0, vmax=100)
    figure.colorbar(image, label="occurrences covered [%]")
    grid.set(xlabel="most mean gate entropy [nats]", ylabel="least occurrences of the token id")
    grid.set_xticks(range(len(GRID_ENTROPIES)), [f"{most:g}" for most in GRID_ENTROPIES])
    grid.set_yticks(range(len(GRID_FREQUENCIES)), [str(least) for least in GRID_FREQUENCIES])
    grid.set_title(f"mean over {found.used.testable.sum()} layers", fontsize="medium")
    figure.suptitle(f"Fast-path coverage — {by_layer.size(stats)}")
    figure.tight_layout()
    return figure


QUESTION = Question("coverage", "A fast path covers many occurrences", _examine, needs_routing)

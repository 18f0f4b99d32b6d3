"""The tests of routing statistics in words, tables and verdicts: results in, sections of a report out.

Letters: L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from analysis.hypotheses.consistency import Consistency
from analysis.hypotheses.criteria import (
    ENTROPIES,
    GRID_ENTROPIES,
    GRID_FREQUENCIES,
    LEVEL,
    LOW_ENTROPY,
    MAX_RHO,
    MIN_COVERED,
    MIN_LOW_SHARE,
    PERCENTILES,
    ZIPF_FREQUENCY,
    Correlation,
    Coverage,
    EntropyDistribution,
    Zipf,
)
from analysis.hypotheses.figure_notes import NOTES
from analysis.hypotheses.paired_runs import PairedMeasure
from analysis.report import Column, Section, Table
from varjax.config import PRESETS

Name = Callable[[int], str]  # the row of a key -> its name for people


@dataclass(frozen=True)
class EntropyKind:
    """What the gate entropy of some statistics is the entropy of."""

    experts: int  # probabilities it is over
    words: str  # the most that it can be
    caution: tuple[str, ...] = ()  # where it is not the entropy that the published criteria mean

    @property
    def most(self) -> float:
        """Nats; NaN where there is no choice."""
        return math.log(self.experts) if self.experts > 1 else math.nan


_NAMED = 5  # keys that are named where some were left out
_SHARE = ".1%"


def zipf_section(found: Zipf) -> Section:
    title = "Frequency follows Zipf's law"
    if found.untestable:
        return Section("zipf", title, "not testable", found.untestable)
    return Section(
        "zipf",
        title,
        "reported",
        f"slope {found.slope:.3f}, R² {found.r_squared:.3f}; "
        f"exponent {found.exponent:.3f} [{found.low:.3f}, {found.high:.3f}]; no published bound",
        (
            f"Least squares of ln frequency on ln rank, ranks 1 to {found.ranks:,} (all ids seen {ZIPF_FREQUENCY} "
            f"times or more; the last {found.least_frequency:,} times). One fit: layers have no part in frequency.",
            "Caution: ranks are sorted by what they explain, so R² is near 1 for many laws that are not Zipf's, "
            "and the usual standard error of the slope is far too small. The exponent is the fit on ln(rank - "
            "1/2), its interval exponent · (1 ± 1.96 √(2/ranks)) (Gabaix and Ibragimov 2011), as if ids were "
            "independent draws.",
        ),
        (
            Table(
                "",
                (
                    *(Column(name, ".4f") for name in ("slope", "R²", "exponent", "low", "high")),
                    *(Column(name, ",") for name in ("ranks", "least frequency")),
                ),
                (
                    (
                        *(found.slope, found.r_squared, found.exponent, found.low, found.high),
                        *(found.ranks, found.least_frequency),
                    ),
                ),
            ),
        ),
    )


def correlation_section(found: Correlation, kind: EntropyKind, name: Name) -> Section:
    rho = found.rho
    verdict, outcome = judged(found.passed, rho.untestable, f"rho < {MAX_RHO:g} and p < {LEVEL:g} (Holm)")
    columns = ("layer", ("rho", "+.3f"), ("low", "+.3f"), ("high", "+.3f"), ("p", ".1e"), ("p, Holm", ".1e"))
    rows = zip(rho.value, rho.low, rho.high, found.p, found.p_holm, rho.keys, lengths(rho.left_out), strict=True)
    return Section(
        "frequency_entropy",
        "Frequent token ids are routed more surely",
        verdict,
        outcome,
        (
            "Spearman's rho of a token id's frequency and its mean gate entropy. Interval of Bonett and Wright "
            "(2000) over ids; documents are not known in a statistics file. Published is the bound on rho alone; "
            "that p must be small as well keeps a layer with few ids from passing by chance.",
            *kind.caution,
            *reasons(rho.untestable),
            *left_out_words(rho.left_out, "mean entropy", name),
        ),
        (layer_table(columns, rows, found.passed, rho.testable),),
        (NOTES["frequency_entropy"],),
    )


def entropy_section(found: EntropyDistribution, kind: EntropyKind, name: Name) -> Section:
    most = kind.most
    low = found.low_ids
    criterion = f"more than {MIN_LOW_SHARE:.0%} of token ids below {LOW_ENTROPY} nats"
    verdict, outcome = judged(found.passed, low.untestable, criterion)
    by = found.low_occurrences
    columns: list[str | tuple[str, str]] = [
        "layer",
        ("ids < 0.5", _SHARE),
        ("low", _SHARE),
        ("high", _SHARE),
        ("occurrences < 0.5", _SHARE),
        ("occ. low", _SHARE),
        ("occ. high", _SHARE),
        ("mean", ".3f"),
        ("of the most", _SHARE),
    ]
    mean = found.mean
    rows = zip(
        *(low.value, low.low, low.high, by.value, by.low, by.high, mean, mean / most),
        *(low.keys, lengths(low.left_out)),
        strict=True,
    )
    tables = [layer_table(columns, rows, found.passed, low.testable)]
    for unit, percentiles, shares in (
        ("token ids", found.ids, found.shares_ids),
        ("occurrences", found.occurrences, found.shares_occurrences),
    ):
        heading = (
            Column("layer"),
            *(Column(f"{at} %", ".3f") for at in PERCENTILES),
            *(Column(f"{at} % of most", ".3f") for at in PERCENTILES),
            *(Column(f"< {threshold}", _SHARE) for threshold in ENTROPIES),
        )
        numbers = np.hstack([percentiles, percentiles / most, shares])
        body = tuple((layer, *row.tolist()) for layer, row in enumerate(numbers))
        tables.append(Table(f"Percentiles [nats, and of the most] and shares, over {unit}", heading, body))
    return Section(
        "entropy",
        "Many tokens are routed with low entropy",
        verdict,
        outcome,
        (
            "Of each token id its mean gate entropy. The criterion is judged on token ids, as published; the same "
            f"over occurrences stands beside it. The most entropy possible is {kind.words}. Wilson intervals; for "
            "occurrences with the effective number of ids.",
            *kind.caution,
            *reasons(low.untestable),
            *left_out_words(low.left_out, "mean entropy", name),
        ),
        tuple(tables),
        (NOTES["entropy_distribution"],),
    )


def consistency_section(found: Consistency, estimated: bool, name: Name) -> Section:
    """`estimated`: the null's shares of experts come from fillings, not from measured first choices."""
    testable = np.array([not reason for reason in found.untestable], bool)
    above = int(np.sum(found.value[testable, 0] > found.null_high[testable, 0]))
    verdict = "reported" if testable.any() else "not testable"
    outcome = (
        f"above its null over all ids in {above} of {len(testable)} layers{_not_testable(testable)}; no published bound"
    )
    columns = tuple(
        Column(one, form)
        for one, form in zip(
            ("layer", "group", "consistency", "low", "high", "null", "null low", "null high", "ids", "least", "most"),
            ("", "", *[".3f"] * 6, ",", ",", ","),
            strict=True,
        )
    )
    rows = tuple(
        (
            layer,
            group,
            *(
                float(getattr(found, one)[layer, g])
                for one in ("value", "low", "high", "null", "null_low", "null_high")
            ),
            int(found.keys[layer, g]),
            *found.frequencies[layer, g].tolist(),
        )
        for layer in np.flatnonzero(testable).tolist()
        for g, group in enumerate(found.groups)
    )
    words = [
        "Share of a token id's occurrences with its commonest first choice, in sample: it says how uniform "
        "routing was on the very text that it was measured on, and is no predictability. Means over token ids, "
        "and once over occurrences, with 95 % intervals over ids. Null: every occurrence draws its expert from "
        "the layer's own shares, 100 simulations per frequency; few occurrences are consistent by themselves, and "
        "the null shows how much. Least and most: occurrences of the rarest and the most frequent id of a group.",
    ]
    if estimated:
        words.append(
            "The file names only the commonest first choice of an id, so the layer's shares are estimated (the "
            "rest in equal parts) and the null is too low: read the distance from it as an upper bound."
        )
    return Section(
        "consistency",
        "Routing is consistent",
        verdict,
        outcome,
        (*words, *reasons(found.untestable), *left_out_words(found.left_out, "consistency", name)),
        (Table("", columns, rows),) if rows else (),
        (
            NOTES["routing_consistency"],
            NOTES["token_experts"],
        ),
    )


def coverage_section(found: Coverage, kind: EntropyKind, name: Name) -> Section:
    balanced, preset = found.presets["balanced"], PRESETS["balanced"]
    frequency, entropy = preset["frequency_threshold"], preset["entropy_threshold"]
    criterion = f"more than {MIN_COVERED:.0%} of occurrences at ids seen ≥ {frequency} times with ≤ {entropy:g} nats"
    verdict, outcome = judged(found.passed, balanced.untestable, criterion)
    columns: list[str | tuple[str, str]] = ["layer"]
    numbers = []
    for preset_name, values in found.presets.items():
        short = preset_name[:4]
        columns += [(preset_name, _SHARE), (f"{short}. low", _SHARE), (f"{short}. high", _SHARE)]
        numbers += [values.value, values.low, values.high]
    columns.append(("unknown", _SHARE))
    rows = zip(*numbers, found.unknown, balanced.keys, lengths(balanced.left_out), strict=True)
    mean = _mean(found.grid)
    grid = Table(
        "Mean over layers by least frequency (rows) and most mean entropy (columns, "
        f"nats){_not_testable(balanced.testable)}",
        (Column("frequency ≥"), *(Column(f"≤ {most:g}", _SHARE) for most in GRID_ENTROPIES)),
        tuple((least, *row.tolist()) for least, row in zip(GRID_FREQUENCIES, mean, strict=True)),
    )
    return Section(
        "coverage",
        "A fast path covers many occurrences",
        verdict,
        outcome,
        (
            "Share of a layer's occurrences at token ids that pass the frequency and the entropy threshold, for "
            "the presets of VARConfig. The whole is every token that the layer routed. Wilson intervals with the "
            "effective number of ids.",
            "Covered is not correct: this counts sure ids, not agreement of their choices.",
            *kind.caution,
            *reasons(balanced.untestable),
            *left_out_words(balanced.left_out, "mean entropy", name, "they pass no threshold, and stay in the whole"),
        ),
        (layer_table(columns, rows, found.passed, balanced.testable), grid),
        (NOTES["fast_path_coverage"],),
    )


def paired_section(found: Sequence[PairedMeasure] | None, other: str, name: Name) -> Section:
    """`other`: what the second run is called."""
    title = "Two runs route the same token ids alike"
    if found is None:
        return Section("paired", title, "not measured", "needs a second run: --compare OTHER.parquet")
    testable = np.array([measure.difference.testable for measure in found])
    differing = [int(np.sum(one.t_p < LEVEL)) for one in found]
    shares = ", ".join(f"{one.name} {n} of {len(one.first)}" for one, n in zip(found, differing, strict=True))
    tables, words = [], []
    forms = (".4f", ".4f", "+.4f", "+.4f", "+.4f", "+.2f", "+.2f", ".1e", ".1e")
    names = ("first", "second", "difference", "low", "high", "d", "rank r", "p, t-test", "p, Wilcoxon")
    for one in found:
        d = one.difference
        rows = zip(
            *(one.first, one.second, d.value, d.low, d.high, one.effect, one.rank_effect, one.t_p, one.wilcoxon_p),
            *(d.keys, lengths(d.left_out)),
            strict=True,
        )
        columns: list[str | tuple[str, str]] = ["layer", *zip(names, forms, strict=True)]
        tables.append(layer_table(columns, rows, title=f"{one.name}{f' [{one.unit}]' if one.unit else ''}"))
        words += [f"{one.name}: {why}" for why in reasons(d.untestable)]
        words += left_out_words(d.left_out, one.name, name)
    return Section(
        "paired",
        title,
        "reported" if testable.any() else "not testable",
        f"layers that differ (t-test, Holm, p < {LEVEL:g}): {shares}; no published bound",
        (
            f"Second run: {other}. Pairs are the token ids that both saw in a layer; differences are second minus "
            "first, with Student's 95 % interval. d: mean difference over its standard deviation; rank r: "
            "rank-biserial, -1 to 1. Paired t-test and Wilcoxon's signed-rank test, each corrected by Holm over "
            "all layers and the three figures.",
            *words,
        ),
        tuple(tables),
    )


def judged(passed: np.ndarray, untestable: Sequence[str], criterion: str) -> tuple[str, str]:
    """Verdict and outcome over layers, bool [L]: PASS only if every layer that can be tested passes."""
    testable = np.array([not reason for reason in untestable], bool)
    outcome = f"{criterion}: {int(np.sum(passed & testable))} of {len(testable)} layers{_not_testable(testable)}"
    if not testable.any():
        return "not testable", outcome
    return ("PASS" if np.all(passed[testable]) else "FAIL"), outcome


def layer_table(
    columns: Sequence[str | tuple[str, str]],
    rows: zip,
    passed: np.ndarray | None = None,
    testable: np.ndarray | None = None,
    title: str = "Per layer",
) -> Table:
    """One row per layer: its number, the figures, then ids used and left out, and the verdict if there is one."""
    heading = [Column(one) if isinstance(one, str) else Column(*one) for one in columns]
    heading += [Column("ids", ","), Column("left out", ",")]
    if passed is not None:
        heading.append(Column("verdict"))
    body = []
    for layer, row in enumerate(rows):
        cells = [value.item() if isinstance(value, np.generic) else value for value in row]
        if passed is not None and testable is not None:
            cells.append(("PASS" if passed[layer] else "FAIL") if testable[layer] else "not testable")
        body.append((layer, *cells))
    return Table(title, tuple(heading), tuple(body))


def lengths(rows: Sequence[np.ndarray]) -> list[int]:
    return [len(one) for one in rows]


def reasons(untestable: Sequence[str]) -> list[str]:
    """Why layers cannot be tested: a line per reason."""
    different = dict.fromkeys(reason for reason in untestable if reason)
    said = []
    for reason in different:
        layers = [str(layer) for layer, one in enumerate(untestable) if one == reason]
        where = f"layer{'s' * (len(layers) > 1)} {', '.join(layers)}"
        if len(layers) == len(untestable) > 1:
            where = "every layer"
        said.append(f"Not testable, {where}: {reason}.")
    return said


def left_out_words(
    left_out: Sequence[np.ndarray], figure: str, name: Name, what: str = "left out of this test alone"
) -> list[str]:
    """How many rows have NaN, and the names of the first few."""
    number = sum(map(len, left_out))
    if not number:
        return []
    keys = list(dict.fromkeys(int(row) for rows in left_out for row in rows))
    layers = sum(len(rows) > 0 for rows in left_out)
    named = ", ".join(name(key) for key in keys[:_NAMED]) + (", …" if len(keys) > _NAMED else "")
    return [f"{number:,} rows without a known {figure} in {layers} of {len(left_out)} layers, {what}: {named}."]


def _not_testable(testable: np.ndarray) -> str:
    missing = int(np.sum(~testable))
    return f" ({missing} not testable)" if missing else ""


def _mean(grid: np.ndarray) -> np.ndarray:
    """float64 [F, H]: the mean over the layers of [L, F, H] that were tested; NaN if none was."""
    tested = grid[~np.isnan(grid).all(axis=(1, 2))]
    return tested.mean(axis=0) if len(tested) else np.full(grid.shape[1:], np.nan)

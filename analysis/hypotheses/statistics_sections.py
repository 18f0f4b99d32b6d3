"""The tests of routing statistics in words, tables and verdicts: results in, sections of a report out.

Letters: L layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from analysis.hypotheses.consistency import Consistency
from analysis.hypotheses.criteria import (
    ENTROPIES,
    GRID_ENTROPIES,
    GRID_FREQUENCIES,
    LOW_ENTROPY,
    MAX_RHO,
    MIN_COVERED,
    MIN_KEYS,
    MIN_LOW_SHARE,
    PERCENTILES,
    ZIPF_FREQUENCY,
    Correlation,
    Coverage,
    EntropyDistribution,
    Zipf,
)
from analysis.hypotheses.entropy_kind import EntropyKind
from analysis.hypotheses.figure_notes import NOTES
from analysis.hypotheses.section_parts import (
    Name,
    interval_words,
    judged,
    layer_table,
    layer_verdicts,
    left_out_words,
    lengths,
    not_testable,
    reasons,
)
from analysis.hypotheses.statistics_findings import Drawn, StatisticsFindings
from analysis.report.report import Column, Section, Table
from varjax.config import PRESETS

_SHARE = ".1%"
_AT_THE_END = "A share at or near 0 or 100 % hardly moves in any draw: its interval is too narrow, often a point."


def statistics_sections(
    found: StatisticsFindings, kind: EntropyKind, estimated: bool, name: Name
) -> tuple[Section, ...]:
    """One section per test.

    Args:
        estimated: the file names only the commonest first choice of each key.
    """
    drawn = found.drawn
    admitted: tuple[str, ...] = ()
    if not np.isnan(found.covered):
        admitted = (f"Token ids are those that are keys; they cover {found.covered:.1%} of all occurrences.",)
    return (
        _zipf(found.zipf, drawn),
        _correlation(found.correlation, drawn, kind, name, admitted),
        _entropy(found.distribution, drawn, kind, name, admitted),
        _consistency(found.consistency, drawn, estimated, name, admitted),
        _coverage(found.coverage, drawn, kind, name),
    )


def _zipf(found: Zipf, drawn: Drawn | None) -> Section:
    title = "Frequency follows Zipf's law"
    published = Table(
        "As in the published report: the fit over all ids, and the share of occurrences at the most frequent ids",
        (
            *(Column("ids", ","), Column("slope", ".4f"), Column("R²", ".4f")),
            *(Column(f"share at the {most:,} most frequent", _SHARE) for most in found.top_shares),
        ),
        ((found.all_ranks, found.all_slope, found.all_r_squared, *found.top_shares.values()),),
    )
    as_published = (
        "The published report fits all ids; ids seen a few times tie in long steps, which weigh most in that fit. Ids "
        "are those that are keys. A share is unknown where fewer ids than it asks for are keys.",
    )
    if found.untestable:
        return Section("zipf", title, "not testable", found.untestable, as_published, (published,))
    return Section(
        "zipf",
        title,
        "reported",
        f"slope {found.slope:.3f}, R² {found.r_squared:.3f} (over all ids {found.all_slope:.3f}, "
        f"{found.all_r_squared:.3f}); "
        f"exponent {found.exponent:.3f} [{found.low:.3f}, {found.high:.3f}]; no published bound",
        (
            f"Least squares of ln frequency on ln rank, ranks 1 to {found.ranks:,} (all ids seen {ZIPF_FREQUENCY} "
            f"times or more; the last {found.least_frequency:,} times). One fit: layers have no part in frequency.",
            "Caution: ranks are sorted by what they explain, so R² is near 1 for many laws that are not Zipf's, "
            "and the usual standard error of the slope is far too small. The exponent is the fit on ln(rank - "
            "1/2) (Gabaix and Ibragimov 2011).",
            interval_words(drawn, "Interval: exponent · (1 ± 1.96 √(2/ranks))"),
            *as_published,
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
            published,
        ),
    )


def _correlation(
    found: Correlation, drawn: Drawn | None, kind: EntropyKind, name: Name, admitted: Sequence[str]
) -> Section:
    rho = found.rho
    by_layer = layer_verdicts(found.passed, rho.untestable, kind.no_verdict)
    verdict, outcome = judged(by_layer, f"rho < {MAX_RHO:g}", kind.no_verdict)
    columns = ("layer", ("rho", "+.3f"), ("low", "+.3f"), ("high", "+.3f"), ("p", ".1e"), ("p, Holm", ".1e"))
    rows = zip(rho.value, rho.low, rho.high, found.p, found.p_holm, rho.keys, lengths(rho.left_out), strict=True)
    return Section(
        "frequency_entropy",
        "Frequent token ids are routed more surely",
        verdict,
        outcome,
        (
            "Spearman's rho of a token id's frequency and its mean gate entropy. Judged is rho alone, as published. "
            "p (of rho = 0) and the interval stand beside it: with few ids a rho below the bound can be chance. p "
            "treats token ids as independent.",
            *admitted,
            interval_words(drawn, "Intervals of Bonett and Wright (2000)"),
            *kind.caution,
            *reasons(rho.untestable),
            *left_out_words(rho.left_out, "mean entropy", name),
        ),
        (layer_table(columns, rows, by_layer),),
        (NOTES["frequency_entropy"],),
    )


def _entropy(
    found: EntropyDistribution, drawn: Drawn | None, kind: EntropyKind, name: Name, admitted: Sequence[str]
) -> Section:
    most = kind.most
    low, by = found.under_ids[LOW_ENTROPY], found.under_occurrences[LOW_ENTROPY]
    criterion = f"more than {MIN_LOW_SHARE:.0%} of token ids below {LOW_ENTROPY} nats"
    by_layer = layer_verdicts(found.passed, low.untestable, kind.no_verdict, kind.is_lower_bound)
    verdict, outcome = judged(by_layer, criterion, kind.no_verdict)
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
    rows = zip(
        *(low.value, low.low, low.high, by.value, by.low, by.high, found.mean, found.mean / most),
        *(low.keys, lengths(low.left_out)),
        strict=True,
    )
    tables = [layer_table(columns, rows, by_layer)]
    for unit, percentiles, shares in (
        ("token ids", found.ids, found.under_ids),
        ("occurrences", found.occurrences, found.under_occurrences),
    ):
        heading = [Column("layer")]
        heading += [Column(f"{at} %", ".3f") for at in PERCENTILES]
        heading += [Column(f"{at} % of most", ".3f") for at in PERCENTILES]
        numbers = [*percentiles.T, *(percentiles / most).T]
        for threshold in ENTROPIES:
            heading += [Column(f"< {threshold}{part}", _SHARE) for part in ("", " low", " high")]
            numbers += [shares[threshold].value, shares[threshold].low, shares[threshold].high]
        body = tuple((layer, *row) for layer, row in enumerate(np.stack(numbers, axis=-1).tolist()))
        tables.append(Table(f"Percentiles [nats, and of the most] and shares, over {unit}", tuple(heading), body))
    return Section(
        "entropy",
        "Many tokens are routed with low entropy",
        verdict,
        outcome,
        (
            "Of each token id its mean gate entropy. The criterion is judged on token ids, as published; the same "
            f"over occurrences stands beside it. The most entropy possible is {kind.words}.",
            *admitted,
            interval_words(drawn, "Wilson intervals, for occurrences with the effective number of ids"),
            *_if_by_ids(drawn),
            *_if_drawn(
                drawn,
                _AT_THE_END,
                "For shares of ids they are somewhat too narrow where documents are few: in simulations with 60 "
                "documents they held the true share in 82 to 92 % of the cases, with 300 in 88 to 96 %.",
            ),
            *kind.caution,
            *reasons(low.untestable),
            *left_out_words(low.left_out, "mean entropy", name),
        ),
        tuple(tables),
        (NOTES["entropy_distribution"],),
    )


def _consistency(
    found: Consistency, drawn: Drawn | None, estimated: bool, name: Name, admitted: Sequence[str]
) -> Section:
    testable = np.array([not reason for reason in found.untestable], bool)
    above = int(np.sum(found.value[testable, 0] > found.null_high[testable, 0]))
    verdict = "reported" if testable.any() else "not testable"
    outcome = (
        f"above its null over all ids in {above} of {len(testable)} layers{not_testable(testable)}; no published bound"
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
        "and once over occurrences. Null: every occurrence draws its expert from "
        "the layer's own shares, simulated; few occurrences are consistent by themselves, and the null shows how "
        "much. Its band holds the simulation's own error. Least and most: occurrences of the rarest and the most "
        f"frequent id of a group. Groups of fewer than {MIN_KEYS} ids have no interval and no band.",
        "Caution: the null knows no documents. Routing that follows the document alone lies above it too, since an id "
        "keeps to few documents; so above the null does not say that the id matters. Predictability, held out "
        "against shuffling within documents, does.",
        *admitted,
        interval_words(drawn, "Intervals of ±1.96 standard errors"),
        *_if_drawn(
            drawn,
            "They hold for texts of as many documents, not for an endless text, whose consistency is lower since less "
            "of it is chance. In simulations they held in 93 to 99 % of the cases; in 86 to 100 % for deciles, least "
            "where nearly all ids are seen once.",
        ),
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


def _coverage(found: Coverage, drawn: Drawn | None, kind: EntropyKind, name: Name) -> Section:
    balanced, preset = found.presets["balanced"], PRESETS["balanced"]
    frequency, entropy = preset["frequency_threshold"], preset["entropy_threshold"]
    criterion = f"more than {MIN_COVERED:.0%} of occurrences at ids seen ≥ {frequency} times with ≤ {entropy:g} nats"
    by_layer = layer_verdicts(found.passed, balanced.untestable, kind.no_verdict, kind.is_lower_bound)
    verdict, outcome = judged(by_layer, criterion, kind.no_verdict)
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
        f"nats){not_testable(balanced.testable)}",
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
            "the presets of VARConfig. The whole is every token that the layer routed.",
            interval_words(drawn, "Wilson intervals with the effective number of ids"),
            *_if_by_ids(drawn),
            *_if_drawn(drawn, _AT_THE_END),
            "Covered is not correct: this counts sure ids, not agreement of their choices.",
            *kind.caution,
            *reasons(balanced.untestable),
            *left_out_words(balanced.left_out, "mean entropy", name, "they pass no threshold, and stay in the whole"),
        ),
        (layer_table(columns, rows, by_layer), grid),
        (NOTES["fast_path_coverage"],),
    )


def _mean(grid: np.ndarray) -> np.ndarray:
    """float64 [F, H]: the mean over the layers of [L, F, H] that were tested; NaN if none was."""
    tested = grid[~np.isnan(grid).all(axis=(1, 2))]
    return tested.mean(axis=0) if len(tested) else np.full(grid.shape[1:], np.nan)


def _if_by_ids(drawn: Drawn | None) -> tuple[str, ...]:
    """What Wilson intervals of shares of occurrences hide."""
    heavy = (
        "Intervals of shares of occurrences are too narrow where a few ids have most of them, as in all text: the "
        "effective number takes their frequencies as given."
    )
    return (heavy,) if drawn is None else ()


def _if_drawn(drawn: Drawn | None, *words: str) -> tuple[str, ...]:
    """Words about intervals over documents, where these are shown."""
    return words if drawn is not None and drawn.documents > 1 else ()

"""The comparison of two runs in words and tables: measures in, a section of a report out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from analysis.hypotheses.criteria import ALPHA
from analysis.hypotheses.paired_runs import PairedMeasure
from analysis.hypotheses.section_parts import Name, layer_table, left_out_words, lengths, reasons
from analysis.report.report import Section, Table


def paired_section(found: Sequence[PairedMeasure] | None, other: str, name: Name) -> Section:
    """`other`: what the second run is called."""
    title = "Two runs route the same token ids alike"
    if found is None:
        return Section("paired", title, "not measured", "needs a second run: --compare OTHER.parquet")
    testable = np.array([measure.difference.testable for measure in found])
    differing = [int(np.sum(one.t_p < ALPHA)) for one in found]
    shares = ", ".join(f"{one.name} {n} of {len(one.first)}" for one, n in zip(found, differing, strict=True))
    tables: list[Table] = []
    words: list[str] = []
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
        f"layers that differ (t-test, Holm, p < {ALPHA:g}): {shares}; no published bound",
        (
            f"Second run: {other}. Pairs are the token ids that both saw in a layer; differences are second minus "
            "first, with Student's 95 % interval (token ids as if independent). d: mean difference over its standard "
            "deviation; rank r: rank-biserial, -1 to 1. Paired t-test and Wilcoxon's signed-rank test, each corrected "
            "by Holm over all layers and both figures. Consistency is not compared: in sample it falls as occurrences "
            "grow in number, whatever the router does.",
            *words,
        ),
        tuple(tables),
    )

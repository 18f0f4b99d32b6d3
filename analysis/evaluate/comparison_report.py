"""What a comparison of two evaluations says: the sides beside each other, and the published criteria."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from analysis.criteria import Criterion
from analysis.evaluate.comparison import Result, criteria, degradation
from analysis.report.figures import subplots
from analysis.report.report import Column, Report, ReportFigure, Section, Table, shown
from analysis.resampling import MIN_DOCUMENTS, Estimate
from analysis.text import card

NAME = "comparison_documents"
NOTE = ReportFigure(
    NAME,
    "Change of loss, document by document",
    "Every document's change of loss, in nats per token, from the one that gained most to the one that lost most. The "
    "line is the change over all tokens. Flat but for the right end: few documents carry the loss.",
    "Short documents are at both ends because few tokens make a noisy mean, not because they are treated worse.",
)


def report(base: Result, other: Result) -> tuple[Report, dict[str, Any]]:
    """The comparison for people, and as fields for the file.

    Raises:
        ResultError: the two cannot be compared (`analysis.evaluate.comparison.degradation`).
    """
    change = degradation(base, other)
    against_plain = base.fields["mode"] == "baseline"
    judged = criteria(change, other) if against_plain else []
    timed = other.fields.get("throughput", {}) if against_plain else {}
    documents, tokens = len(base.documents), int(base.documents["tokens"].sum())
    said = Report(
        "Two evaluations side by side",
        (
            ("base", f"{base.path} ({base.fields['mode']})"),
            ("compared", f"{other.path} ({other.fields['mode']})"),
            ("documents", f"{documents:,}, {tokens:,} tokens, read by both"),
            *card.facts(base.fields.get("provenance", {}).get("card")),
        ),
        (
            "Intervals are 95 %, by bootstrap over documents"
            + (f"; {documents} documents are too few for one to be trusted." if documents < MIN_DOCUMENTS else "."),
            "Criteria are judged by the estimate, as published: where an interval reaches over the bound, the verdict "
            "may be chance.",
            "Tokens/s and speed-ups are both of the compared run, which timed the plain model and VAR in turns. The "
            "change is the median over rounds of the ratio inside a round, with an interval over rounds."
            if against_plain
            else "Speeds and criteria are left out: both are against the plain model, and the base is not the plain "
            "model.",
        ),
        (_side_by_side(base, other, change, timed), *map(_judged, judged)),
    )
    saved = {
        "base": str(base.path),
        "other": str(other.path),
        "degradation": dataclasses.asdict(change),
        "criteria": [dataclasses.asdict(row) for row in judged],
        "documents": documents,
        "tokens": tokens,
    }
    return said, saved


def figure(base: Result, other: Result) -> Figure:
    """The change of every document that both evaluations read."""
    pair = base.documents.merge(other.documents, on="id", suffixes=("", "_other"))
    pair = pair[pair["tokens"] > 0]
    gained = pair["nll_other"] - pair["nll"]
    change = np.sort((gained / pair["tokens"]).to_numpy())
    drawn, axis = subplots(figsize=(5.2, 3.6))
    axis.plot(np.arange(1, len(change) + 1) / len(change), change, ".", color="0.4", markersize=3)
    axis.axhline(gained.sum() / pair["tokens"].sum(), color="0", linewidth=0.9)
    axis.axhline(0, color="0.8", linewidth=0.8)
    axis.set(xlabel="share of the documents", ylabel="change of loss [nats per token]")
    return drawn


def _side_by_side(base: Result, other: Result, change: Estimate, timed: Mapping[str, Any]) -> Section:
    """`timed`: the throughput to show."""
    sides = (base.fields, other.fields)
    experts = tuple(fields.get("experts_per_token") for fields in sides)
    change_of = (f"{end:+.2%}" for end in dataclasses.astuple(change))
    rows: list[tuple[str, ...]] = [
        ("perplexity per token", *(f"{fields['perplexity']:.3f}" for fields in sides), *change_of),
        ("experts per token and layer", *(shown(value, ".2f") for value in experts), "", "", ""),
    ]
    for phase, ratio in timed.get("speedup", {}).items():
        # Both rates are of the compared run: the base's own were measured at another time and do not belong to a ratio.
        rates = (timed.get(phase, {}).get("plain_tokens_per_second"), timed.get(f"{phase}_tokens_per_second"))
        rates = rates if None not in rates else (None, None)
        ends = (f"{ratio[end]:.2f}x" for end in ("value", "low", "high"))
        rows.append((f"{phase}, tokens/s", *(shown(rate, ",.0f") for rate in rates), *ends))
    for tier in other.fields.get("tiers", {}):
        of = (fields.get("tiers", {}).get(tier) for fields in sides)
        rows.append((f"{tier} tier", *(shown(share, ".1%") for share in of), "", "", ""))
    return Section(
        "side_by_side",
        "Side by side",
        "reported",
        f"perplexity {change.value:+.2%} [{change.low:+.2%}, {change.high:+.2%}]"
        + (f" at {experts[1]:.2f} of {experts[0]:.2f} experts" if None not in experts else ""),
        tables=(Table("", tuple(map(Column, ("", "base", "compared", "change", "low", "high"))), tuple(rows)),),
        figures=(NOTE,),
    )


def _judged(row: Criterion) -> Section:
    name = row.name.replace(",", "").replace(" ", "_")
    return Section(name, row.name.capitalize(), row.verdict, f"{row.bound}: {row.measured}")

"""Two evaluations of the same documents, compared with intervals and judged by the published criteria.

The documents are paired, so that differences between texts cancel. Intervals are percentile bootstraps over documents:
tokens of one document depend on each other, documents do not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis.criteria import EVALUATION_SPEEDUP, MAX_DEGRADATION, MAX_LEARNED, Criterion
from analysis.evaluate.losses import Losses, LossesError, paired
from analysis.report.figures import subplots
from analysis.report.report import Column, Report, ReportFigure, Section, Table, shown
from analysis.resampling import MIN_DOCUMENTS, Estimate, ratio_estimate
from analysis.text import card
from varjax import checksums


class ResultError(LossesError):
    """A result file that cannot be used; names file, field and fix."""


@dataclasses.dataclass(frozen=True)
class Result:
    """One evaluation as `02_evaluate_var.py` wrote it."""

    path: Path
    fields: dict[str, Any]
    losses: Losses  # by document


def read_result(path: Path) -> Result:
    """Read an evaluation and its documents.

    Args:
        path: the JSON file that `02_evaluate_var.py` wrote.

    Returns:
        The evaluation.

    Raises:
        ResultError: the file or its table of documents is missing, damaged or something else.
    """
    try:
        fields = checksums.read_json(path, "give a result of 02_evaluate_var.py", error=ResultError)
    except FileNotFoundError:
        raise ResultError(f"{path} does not exist; run 02_evaluate_var.py first, or correct the path") from None
    needed = ("perplexity", "mode", "documents_file", "documents_sha256")
    if missing := [name for name in needed if name not in fields]:
        raise ResultError(f"{path} has no field {missing[0]!r}; give a result of 02_evaluate_var.py")
    table = path.parent / fields["documents_file"]
    if not table.exists():
        raise ResultError(f"{table} is missing; it holds the documents of {path}: keep the two files together")
    if checksums.digest_of_file(table) != fields["documents_sha256"]:
        raise ResultError(f"{table} is damaged, or belongs to another evaluation than {path}; evaluate again")
    kept = pd.read_parquet(table)
    columns = kept["nll"].to_numpy(), kept["tokens"].to_numpy()
    return Result(path, fields, Losses(list(kept["id"]), list(kept["group"]), *columns))


def check_pair(base: Result, other: Result) -> None:
    """Check that two evaluations are of one model, read in one way; otherwise their losses differ for that alone.

    Args:
        base: one evaluation.
        other: another one.

    Raises:
        ResultError: a setting differs.
    """

    def settings(result: Result) -> dict[str, Any]:
        model = result.fields.get("provenance", {}).get("model", {})
        windows = {name: result.fields.get(name) for name in ("max_length", "stride", "prefix_id", "full_last")}
        return {"model fingerprint": model.get("fingerprint"), "model dtype": model.get("dtype"), **windows}

    ours, theirs = settings(base), settings(other)
    for name, value in theirs.items():
        if value != ours[name]:
            raise ResultError(
                f"{other.path} has another {name} ({value}) than {base.path} ({ours[name]}); evaluate both alike"
            )


def degradation(base: Result, other: Result, samples: int = 2000, seed: int = 0) -> Estimate:
    """Estimate the relative change in perplexity per token from one evaluation to another.

    Args:
        base: the evaluation that the other is compared with.
        other: of the same documents.
        samples: bootstrap draws.
        seed: of the draws.

    Returns:
        The change with its 95% interval.

    Raises:
        LossesError: as `check_pair` and `analysis.evaluate.losses.paired`.
    """
    pair = _paired(base, other)
    return ratio_estimate(pair["added"].to_numpy(), pair["tokens"].to_numpy(), samples, seed, np.expm1)


def report(base: Result, other: Result) -> tuple[Report, dict[str, Any]]:
    """Report the comparison.

    Args:
        base: the evaluation that the other is compared with; criteria apply where it is the plain model's.
        other: of the same documents.

    Returns:
        The report, and what else the JSON file holds.

    Raises:
        LossesError: as `degradation`.
    """
    change = degradation(base, other)
    against_plain = base.fields["mode"] == "baseline"
    judged = _criteria(change, other) if against_plain else []
    timed = other.fields.get("throughput", {}) if against_plain else {}
    documents, tokens = len(base.losses.ids), int(base.losses.tokens.sum())
    said = Report(
        "Comparison of two evaluations",
        (
            ("base", f"{base.path} ({base.fields['mode']})"),
            ("compared", f"{other.path} ({other.fields['mode']})"),
            ("documents", f"{documents:,}, {tokens:,} tokens, read by both"),
            *card.facts(base.fields.get("provenance", {}).get("card")),
        ),
        (
            "Intervals are 95%, by bootstrap over documents"
            + (
                f"; {documents} documents are too few for an interval to be trusted."
                if documents < MIN_DOCUMENTS
                else "."
            )
            + " Criteria are judged by the estimate, as published: where an interval contains the bound, the verdict "
            "may be chance.",
            "Tokens/s and speed-ups are both from the compared run, which timed the plain model and VAR in turns; a "
            "speed-up is the median over rounds of the ratio within a round."
            if against_plain
            else "The base is not the plain model, so there are no criteria and no speeds.",
        ),
        (_side_by_side(base, other, change, timed), *map(_judged, judged)),
    )
    saved = {"base": str(base.path), "other": str(other.path), "documents": documents, "tokens": tokens}
    saved |= {"degradation": dataclasses.asdict(change), "criteria": [dataclasses.asdict(row) for row in judged]}
    return said, saved


def _paired(base: Result, other: Result) -> pd.DataFrame:
    check_pair(base, other)
    return paired(base.losses, other.losses, (str(base.path), str(other.path)))


def _criteria(change: Estimate, result: Result) -> list[Criterion]:
    """The published criteria of phase 2."""

    def judged(name: str, bound: str, value: float | None, form: str, passed: bool, unit: str = "") -> Criterion:
        known = value is not None
        return Criterion(name, bound, shown(value, form) + unit * known, passed if known else None, value)

    loss, learned = change.value, result.fields.get("tiers", {}).get("learned")
    rows = [judged("perplexity degradation", f"< {MAX_DEGRADATION:.0%}", loss, "+.2%", loss < MAX_DEGRADATION)]
    for phase in ("prefill", "decode"):
        value = result.fields.get("throughput", {}).get("speedup", {}).get(phase, {}).get("value")
        passed = (value or 0) >= EVALUATION_SPEEDUP
        rows.append(judged(f"speed-up, {phase}", f">= {EVALUATION_SPEEDUP}x", value, ".2f", passed, "x"))
    rows.append(judged("learned tier", f"< {MAX_LEARNED:.0%}", learned, ".2%", (learned or 0) < MAX_LEARNED))
    return rows


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
        # Both rates come from the compared run: the base's own were measured at another time.
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
        figures=(
            ReportFigure(
                "comparison_documents",
                "Change of loss by document",
                "The change in loss of every document, in nats per token, in sorted order. The line is the change over "
                "all tokens. If the curve is flat except at the right end, a few documents account for most of the "
                "loss.",
                "Short documents are at both ends because a mean over few tokens is noisy, not because they are "
                "treated worse.",
                partial(_draw, base, other),
            ),
        ),
    )


def _judged(row: Criterion) -> Section:
    name = row.name.replace(",", "").replace(" ", "_")
    headline = "" if row.passed is None else row.measured
    return Section(name, row.name.capitalize(), row.verdict, f"{row.bound}: {row.measured}", headline=headline)


def _draw(base: Result, other: Result) -> Figure:
    pair = _paired(base, other)
    pair = pair[pair["tokens"] > 0]
    change = np.sort((pair["added"] / pair["tokens"]).to_numpy())
    drawn, axis = subplots(figsize=(5.2, 3.6))
    axis.plot(np.arange(1, len(change) + 1) / len(change), change, ".", color="0.4", markersize=3)
    axis.axhline(pair["added"].sum() / pair["tokens"].sum(), color="0", linewidth=0.9)
    axis.axhline(0, color="0.8", linewidth=0.8)
    axis.set(xlabel="share of the documents", ylabel="change in loss [nats per token]")
    return drawn

"""The report of one evaluation of phase 2: quality, which tiers decided, how many experts ran, and speed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.criteria import MAX_DEGRADATION
from analysis.evaluate.certificate import HELD_OUT
from analysis.evaluate.losses import Scores
from analysis.evaluate.policy_search import Search
from analysis.report.figures import panels, quality_against_experts, stacked_tiers
from analysis.report.report import Column, Report, ReportFigure, Section, Table
from varjax.step import TIERS

_GROUPS = 40  # rows of the table of groups, the largest first


def report(
    result: Mapping[str, Any],
    scores: Scores,
    facts: Sequence[tuple[str, str]] = (),
    *,
    found: Search | None = None,
    limit: float = MAX_DEGRADATION,
    tuned: int = 0,
) -> Report:
    """Report what the result file of an evaluation says.

    Args:
        result: the fields of the result file.
        scores: the losses by document.
        facts: what else is known about model, data and policy.
        found: the search that found the policy; None: there was none.
        limit: the relative change in perplexity that is allowed.
        tuned: documents of the search, at most.

    Returns:
        The report with its figures.
    """
    sections = [_quality(result, scores)]
    if "tiers" in result:
        sections.append(_routing(result))
    if "nearness" in result:
        sections.append(_nearness(result["nearness"]))
    if "throughput" in result:
        sections.append(_throughput(result["throughput"]))
    if found is not None:
        sections.append(_search(found, limit, f"Tuning documents ({tuned:,} at most)"))
    title = "Evaluation of the plain model" if result["mode"] == "baseline" else "Evaluation of adaptive routing"
    facts = (*facts, ("documents", f"{result['documents']:,}, {result['tokens']:,} tokens"))
    return Report(title, facts, flattered(result), tuple(sections))


def flattered(result: Mapping[str, Any]) -> tuple[str, ...]:
    """Warn where an evaluation of VAR read documents that may have made its table or chosen its policy.

    Args:
        result: the fields of the result file.

    Returns:
        One warning, or none.
    """
    split = result.get("provenance", {}).get("data", {}).get("split", HELD_OUT[0])
    if result["mode"] == "baseline" or split in HELD_OUT:
        return ()
    return (
        f"These documents flatter VAR if its tables or its policy were made from this dataset: {split or 'all splits'} "
        f"made or chose them. Evaluate on {' or '.join(HELD_OUT)} for unbiased results.",
    )


def frontier(search: Search, limit: float, caption: str) -> Figure:
    """Draw what the search measured: change in perplexity over experts per token.

    Args:
        search: the measurements.
        limit: the relative change in perplexity that is allowed.
        caption: which documents were scored.

    Returns:
        The figure.
    """
    measured = {"tried": search.path, "chosen": (search.chosen,)}
    series = {
        name: [(point.experts_per_token, point.degradation) for point in points] for name, points in measured.items()
    }
    return quality_against_experts(series, limit, caption)


def _quality(result: Mapping[str, Any], scores: Scores) -> Section:
    table = pd.DataFrame({"group": scores.groups, "nll": scores.nll, "tokens": scores.tokens, "documents": 1})
    groups = table.groupby("group", sort=False).sum().sort_values("tokens", ascending=False)
    rows = [
        (str(group), int(row.documents), int(row.tokens), math.exp(row.nll / row.tokens))
        for group, row in groups[groups["tokens"] > 0].head(_GROUPS).iterrows()
    ]
    columns = (Column("group"), Column("documents", ","), Column("tokens", ","), Column("perplexity", ".3f"))
    shown = f"The {len(rows)} largest of {len(groups)} groups" if len(groups) > len(rows) else "Groups of documents"
    return Section(
        "quality",
        "Quality",
        "reported",
        f"perplexity {result['perplexity']:.3f} per token, {result['bits_per_byte']:.4f} bits per byte",
        ("Teacher-forced: the text is given, and every next token of it is scored.",),
        (Table(shown, columns, tuple(rows)),) if len(groups) > 1 else (),
        headline=f"perplexity {result['perplexity']:.3f}",
    )


def _routing(result: Mapping[str, Any]) -> Section:
    columns = (
        *(Column("layer"), *(Column(tier, ".1%") for tier in TIERS)),
        *(Column("mispredictions", ".1%"), Column("experts", ".3f")),
    )
    rows = [
        (index, *(layer["tiers"][tier] for tier in TIERS), layer["mispredictions"], layer["experts_per_token"])
        for index, layer in enumerate(result["layers"])
    ]
    shares = ", ".join(f"{tier} {share:.1%}" for tier, share in result["tiers"].items())
    return Section(
        "routing",
        "Which tier decides, and how many experts run",
        "reported",
        f"{result['experts_per_token']:.2f} experts per token and layer; {shares}",
        (
            "Mispredictions: planned tokens whose predicted first expert is not the gate's; they do harm only where "
            "the table chooses the experts.",
        ),
        (Table("By layer", columns, tuple(rows)),),
        (
            ReportFigure(
                "layers",
                "Tiers and experts by layer",
                "Left: share of the tokens that each tier decided: the table (fast), the cache, or the router "
                "(learned). Right: experts that ran per token in each layer; dashed: the mean over layers.",
                "Planning a token saves nothing by itself: if all its experts still run, it costs as much as before.",
                partial(_draw_layers, result),
            ),
        ),
    )


def _nearness(found: Mapping[str, Any]) -> Section:
    apart, same = found["divergence"], found["agreement"]
    return Section(
        "nearness",
        "How near it stays to the plain model",
        "reported",
        f"divergence {apart['value']:.4f} nats per token [{apart['low']:.4f}, {apart['high']:.4f}]; both models would "
        f"write the same token at {same['value']:.1%} of the positions [{same['low']:.1%}, {same['high']:.1%}]",
        (
            "The Kullback-Leibler divergence from the plain model counts every change of its predictions. Perplexity "
            "does not: answers that know this kind of text better than the model lower it. Intervals: 95%, documents "
            "resampled.",
        ),
        headline=f"divergence {apart['value']:.4f} nats per token",
    )


def _draw_layers(result: Mapping[str, Any]) -> Figure:
    figure, (shares, experts) = panels(2)
    stacked_tiers(shares, [layer["tiers"] for layer in result["layers"]])
    shares.legend(fontsize="small", ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    numbers = range(len(result["layers"]))
    experts.bar(numbers, [layer["experts_per_token"] for layer in result["layers"]], color="0.6", edgecolor="0")
    experts.axhline(result["experts_per_token"], color="0", linewidth=0.8, linestyle="--")
    experts.set(ylabel="experts run per token")
    experts.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.supxlabel("layer")
    figure.tight_layout()
    return figure


def _throughput(found: Mapping[str, Any]) -> Section:
    rates = {phase: found[f"{phase}_tokens_per_second"] for phase in ("prefill", "decode")}
    ratios = found["speedup"]
    columns = [Column("phase"), Column("batch"), Column("tokens/s", ",.0f")]
    rows = [(phase, found[phase]["batch"], rate) for phase, rate in rates.items()]
    words = f"Median of {found['repeats']} rounds. Tokens per second of two machines or runs do not compare."
    said = ", ".join(f"{phase} {rate:,.0f} tokens/s" for phase, rate in rates.items())
    if ratios:
        columns += (Column("plain, tokens/s", ",.0f"), *(Column(one, ".2f") for one in ("speed-up", "low", "high")))
        rows = [
            (*row, found[row[0]].get("plain_tokens_per_second"), *map(ratios[row[0]].get, ("value", "low", "high")))
            for row in rows
        ]
        words += (
            " A speed-up is the median over rounds of the ratio within a round, which times VAR and the plain model; "
            "intervals are 95%."
        )
        said = (
            ", ".join(f"{phase} {ratio['value']:.2f}x" for phase, ratio in ratios.items()) + " the plain model's speed"
        )
    tables = (Table("", tuple(columns), tuple(rows)),)
    return Section("throughput", "Throughput", "reported", said, (words,), tables)


def _search(found: Search, limit: float, caption: str) -> Section:
    chosen = found.chosen
    return Section(
        "policy_search",
        "The policy that was found",
        "reported",
        f"{chosen.experts_per_token:.2f} experts per token at {chosen.degradation:+.2%} on the tuning documents",
        figures=(
            ReportFigure(
                "frontier",
                "What fewer experts cost on the tuning documents",
                "Increase in perplexity against experts run per token. Dots: one layer skips experts at one tolerance, "
                "and all other layers run in full. Line: the layers together, in the order in which the search tried "
                "them. Dashed: the allowed loss.",
                "The policy was chosen on these documents, so it looks better on them than on others.",
                partial(frontier, found, limit, caption),
            ),
        ),
    )

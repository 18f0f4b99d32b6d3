"""What one evaluation of phase 2 found: the quality, who decided and how many experts ran, how fast it was."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.evaluate.quality import Scores
from analysis.policies.search import Search
from analysis.report.figures import panels, quality_against_experts, stacked_tiers
from analysis.report.report import Column, Report, ReportFigure, Section, Table
from varjax.step import TIERS

HELD_OUT = ("calibrate", "test")  # splits that neither make a table nor choose a policy
_GROUPS = 40  # rows of the table of groups, the largest first


def report(name: str, result: Mapping[str, Any], scores: Scores, facts: Sequence[tuple[str, str]] = ()) -> Report:
    """What the result file of an evaluation says, for people.

    Args:
        name: of the result file, with which the figures' names begin.
        result: what stands in that file.
    """
    sections = [_quality(result, scores)]
    if "tiers" in result:
        sections.append(_routing(name, result))
    if "throughput" in result:
        sections.append(_throughput(result["throughput"]))
    if "policy_search" in result:
        sections.append(_search(name, result["policy_search"]))
    title = "Evaluation of the plain model" if result["mode"] == "baseline" else "Evaluation of adaptive routing"
    facts = (*facts, ("documents", f"{result['documents']:,}, {result['tokens']:,} tokens"))
    return Report(title, facts, flattered(result), tuple(sections))


def flattered(result: Mapping[str, Any]) -> tuple[str, ...]:
    """A warning where an evaluation of VAR read documents that may have made its table or chosen its policy."""
    split = result.get("provenance", {}).get("data", {}).get("split", HELD_OUT[0])
    if result["mode"] == "baseline" or split in HELD_OUT:
        return ()
    return (
        f"These documents flatter VAR if its tables or its policy were made from this dataset: {split or 'all splits'} "
        f"made or chose them. Evaluate on {' or '.join(HELD_OUT)} to learn what they are worth.",
    )


def draw(name: str, result: Mapping[str, Any], search: Search | None, bound: float, tuned: int) -> dict[str, Figure]:
    """The figures that the report names.

    Args:
        bound: change of perplexity that the config allows.
        tuned: documents of the search, at most.
    """
    drawn = {}
    if "tiers" in result:
        drawn[f"{name}_layers"] = layers(result)
    if search is not None:
        drawn[f"{name}_frontier"] = frontier(search, bound, f"Tuning documents ({tuned:,} at most)")
    return drawn


def layers(result: Mapping[str, Any]) -> Figure:
    """Who decides in each layer, and how many experts run there."""
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


def frontier(search: Search, bound: float, caption: str) -> Figure:
    """What the search measured: change of perplexity over experts per token.

    Args:
        bound: the change that is allowed.
        caption: which documents were scored.
    """
    alone = "one layer, one tolerance"
    series = {
        alone: [(point.experts_per_token, point.degradation) for point in search.single],
        "layers together": [(point.experts_per_token, point.degradation) for point in search.path],
        "chosen": [(search.chosen.experts_per_token, search.chosen.degradation)],
    }
    return quality_against_experts(series, bound, caption, dots=(alone,))


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
    )


def _routing(name: str, result: Mapping[str, Any]) -> Section:
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
        "Who decides, and how many experts run",
        "reported",
        f"{result['experts_per_token']:.2f} experts per token and layer; {shares}",
        (
            "False hits: planned tokens whose predicted first expert is not the gate's; they do harm only where the "
            "table chooses the experts.",
        ),
        (Table("By layer", columns, tuple(rows)),),
        (
            ReportFigure(
                f"{name}_layers",
                "Tiers and experts by layer",
                "Left: who decided, as shares of the tokens. Right: experts that ran per token; dashed: the mean over "
                "layers.",
                "A decided token is not a saved one: where all experts of a planned token run, it costs as much as "
                "before.",
            ),
        ),
    )


def _throughput(found: Mapping[str, Any]) -> Section:
    rates = [(phase, found[phase]["batch"], found[f"{phase}_tokens_per_second"]) for phase in ("prefill", "decode")]
    columns: tuple[Column, ...] = (Column("phase"), Column("batch"), Column("tokens/s", ",.0f"))
    words = f"Median of {found['repeats']} rounds. Tokens per second of two machines or runs do not compare."
    ratios = found["speedup"]
    if not ratios:
        said = ", ".join(f"{phase} {rate:,.0f} tokens/s" for phase, _, rate in rates)
        return Section("throughput", "Throughput", "reported", said, (words,), (Table("", columns, tuple(rates)),))
    said = ", ".join(f"{phase} {ratio['value']:.2f}x" for phase, ratio in ratios.items())
    ends = tuple(
        (
            *rate,
            found[rate[0]].get("plain_tokens_per_second"),
            *(ratios[rate[0]][end] for end in ("value", "low", "high")),
        )
        for rate in rates
    )
    columns += (Column("plain, tokens/s", ",.0f"), *(Column(one, ".2f") for one in ("speed-up", "low", "high")))
    paired = (
        "Speed-ups are paired: each round times VAR and the plain model, and the speed-up is the median of the ratios "
        "inside the rounds; intervals are 95 %."
    )
    return Section(
        "throughput",
        "Throughput",
        "reported",
        f"{said} the plain model's speed",
        (words, paired),
        (Table("", columns, ends),),
    )


def _search(name: str, found: Mapping[str, Any]) -> Section:
    chosen = found["chosen"]
    return Section(
        "policy_search",
        "The policy that was found",
        "reported",
        f"{chosen['experts_per_token']:.2f} experts per token at {chosen['degradation']:+.2%} on the tuning documents",
        figures=(
            ReportFigure(
                f"{name}_frontier",
                "What fewer experts cost on the tuning documents",
                "Dots: one layer at one tolerance, all others in full. Line: layers together, as the search went. "
                "Dashed: what the config allows.",
                "These documents chose the policy, so they flatter it.",
            ),
        ),
    )

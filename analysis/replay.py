"""Replaying a VARConfig against a routing trace, without the model: which tier decides, and how well.

    python -m analysis.replay --trace trace.parquet --preset balanced --output results/replay

See `analysis.traces.replaying` for the method. Layers and tokens of one document depend on each other: count documents,
not tokens, when judging how certain a figure is.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from analysis.command import HelpFormatter, path_argument, program
from analysis.evaluate.losses import SECONDS_PER_TOKEN
from analysis.report.figures import stacked_tiers, subplots
from analysis.report.files import write_report
from analysis.report.output import OUTPUT_HELP, Output
from analysis.report.provenance import hash_json, provenance
from analysis.report.report import Column, Report, ReportFigure, Section, Table, text
from analysis.steps import finished_steps
from analysis.traces import importing
from analysis.traces.replaying import Replay, replay
from varjax.checksums import digest_of_file
from varjax.config import PRESETS, VARConfig
from varjax.step import TIERS

# Of a tier that plans: the name in the results and that of the column.
_MEASURES = {"agreement": "agreement", "recall": "recall", "experts_kept": "kept", "mass": "mass"}
_FEW = 20  # decisions; a rate over fewer is not drawn


@program
def main(arguments: Sequence[str] | None) -> None:
    """Replay a config and write its report.

    Args:
        arguments: of the command line.
    """
    parser = argparse.ArgumentParser(
        description="Replay a VARConfig on a routing trace, without the model.", formatter_class=HelpFormatter
    )
    parser.add_argument(
        "--trace", type=path_argument, required=True, help="trace file, or an .npz file from another program"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--config", type=path_argument, help="VARConfig as a JSON file")
    which.add_argument(
        "--preset", choices=sorted(PRESETS), default="balanced", help="thresholds to use if there is no --config"
    )
    parser.add_argument("--output", type=path_argument, default=Path("results/replay"), help=OUTPUT_HELP)
    parser.add_argument("--build_share", type=float, default=0.7, help="share of the documents used to build the table")
    parser.add_argument("--step", type=int, default=64, help="tokens between a lookup and its commit")
    parser.add_argument(
        "--seconds_per_token",
        type=float,
        default=SECONDS_PER_TOKEN,
        help="seconds by which the clock of the cache advances per token",
    )
    args = parser.parse_args(arguments)
    output = Output.of(args.output, "replay")
    with output.locked():
        config = VARConfig.load(args.config) if args.config else VARConfig.preset(args.preset)
        settings = {name: getattr(args, name) for name in ("build_share", "step", "seconds_per_token")}
        trace = importing.load(args.trace)
        trace_sha256 = digest_of_file(args.trace)
        with finished_steps(output, {"trace": trace_sha256, "config": config.digest(), **settings}) as steps:
            found = steps.do("replay", Replay, lambda: replay(trace, config, **settings))
            applied = json.loads(found.config.to_json())
            hashes: dict[str, Any] = {"trace_sha256": trace_sha256, "config_sha256": hash_json(applied)}
            origin = provenance(trace=str(args.trace), config=applied, **hashes, **settings)
            extra = {**found.fields(), "provenance": origin}
            report = write_report(lambda: report_of(found), output, extra=extra)
        print(f"{text(report)}\nwritten to {args.output}")


def report_of(found: Replay) -> Report:
    """Report a replay.

    Args:
        found: the replay.

    Returns:
        The figures of every layer and tier.
    """
    origin = f"{found.origin.get('model', 'a trace')}: {found.tokens:,} tokens of {found.documents:,} documents"
    table = f"{found.keys:,} keys from {found.build_tokens:,} tokens of {found.build_documents:,} other documents"
    clock = f"steps of {found.step} tokens, {found.seconds_per_token:g} s per token"
    sections = [_tiers(found)]
    if found.ranked and found.sums.aged.any():  # decisions were used again, and can be judged
        sections.append(_ages(found))
    facts = (("trace", origin), ("table", table), ("clock", clock))
    return Report("Replay of a configuration", facts, found.notes, tuple(sections))


def _tiers(found: Replay) -> Section:
    rates = found.rates()
    captured = np.any(found.sums.tokens, axis=-1).tolist()
    names = [str(layer) if known else f"{layer} (not captured)" for layer, known in enumerate(captured)]
    rows = [(name, found.rates(layer)) for layer, name in enumerate(names)] + [("all", rates)]
    shares = ", ".join(f"{tier} {share or 0:.1%}" for tier, share in rates["shares"].items())
    experts = f"{rates['experts_per_token'] or 0:.2f} of {found.top_k} experts per token"
    return Section(
        "tiers",
        "Which tier decides, and how well it predicts the choice",
        "reported",
        f"{shares}; {experts}",
        (
            "A tier is judged at the tokens and layers that it decided, in other documents than those that built the "
            "table but of the same domains: text of another kind finds fewer keys.",
            "Agreement: its first expert is the router's first. Recall: share of the router's K experts among the "
            f"predicted K; uniform chance gives {found.top_k / found.num_experts:.1%}. Kept: share of the predicted "
            "experts that the plan keeps which the router chose too. Mass: share of the chosen experts' probability "
            "that falls on predicted ones; near 1 it says little where probabilities are flat and K is large.",
            "Constant: a table that gives every token the layer's busiest experts of the build documents; what a tier "
            "has above that comes from the ids. Unlimited: what the cached tier would decide with no bound on size or "
            "age; where that is hardly above the cached share, a larger cache gains nothing.",
        ),
        (
            Table("Which tier decides, by layer", _SHARES, tuple(_shares(*row) for row in rows)),
            Table("How well the choice is predicted, by layer", _PREDICTED, tuple(_predicted(*row) for row in rows)),
        ),
        (
            ReportFigure(
                "replay_tiers",
                "Which tier decides in each layer, and how well",
                "Top: share of the tokens that each tier decides: the table (fast), the cache, or the router "
                "(learned). The short lines show how much the table and a cache without limits on size and age would "
                "decide. Bottom: agreement (the predicted first expert is the router's) and recall (the share of the "
                "router's experts that were predicted), next to a constant table that predicts the layer's busiest "
                "experts for every token.",
                "Each tier is judged only on the tokens that it decides, and these are the easier ones.",
                partial(_draw_tiers, found),
            ),
        ),
        experts,
    )


_SHARES = (
    *(Column("layer"), *(Column(tier, ".1%") for tier in TIERS), Column("experts", ".2f")),
    *(Column("unlimited", ".1%"), Column("its agreement", ".1%")),
    *(Column("constant: agreement", ".1%"), Column("recall", ".1%")),
)
_PREDICTED = (
    Column("layer"),
    *(Column(f"{tier}: {measure}", ".1%") for tier in TIERS[:2] for measure in _MEASURES.values()),
)


def _shares(name: str, rates: dict[str, Any]) -> tuple[str | float | None, ...]:
    bounds = (*rates["unlimited_cache"].values(), *rates["constant"].values())
    return (name, *(rates["shares"][tier] for tier in TIERS), rates["experts_per_token"], *bounds)


def _predicted(name: str, rates: dict[str, Any]) -> tuple[str | float | None, ...]:
    return (name, *(rates[tier][measure] for tier in TIERS[:2] for measure in _MEASURES))


def _ages(found: Replay) -> Section:
    rows = tuple(
        (f"from {one['from_tokens']:,} tokens", one["from_tokens"] * found.seconds_per_token, *list(one.values())[1:])
        for one in found.rates()["mispredictions_by_age"]
    )
    columns = (Column("age"), Column("from [s]", ".4g"), Column("decisions", ","), Column("mispredictions", ".1%"))
    return Section(
        "ages",
        "How cached decisions age",
        "reported",
        f"{int(found.sums.aged.sum()):,} decisions of the cached tier, all layers together",
        (
            "Each age holds other contexts, not one decision as it ages. Young decisions are repetitions inside a "
            "document, old ones mostly of what many documents share, such as the fixed words of a prompt, and these "
            "may well be more accurate. Ages with few decisions say nothing.",
        ),
        (Table("By age", columns, rows),),
        (
            ReportFigure(
                "replay_mispredictions",
                "Mispredictions of the cached tier by age",
                "Each row is a layer, and each column is the age of the cached decisions that were used again. The "
                f"darker a cell, the more often their first expert is not the router's. Hatched: fewer than {_FEW} "
                "decisions.",
                "The columns hold different contexts; they do not show one decision as it ages.",
                partial(_draw_ages, found),
            ),
        ),
    )


def _draw_tiers(found: Replay) -> Figure:
    layers = [found.rates(layer) for layer in range(len(found.sums.tokens))]
    figure, (shares, quality) = subplots(2, 1, figsize=(6.4, 6.0), sharex=True)
    # None, for a layer that was not captured, becomes NaN and is not drawn.
    by_tier = [{tier: np.nan if share is None else share for tier, share in one["shares"].items()} for one in layers]
    stacked_tiers(shares, by_tier)
    # The unlimited cache comes after the same fast tier.
    unlimited = np.array([rates["unlimited_cache"]["share"] for rates in layers], float)
    bound = np.array([one["fast"] for one in by_tier]) + unlimited
    shares.plot(range(len(layers)), bound, "k_", markersize=10, label="fast + unlimited cache")
    shares.set(title=_caption(found))
    shares.legend(fontsize="small", ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.02))

    looks: dict[str, dict[str, Any]] = {
        "fast": {"color": "0.25", "marker": "o", "markersize": 4},
        "cached": {"color": "0.6", "marker": "s", "markersize": 4},
        "constant": {"color": "0.75", "linewidth": 0.9},
    }
    for tier, look in looks.items():
        for name, style in (("agreement", "-"), ("recall", ":")):
            values = np.array([rates[tier][name] for rates in layers], float)
            if np.isfinite(values).any():
                label = f"{tier}{' table' * (tier == 'constant')}, {name}"
                quality.plot(values, style, label=label, **look)
    quality.set(xlabel="layer", ylabel="first expert, all experts predicted", ylim=(0, 1.02))
    quality.xaxis.set_major_locator(MaxNLocator(integer=True))
    quality.legend(fontsize="small", ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    quality.yaxis.set_major_formatter(PercentFormatter(1))
    return figure


def _draw_ages(found: Replay) -> Figure:
    buckets = 1 + int(np.max(np.flatnonzero(found.sums.aged.any(axis=0)), initial=0))  # up to the last with any
    decisions, agreed = found.sums.aged[:, :buckets], found.sums.aged_agreements[:, :buckets]
    enough = decisions >= _FEW
    rate = np.where(enough, 1 - agreed / np.maximum(decisions, 1), np.nan)
    figure, axis = subplots(figsize=(6.4, 1.8 + 0.16 * len(decisions)))
    top = max(0.01, float(np.max(rate, where=enough, initial=0)))
    image = axis.imshow(rate, cmap="Greys", vmin=0, vmax=top, aspect="auto", origin="lower")
    figure.colorbar(image, ax=axis, label="mispredictions", format=PercentFormatter(1))
    edges = [f"{edge:,}" for edge in found.age_edges[:buckets]]
    axis.patch.set(hatch="xxx", edgecolor="0.8")  # shows where there is nothing
    axis.set_xticks(range(len(edges)), edges, rotation=45, ha="right")
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    unit = f"age of the decision, from [tokens of {found.seconds_per_token:g} s]"
    axis.set(xlabel=unit, ylabel="layer", title=_caption(found))
    return figure


def _caption(found: Replay) -> str:
    name = found.origin.get("model", "a trace")
    return f"Replay on {name}\n{found.tokens:,} tokens of {found.documents:,} documents"


if __name__ == "__main__":
    main()

"""What a replay says: who decides, how well the router's choice is foretold, and how decisions age."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from analysis.report.report import Column, Report, ReportFigure, Section, Table
from analysis.traces.replay_figures import mispredictions_by_age, tiers_by_layer
from varjax.step import TIERS

if TYPE_CHECKING:
    from analysis.replay import Replay

_MEASURES = ("agreement", "recall", "experts_kept", "mass")  # of a tier that plans
_TIERS = ReportFigure(
    "replay_tiers",
    "Who decides in each layer, and how well",
    "Top: shares of the tokens by tier; the short lines are what a cache without bounds would reach on top of the fast "
    "tier. Bottom: agreement and recall, beside a table that gives all tokens the layer's busiest experts.",
    "A tier is judged at the tokens that it decides, and these are the easier ones.",
)
_AGES = ReportFigure(
    "replay_mispredictions",
    "False hits of the cached tier by age",
    "A row is a layer, a column the age of the decision that was used again; darker: more often not the router's. "
    "Hatched: fewer than 20 decisions.",
    "Each column holds other contexts, not one decision as it ages.",
)


def report(found: Replay) -> Report:
    """The figures of every layer and tier, with how to read them."""
    origin = f"{found.origin.get('model', 'a trace')}: {found.tokens:,} tokens of {found.documents:,} documents"
    table = f"{found.keys:,} keys from {found.build_tokens:,} tokens of {found.build_documents:,} other documents"
    clock = f"steps of {found.step} tokens, {found.seconds_per_token:g} s per token"
    sections = (_tiers(found), _ages(found)) if found.has_ages else (_tiers(found),)
    return Report(
        "Replay of a configuration", (("trace", origin), ("table", table), ("clock", clock)), found.notes, sections
    )


def draw(found: Replay) -> dict[str, Figure]:
    """The figures that the report names."""
    drawn = {_TIERS.name: tiers_by_layer(found)}
    return drawn | ({_AGES.name: mispredictions_by_age(found)} if found.has_ages else {})


def _tiers(found: Replay) -> Section:
    rates = found.rates()
    captured = np.any(found.sums.tokens, axis=-1).tolist()
    names = [str(layer) if known else f"{layer} (not captured)" for layer, known in enumerate(captured)]
    rows = [(name, found.rates(layer)) for layer, name in enumerate(names)] + [("all", rates)]
    shares = ", ".join(f"{tier} {share or 0:.1%}" for tier, share in rates["shares"].items())
    return Section(
        "tiers",
        "Who decides, and how well the choice is foretold",
        "reported",
        f"{shares}; {rates['experts_per_token'] or 0:.2f} of {found.top_k} experts per token",
        (
            "All figures of a tier are over the tokens and layers that it decided. Share: of all tokens; the documents "
            "that score are others than those that built the table, of the same domains: text of another kind finds "
            "fewer keys.",
            "Agreement: its first expert is the router's first. A layer whose gate chooses takes no harm where it is "
            "not.",
            f"Recall: share of the router's K experts among the predicted K; uniform chance gives "
            f"{found.top_k / found.num_experts:.1%}. Kept: share of the predicted experts that the plan keeps which "
            "the router chose too, what a prefetch would have used. Mass: share of the chosen experts' probability "
            "that falls on predicted ones; near 1 says little where probabilities are flat and K is large.",
            "Constant: a table that gives every token the layer's busiest experts of the build documents, over all "
            "tokens. What a tier has above that, the ids foretell.",
            "Unlimited: what the cached tier would decide with no bound on size or age, after the same fast tier. "
            "Where it is hardly above the cached share, a larger cache gains nothing.",
        ),
        (
            Table("Who decides, by layer", _SHARES, tuple(_shares(*row) for row in rows)),
            Table("How well the choice is foretold, by layer", _FORETOLD, tuple(_foretold(*row) for row in rows)),
        ),
        (_TIERS,),
    )


def _shares(name: str, rates: dict[str, Any]) -> tuple[str | float | None, ...]:
    bounds = (*rates["unlimited_cache"].values(), *rates["constant"].values())
    return (name, *(rates["shares"][tier] for tier in TIERS), rates["experts_per_token"], *bounds)


def _foretold(name: str, rates: dict[str, Any]) -> tuple[str | float | None, ...]:
    return (name, *(rates[tier][measure] for tier in TIERS[:2] for measure in _MEASURES))


def _ages(found: Replay) -> Section:
    rows = []
    for bucket in found.rates()["mispredictions_by_age"]:
        tokens = bucket["from_tokens"]
        seconds = tokens * found.seconds_per_token
        rows.append((f"from {tokens:,} tokens", seconds, bucket["decisions"], bucket["mispredictions"]))
    columns = (Column("age"), Column("from [s]", ".4g"), Column("decisions", ","), Column("mispredictions", ".1%"))
    return Section(
        "ages",
        "How cached decisions age",
        "reported",
        f"{int(found.sums.aged.sum()):,} decisions of the cached tier, all layers together",
        (
            "Each age holds other contexts, not one decision as it ages. Young decisions are repetitions inside a "
            "document, old ones mostly of what many documents share, such as the fixed words of a prompt, and these "
            "may well be the truer ones. Ages with few decisions say nothing.",
        ),
        (Table("By age", columns, tuple(rows)),),
        (_AGES,),
    )


_SHARES = (
    *(Column("layer"), *(Column(tier, ".1%") for tier in TIERS), Column("experts", ".2f")),
    *(Column("unlimited", ".1%"), Column("its agreement", ".1%")),
    *(Column("constant: agreement", ".1%"), Column("recall", ".1%")),
)
_FORETOLD = (
    Column("layer"),
    *(Column(f"{tier}: {measure}", ".1%") for tier in TIERS[:2] for measure in _MEASURES),
)

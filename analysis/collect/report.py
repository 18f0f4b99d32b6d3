"""What collected routing statistics say at first sight: how sure each layer's router is, and how settled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np
from matplotlib.figure import Figure

from analysis.hypotheses import statistics_figures
from analysis.hypotheses.criteria import LOW_ENTROPY
from analysis.hypotheses.figure_notes import NOTES
from analysis.report.report import Column, Report, Section, Table
from varjax.stats import RoutingStats


@dataclass(frozen=True)
class Layer:
    """One layer's means over the occurrences of all token ids that are keys."""

    layer: int
    mean_entropy: float  # of the gate, nats
    normalized_entropy: float  # over ln E
    share_at_sure_ids: float  # of the occurrences: those of ids whose mean entropy is below `LOW_ENTROPY`
    routing_consistency: float  # share of an id's occurrences with its commonest first choice


def summarize(stats: RoutingStats) -> list[Layer]:
    """Of each layer in which a token id was counted."""
    found = []
    ones = stats.row_orders == 1
    for layer in range(len(stats.count)):
        seen = ones & (stats.count[layer] > 0)
        if not seen.any():
            continue
        weight, entropy = stats.count[layer, seen], stats.entropy.mean[layer, seen]
        mean = float(np.average(entropy, weights=weight))
        found.append(
            Layer(
                layer,
                mean,
                mean / math.log(stats.num_experts),
                float(np.average(entropy < LOW_ENTROPY, weights=weight)),
                float(np.average(stats.routing_consistency[layer, seen], weights=weight)),
            )
        )
    return found


def report(stats: RoutingStats, facts: Sequence[tuple[str, str]] = ()) -> Report:
    """The layers' means in words and a table; the hypotheses are tested by `analysis.hypothesis_validation`."""
    layers = summarize(stats)
    entropies = [one.normalized_entropy for one in layers]
    spread = f"{min(entropies):.0%} to {max(entropies):.0%} of ln {stats.num_experts}" if layers else "no token id"
    left_out = tuple(
        f"Layer {layer}: {count:,} tokens are left out, the router gave NaN or infinity."
        for layer, count in enumerate(stats.nonfinite)
        if count
    )
    section = Section(
        "routers",
        "How sure the routers are",
        "reported",
        f"mean gate entropy by layer: {spread}",
        (
            "Over occurrences of token ids that are keys. An id is below a bound if the mean of its entropy is; single "
            "occurrences need not be. Consistency is in sample: rare ids lift it.",
            *left_out,
        ),
        (Table("Routers by layer", _COLUMNS, tuple(map(astuple, layers))),),
        (NOTES["frequency_entropy"], NOTES["entropy_distribution"]),
    )
    return Report(
        "Routing statistics",
        (*facts, ("statistics", f"{statistics_figures.size(stats)}, {len(stats.keys):,} keys")),
        (),
        (section,),
    )


def draw(stats: RoutingStats) -> dict[str, Figure]:
    """The figures that the report names."""
    return {
        "frequency_entropy": statistics_figures.frequency_against_entropy(stats),
        "entropy_distribution": statistics_figures.entropy_distribution(stats),
    }


_COLUMNS = (
    *(Column("layer"), Column("gate entropy [nats]", ".3f"), Column("of ln E", ".1%")),
    *(Column(f"at ids below {LOW_ENTROPY} nats", ".1%"), Column("consistency", ".1%")),
)

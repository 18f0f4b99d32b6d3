"""How sure are the routers? Each layer's mean gate entropy and consistency, for the summary of a collection."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

import numpy as np

from analysis.criteria import LOW_ENTROPY
from analysis.questions.by_layer import SHARE
from analysis.questions.data import RoutingData, needs_routing
from analysis.questions.entropy_distribution import entropy_figure
from analysis.questions.frequency_entropy import frequency_figure
from analysis.questions.question import Finding, Question
from analysis.report.report import Column, Table


@dataclass(frozen=True)
class Layer:
    """One layer's means over the occurrences of all token ids that are keys."""

    layer: int
    mean_entropy: float  # of the gate, nats
    normalized_entropy: float  # over ln E
    share_at_sure_ids: float  # of the occurrences: those of ids whose mean entropy is below `LOW_ENTROPY`
    routing_consistency: float  # share of an id's occurrences with its most common first choice


def _examine(data: RoutingData) -> Finding:
    stats, layers = data.stats, []
    for layer, counts in enumerate(stats.count):
        seen = (stats.row_orders == 1) & (counts > 0)
        if seen.any():
            entropy = stats.entropy.mean[layer, seen]
            figures = (entropy, entropy < LOW_ENTROPY, stats.routing_consistency[layer, seen])
            mean, sure, consistency = (float(np.average(one, weights=counts[seen])) for one in figures)
            layers.append(Layer(layer, mean, mean / math.log(stats.num_experts), sure, consistency))
    entropies = [one.normalized_entropy for one in layers]
    spread = f"{min(entropies):.0%} to {max(entropies):.0%} of ln {stats.num_experts}" if layers else "no token id"
    words = [
        "Over occurrences of token ids that are keys. An id is below a bound if the mean of its entropy is; single "
        "occurrences may not be. Consistency is in sample: rare ids raise it.",
        *(
            f"Layer {layer}: {count:,} tokens are left out, the router gave NaN or infinity."
            for layer, count in enumerate(stats.nonfinite)
            if count
        ),
    ]
    columns = (
        *(Column("layer"), Column("gate entropy [nats]", ".3f"), Column("of ln E", SHARE)),
        *(Column(f"at ids below {LOW_ENTROPY} nats", SHARE), Column("consistency", SHARE)),
    )
    table = Table("Routers by layer", columns, tuple(map(astuple, layers)))
    shown = (frequency_figure(stats), entropy_figure(stats))
    outcome = f"mean gate entropy by layer: {spread}"
    headline = f"{np.mean(entropies):.0%} of the largest entropy" if layers else ""
    return Finding((QUESTION.section("reported", outcome, words, [table], shown, headline),), {"layers": layers})


QUESTION = Question("routers", "How sure the routers are", _examine, needs_routing)

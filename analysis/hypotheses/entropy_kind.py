"""What the gate entropy of some statistics is the entropy of: all experts, or what a trace has of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from varjax.stats import RoutingStats


@dataclass(frozen=True)
class EntropyKind:
    """What the gate entropy of some statistics is the entropy of."""

    experts: int  # probabilities it is over
    words: str  # the most that it can be
    caution: tuple[str, ...] = ()  # where it is not the entropy that the published criteria mean
    no_verdict: str = ""  # why criteria on it cannot be judged, or ""
    is_lower_bound: bool = False  # a FAIL of a criterion that asks for little entropy then stands all the same

    @property
    def most(self) -> float:
        """Nats; NaN where there is no choice."""
        return math.log(self.experts) if self.experts > 1 else math.nan


def entropy_kind(stats: RoutingStats, meta: Mapping[str, Any]) -> EntropyKind:
    """`meta` as `varjax.statsfile.read` returns it, or of `analysis.hypotheses.sources.trace_source`."""
    kind = _entropy_kind(stats, meta)
    if meta.get("scores") != "sigmoid":
        return kind
    caution = (
        "Caution: the router has sigmoid scores, which are probabilities only by the definition of dividing them by "
        "their sum. The published criteria are about the entropy of a softmax."
    )
    return replace(kind, caution=(*kind.caution, caution))


def _entropy_kind(stats: RoutingStats, meta: Mapping[str, Any]) -> EntropyKind:
    if meta.get("entropy_from") == "chosen":
        k = int(meta["top_k"])
        # The K largest probabilities over their sum majorise all E of them, so their entropy is never above the gate's.
        caution = (
            f"Caution: the trace has probabilities over the {k} chosen experts only. Their entropy is at most ln {k} = "
            f"{math.log(k):.3f} nats and never above that of the router over all {stats.num_experts}, which the "
            "criterion was published for: a FAIL for too much entropy stands, a PASS for little does not, and rho is "
            "not bounded at all."
        )
        why = f"the criterion is on gate entropy, of which the {k} chosen experts' is a lower bound"
        return EntropyKind(k, f"ln {k} = {math.log(k):.3f} nats (over the chosen experts)", (caution,), why, True)
    number = stats.num_experts
    words = f"ln {number} = {math.log(number):.3f} nats"
    if "num_experts" in meta.get("filled", {}):
        words += " (experts up to the largest id in the file)"
    if meta.get("entropy_from") == "all":
        caution = (
            "Caution: the trace has the chosen experts' probabilities only, so entropy is a lower bound: a FAIL "
            "for too much entropy stands, a PASS for little does not, and rho is not bounded at all."
        )
        return EntropyKind(number, words, (caution,), "gate entropy is known as a lower bound only", True)
    return EntropyKind(number, words)

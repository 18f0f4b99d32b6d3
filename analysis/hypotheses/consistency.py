"""Routing consistency of token ids, by frequency, against what chance alone would give.

Letters: L layers, G groups of token ids, n ids of a group, E experts, S simulations.

Consistency is the share of a token id's occurrences in which its commonest first choice came first. It is *in sample*:
the commonest choice is picked on the very occurrences that it is scored on, so a rare id is consistent by itself (one
occurrence: 1). The null says by how much: every occurrence draws its expert from the layer's own shares of first
choices, whatever the id. It knows no documents: where a document has its favorite experts, an id that keeps to few
documents is more consistent than the null although its id has no part in routing. What foretells choices that were not
seen is held-out predictability, and needs a trace.

The null is simulated, and all ids of one frequency share its draws. So its mean has an error of its own, the same for
all of them, and the band is as wide as chance in the data and this error make it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from analysis.hypotheses.criteria import MIN_KEYS, Z95, too_few, usable
from varjax.stats import RoutingStats

TOP = 1000  # most frequent token ids, a group of their own
DECILES = 10


@dataclass(frozen=True)
class Consistency:
    """Mean consistency by group, with 95 % intervals, and the mean under the null.

    Groups of fewer than MIN_KEYS ids have neither interval nor band: NaN.
    """

    groups: tuple[str, ...]  # [G]
    value: np.ndarray  # float64 [L, G]
    low: np.ndarray  # float64 [L, G]
    high: np.ndarray  # float64 [L, G]
    null: np.ndarray  # float64 [L, G]
    null_low: np.ndarray  # float64 [L, G], where 95 % of the means under the null lie
    null_high: np.ndarray  # float64 [L, G]
    keys: np.ndarray  # int64 [L, G]
    frequencies: np.ndarray  # int64 [L, G, 2], least and most frequent id
    left_out: tuple[np.ndarray, ...]  # per layer int64 [m], rows without a known consistency
    untestable: tuple[str, ...]  # per layer why nothing can be said, or ""


def consistency(
    stats: RoutingStats, first_choices_known: bool = True, samples: int = 100, seed: int = 0
) -> Consistency:
    """Consistency per layer: all ids, all occurrences, the most frequent ids, and deciles of ids by frequency.

    Intervals treat token ids as independent; `analysis.hypotheses.document_intervals` makes those over documents.

    Args:
        first_choices_known: False where `top1_counts` names the commonest choice only; the layer's shares are then
            estimated from the mean probabilities, which the reader of the file filled in.
        samples: S, simulated draws of every different frequency; as many as it has ids, if these are more.
        seed: of the simulation.
    """
    deciles = (f"decile {i + 1}" for i in range(1, DECILES - 1))
    ends = ("decile 1 (rarest)", f"decile {DECILES} (most frequent)")
    groups = ("all token ids", "all occurrences", f"top {TOP:,} ids", ends[0], *deciles, ends[1])
    layers = len(stats.count)
    figures = np.full((6, layers, len(groups)), np.nan)
    keys = np.zeros((layers, len(groups)), np.int64)
    frequencies = np.zeros((layers, len(groups), 2), np.int64)
    left_out, reasons = [], []
    rng = np.random.default_rng(seed)
    for layer in range(layers):
        used, without = usable(stats, layer, ("consistency",))
        left_out.append(without)
        reasons.append(too_few(stats, layer, used, "consistency"))
        if reasons[-1]:
            continue
        used = used[np.argsort(stats.count[layer, used], kind="stable")]
        count = stats.count[layer, used]
        share = stats.routing_consistency[layer, used]
        marginal = (stats.top1_counts if first_choices_known else stats.sum_probs)[layer, used].sum(axis=0)
        marginal = marginal / marginal.sum()
        different, which, ids = np.unique(count, return_inverse=True, return_counts=True)
        draws = np.maximum(ids, samples)
        mean, variance = largest_shares(different, marginal, draws, rng)
        ones = np.ones(len(used))
        parts = [np.arange(len(used))] * 2 + [
            np.arange(len(used))[-TOP:],
            *np.array_split(np.arange(len(used)), DECILES),
        ]
        for group, part in enumerate(parts):
            weight = (count if group == 1 else ones)[part] / (count if group == 1 else ones)[part].sum()
            value, null = weight @ share[part], weight @ mean[which[part]]
            together = np.bincount(which[part], weight, len(different))  # weight of each frequency
            chance = np.square(weight) @ variance[which[part]] + np.square(together) @ (variance / draws)
            enough = 1 if len(part) >= MIN_KEYS else np.nan
            half = enough * Z95 * np.sqrt(np.square(weight) @ np.square(share[part] - value))
            null_half = enough * Z95 * np.sqrt(chance)
            figures[:, layer, group] = (value, value - half, value + half, null, null - null_half, null + null_half)
            keys[layer, group] = len(part)
            frequencies[layer, group] = count[part[0]], count[part[-1]]
    value, low, high, null, null_low, null_high = np.clip(figures, 0, 1)
    return Consistency(
        groups=groups,
        value=value,
        low=low,
        high=high,
        null=null,
        null_low=null_low,
        null_high=null_high,
        keys=keys,
        frequencies=frequencies,
        left_out=tuple(left_out),
        untestable=tuple(reasons),
    )


def largest_shares(
    count: np.ndarray, marginal: np.ndarray, draws: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance float64 [n] of the commonest expert's share, if counts int64 [n] draw from shares [E].

    Args:
        draws: int64 [n], simulations of each count.
    """
    made = [rng.multinomial(n, marginal, size).max(axis=-1) / n for n, size in zip(count, draws, strict=True)]
    return np.array([one.mean() for one in made]), np.array([one.var() for one in made])

"""A per-layer policy under a loss budget: which layers may do with how few experts.

Letters: L layers, E experts, K experts per token.

Effects of layers are nearly additive, so each (layer, rule) is measured alone, each layer's rules are reduced to their
lower convex hull (saved experts against added loss), and the steps of all hulls are taken in order of loss per saved
expert. How far to go is not predicted but measured: the longest prefix whose loss on the tuning documents stays within
the budget, found by bisection.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np
from tqdm import tqdm

from analysis.quality import Scores, plain_runner, score, var_runner
from analysis.text.encoding import Encoded
from models import Model
from varjax.answers import Answers, Rule
from varjax.config import LayerPolicy, VARConfig
from varjax.keys import ANY
from varjax.model import VARModel
from varjax.stats import RoutingStats
from varjax.step import summary
from varjax.table import build


@dataclasses.dataclass(frozen=True)
class Measured:
    """One policy on the tuning documents."""

    rules: tuple[Rule, ...]  # at most one per layer; the other layers are left open
    degradation: float  # relative change of perplexity per token
    experts_per_token: float  # mean over layers


@dataclasses.dataclass(frozen=True)
class Search:
    """What the search measured, and the config that it chose."""

    config: VARConfig
    chosen: Measured
    single: tuple[Measured, ...]  # each rule alone
    path: tuple[Measured, ...]  # prefixes that were measured, by falling number of experts


def candidate_rules(
    layers: Iterable[int], top_k: int, gate_ratios: Sequence[float] = (0.5, 0.65, 0.8)
) -> tuple[Rule, ...]:
    """The rules whose residuals are worth collecting: 0 to K - 1 experts kept, and all K under each gate ratio."""
    kept = [(count, 0.0) for count in range(top_k)]
    return tuple(Rule(layer, *rule) for layer in layers for rule in kept + [(top_k, r) for r in gate_ratios])


def search(
    model: Model,
    stats: RoutingStats,
    answers: Answers,
    documents: Sequence[Encoded],
    base: VARConfig,
    *,
    budget: float | None = None,
    frequency_threshold: int = 5,
    batch_size: int = 8,
    max_length: int = 256,
    progress: bool = True,
) -> Search:
    """The policy with the fewest experts whose perplexity on `documents` rises by at most `budget`.

    Args:
        stats, answers: from documents other than these.
        documents: the tuning documents; whoever reports the result must do so on others.
        base: the config whose layer policies are to be replaced; its cached tier is left out of the search.
        budget: relative change of perplexity; None: 90 % of `base.max_quality_degradation`, since the tuning
            documents flatter what was chosen on them.
        frequency_threshold: occurrences that a key needs.
        batch_size, max_length: as in `analysis.quality.score`.
    """
    budget = 0.9 * base.max_quality_degradation if budget is None else budget
    scoring = partial(score, documents=documents, batch_size=batch_size, max_length=max_length, progress=False)
    plain, _ = scoring(plain_runner(model), None)
    bar = tqdm(unit="policy", disable=not progress, desc="policies")
    orders = tuple(np.unique((answers.keys != ANY).sum(axis=1)).tolist())  # those that have residuals

    def config_of(rules: Sequence[Rule]) -> VARConfig:
        entropy = math.log(model.config.num_experts) * 1.001  # any key may answer: the residual carries the rest
        policies = {
            rule.layer: LayerPolicy(
                kept=rule.kept,
                gate_ratio=rule.gate_ratio or None,
                orders=orders,
                frequency_threshold=frequency_threshold,
                entropy_threshold=entropy,
            )
            for rule in rules
        }
        return dataclasses.replace(base, default=None, layers=policies, cache_size=0)

    def measure(rules: Sequence[Rule]) -> Measured:
        config = config_of(rules)
        table = build(stats, config, model.config.top_k, answers, keep_shapes=True)
        var_model = VARModel(model, config, table=table)
        scores, state = scoring(var_runner(var_model), var_model.init())
        bar.update()
        experts = summary(state.counters, model.config.top_k)["experts_per_token"]
        return Measured(tuple(rules), _degradation(plain, scores), experts)

    single = [measure([rule]) for rule in answers.rules]
    steps = _steps(single, model.config.num_layers, model.config.top_k)
    path = {0: Measured((), 0.0, float(model.config.top_k))}
    low, high = 0, len(steps)  # prefixes: `low` is within the budget, everything above `high` is not
    while low < high:
        middle = (low + high + 1) // 2
        path[middle] = measure(_prefix(steps, middle))
        if path[middle].degradation <= budget:
            low = middle
        else:
            high = middle - 1
    bar.close()
    chosen = path[low]
    ordered = tuple(sorted(path.values(), key=lambda point: -point.experts_per_token))
    return Search(config_of(chosen.rules), chosen, tuple(single), ordered)


def _degradation(plain: Scores, other: Scores) -> float:
    return math.expm1(other.nll_per_token - plain.nll_per_token)


def _steps(single: Sequence[Measured], num_layers: int, top_k: int) -> list[Rule]:
    """The hulls' steps in order of added loss per saved expert; a step replaces its layer's rule by the next one."""
    steps = []
    for layer in range(num_layers):
        here = [point for point in single if point.rules[0].layer == layer]
        saved, loss = 0.0, 0.0
        while True:
            ahead = [p for p in here if top_k - p.experts_per_token > saved + 1e-9]
            if not ahead:
                break
            slopes = [((p.degradation - loss) / (top_k - p.experts_per_token - saved), p) for p in ahead]
            slope, best = min(slopes, key=lambda pair: pair[0])
            steps.append((slope, best.rules[0]))
            saved, loss = top_k - best.experts_per_token, best.degradation
    return [rule for _, rule in sorted(steps, key=lambda pair: pair[0])]


def _prefix(steps: Sequence[Rule], length: int) -> list[Rule]:
    """The rules in force after the first `length` steps, by layer."""
    return [rule for _, rule in sorted({rule.layer: rule for rule in steps[:length]}.items())]

"""A per-layer policy under a loss budget: how far each layer may trust the table's answers.

Letters: L layers, E experts, K experts per token.

One number says what a layer does: its tolerance. An expert runs where its gate weight times the deviation of its answer
reaches the tolerance, which is the error that its absence would make; so the least error is spent for every expert
saved, token by token, and m = 0, 1, ... K experts run as it comes. The layers differ in what an error costs. Effects of
layers are nearly additive, so each layer is measured alone at several tolerances, its measurements are reduced to their
lower convex hull (saved experts against added loss), and the steps of all hulls are taken in order of loss per saved
expert. How far to go is not predicted but measured: the longest prefix whose loss on the tuning documents stays within
the budget is found by bisection, and then the largest factor on all of its tolerances.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from analysis.quality import Scores, plain_runner, score, var_runner
from analysis.text.encoding import Encoded
from models import Model
from varjax.answers import Answers
from varjax.config import LayerPolicy, VARConfig
from varjax.model import VARModel
from varjax.shrinkage import shrunk
from varjax.stats import RoutingStats
from varjax.step import summary
from varjax.table import build

QUANTILES = (0.2, 0.4, 0.6, 0.8, 0.95, 1.0)  # of an answer's error: where tolerances are tried
FACTOR, FINEST = 1.3, 0.02  # the first factor tried on all tolerances; factors nearer to 1 than this are not


class Choice(NamedTuple):
    """What one layer does."""

    layer: int
    tolerance: float


@dataclasses.dataclass(frozen=True)
class Measured:
    """One policy on the tuning documents."""

    choices: tuple[Choice, ...]  # at most one per layer; the other layers are left open
    degradation: float  # relative change of perplexity per token
    experts_per_token: float  # mean over layers


@dataclasses.dataclass(frozen=True)
class Search:
    """What the search measured, and the config that it chose."""

    config: VARConfig
    chosen: Measured
    single: tuple[Measured, ...]  # each choice alone
    path: tuple[Measured, ...]  # prefixes that were measured, by falling number of experts


def candidate_tolerances(answers: Answers, layer: int, shrinkage: float) -> tuple[float, ...]:
    """Ascending: quantiles of an answer's deviation times the weight that its expert usually has; the last drops all.

    Args:
        layer, shrinkage: as in `varjax.shrinkage.shrunk`.
    """
    a = answers.layers.index(layer)
    count, mass = answers.count[a], answers.mass[a]
    deviation = shrunk(answers, layer, shrinkage).deviation
    error = np.sqrt(mass / np.maximum(count, 1)) * deviation
    order = np.argsort(error)
    reached = np.cumsum(count[order]) / max(count.sum(), 1)
    found = [float(error[order][np.searchsorted(reached, q).clip(0, len(order) - 1)]) for q in QUANTILES[:-1]]
    return tuple(sorted({tolerance for tolerance in found if tolerance > 0} | {2.0 * float(deviation.max()) or 1.0}))


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
    orders = tuple(order for order in answers.orders if order > 0)

    def config_of(choices: Sequence[Choice]) -> VARConfig:
        entropy = math.log(model.config.num_experts) * 1.001  # any key may answer: the deviation says how well
        policies = {
            choice.layer: LayerPolicy(
                kept=None,
                tolerance=choice.tolerance,
                orders=orders,
                frequency_threshold=frequency_threshold,
                entropy_threshold=entropy,
            )
            for choice in choices
        }
        return dataclasses.replace(base, default=None, layers=policies, cache_size=0)

    everywhere = config_of([Choice(layer, 1.0) for layer in answers.layers])
    table = build(stats, everywhere, model.config.top_k, answers, keep_shapes=True)

    def measure(choices: Sequence[Choice]) -> Measured:
        tolerances = np.zeros(model.config.num_layers, np.float32)
        for choice in choices:
            tolerances[choice.layer] = choice.tolerance
        rules = dataclasses.replace(table.rules, tolerance=jnp.asarray(tolerances))
        var_model = VARModel(model, everywhere, table=dataclasses.replace(table, rules=rules))
        scores, state = scoring(var_runner(var_model), var_model.init())
        bar.update()
        experts = summary(state.counters, model.config.top_k)["experts_per_token"]
        return Measured(tuple(choices), _degradation(plain, scores), experts)

    single = [
        measure([Choice(layer, tolerance)])
        for layer in answers.layers
        for tolerance in candidate_tolerances(answers, layer, base.residual_shrinkage)
    ]
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
    chosen, measured = path[low], list(path.values())
    factor, step = 1.0, FACTOR
    while chosen.choices and step - 1 > FINEST:
        wider = measure([choice._replace(tolerance=factor * step * choice.tolerance) for choice in path[low].choices])
        measured.append(wider)
        if wider.degradation <= budget:
            chosen, factor = wider, factor * step
        step = math.sqrt(step)
    bar.close()
    ordered = tuple(sorted(measured, key=lambda point: -point.experts_per_token))
    return Search(config_of(chosen.choices), chosen, tuple(single), ordered)


def _degradation(plain: Scores, other: Scores) -> float:
    return math.expm1(other.nll_per_token - plain.nll_per_token)


def _steps(single: Sequence[Measured], num_layers: int, top_k: int) -> list[Choice]:
    """The hulls' steps in order of added loss per saved expert; a step replaces its layer's choice by the next one."""
    steps = []
    for layer in range(num_layers):
        here = [point for point in single if point.choices[0].layer == layer]
        saved, loss = 0.0, 0.0
        while True:
            ahead = [p for p in here if top_k - p.experts_per_token > saved + 1e-9]
            if not ahead:
                break
            slopes = [((p.degradation - loss) / (top_k - p.experts_per_token - saved), p) for p in ahead]
            slope, best = min(slopes, key=lambda pair: pair[0])
            steps.append((slope, best.choices[0]))
            saved, loss = top_k - best.experts_per_token, best.degradation
    return [choice for _, choice in sorted(steps, key=lambda pair: pair[0])]


def _prefix(steps: Sequence[Choice], length: int) -> list[Choice]:
    """The choices in force after the first `length` steps, by layer."""
    return [choice for _, choice in sorted({choice.layer: choice for choice in steps[:length]}.items())]

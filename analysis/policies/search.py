"""A per-layer policy under a loss budget: how far each layer may trust the table's answers.

How far to go up the ladder of policies (`analysis.policies.ladder`) is not predicted but measured: the longest run of
its steps whose loss on the tuning documents stays within the budget is found by bisection, and then the largest factor
on all of their tolerances.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial

import jax.numpy as jnp
import numpy as np

from analysis.criteria import MAX_DEGRADATION
from analysis.evaluate.quality import Scores, plain_runner, score, var_runner
from analysis.policies.ladder import Choice, Measured, climb
from analysis.text.encoding import Encoded
from models import Model
from varjax.answers import Answers
from varjax.config import LayerPolicy, VARConfig
from varjax.model import VARModel, build_for
from varjax.progress import progress_bar
from varjax.stats import RoutingStats
from varjax.step import summary

FREQUENT = 5  # occurrences that a key needs before its answers are asked
FACTOR, FINEST = 1.3, 0.02  # the first factor tried on all tolerances; factors nearer to 1 than this are not


@dataclasses.dataclass(frozen=True)
class Search:
    """What the search measured, and the config that it chose."""

    config: VARConfig
    chosen: Measured
    single: tuple[Measured, ...]  # each choice alone
    path: tuple[Measured, ...]  # prefixes that were measured, by falling number of experts


def search(
    model: Model,
    stats: RoutingStats,
    answers: Answers,
    documents: Sequence[Encoded],
    base: VARConfig,
    *,
    budget: float | None = None,
    frequency_threshold: int = FREQUENT,
    batch_size: int = 8,
    max_length: int = 256,
    progress: bool = True,
) -> Search:
    """The policy with the fewest experts whose perplexity on `documents` rises by at most `budget`.

    Args:
        stats: from documents other than these.
        answers: likewise.
        documents: the tuning documents; whoever reports the result must do so on others.
        base: the config whose layer policies are to be replaced; its cached tier is left out of the search.
        budget: relative change of perplexity; None: 90 % of the published limit, since the tuning
            documents flatter what was chosen on them.
        frequency_threshold: occurrences that a key needs.
        batch_size: as in `analysis.evaluate.quality.score`.
        max_length: likewise.
    """
    budget = 0.9 * MAX_DEGRADATION if budget is None else budget
    scoring = partial(score, documents=documents, batch_size=batch_size, max_length=max_length, progress=False)
    plain, _ = scoring(plain_runner(model), None)
    bar = progress_bar(unit=" policies", show=progress, desc="search")
    orders = tuple(order for order in answers.ngram_orders if order > 0)

    def config_of(choices: Sequence[Choice]) -> VARConfig:
        return dataclasses.replace(
            base,
            default=None,
            layers=policies(choices, model.config.num_experts, orders, frequency_threshold),
            cache_size=0,
        )

    everywhere = config_of([Choice(layer, 1.0) for layer in answers.layers])
    table = build_for(model, everywhere, stats, answers, keep_shapes=True)

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

    ladder = climb(measure, answers, base.answer_shrinkage, model.config.top_k)
    path = {0: Measured((), 0.0, float(model.config.top_k))}
    low, high = 0, len(ladder.steps)  # prefixes: `low` is within the budget, everything above `high` is not
    while low < high:
        middle = (low + high + 1) // 2
        path[middle] = measure(ladder.after(middle))
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
    return Search(config_of(chosen.choices), chosen, ladder.single, ordered)


def policies(
    choices: Sequence[Choice], num_experts: int, orders: tuple[int, ...], frequency_threshold: int = FREQUENT
) -> dict[int, LayerPolicy]:
    """By layer: any key of the orders that was seen often enough may answer; the deviation says how well it does."""
    return {
        choice.layer: LayerPolicy(
            experts_kept=None,
            tolerance=choice.tolerance,
            ngram_orders=orders,
            frequency_threshold=frequency_threshold,
            entropy_threshold=math.log(num_experts) * 1.001,
        )
        for choice in choices
    }


def _degradation(plain: Scores, other: Scores) -> float:
    return math.expm1(other.nll_per_token - plain.nll_per_token)

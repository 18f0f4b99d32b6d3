"""A per-layer policy under a loss budget: how far each layer may trust the table's answers.

Letters: L layers, E experts, K experts per token.

One number says what a layer does: its tolerance. An expert runs where its gate weight times the deviation of its
answer, which is the error that its absence would cause, reaches the tolerance. So the least error is spent for every
expert saved, token by token, and 0 to K experts run. The layers differ in what an error costs. Effects of layers are
nearly additive, so each layer is measured alone at several tolerances, its measurements are reduced to their lower
convex hull (saved experts against added loss), and the steps of all hulls are taken in order of loss per saved expert:
the ladder.

How far to climb is not predicted but measured: bisection finds the longest run of steps whose loss on the tuning
documents stays within the budget, and then the largest factor on all of their tolerances.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from analysis.criteria import MAX_DEGRADATION
from analysis.evaluate.losses import plain_runner, score, var_runner
from analysis.evaluate.points import Subject
from varjax.answers import Answers
from varjax.config import LayerPolicy, VARConfig
from varjax.model import VARModel
from varjax.progress import progress_bar
from varjax.shrinkage import shrunk
from varjax.step import summary

QUANTILES = (0.2, 0.4, 0.6, 0.8, 0.95, 1.0)  # of an answer's error: the tolerances to try
FREQUENT = 5  # occurrences that a key needs before its answers are used
_FACTOR, _FINEST = 1.3, 0.02  # the first factor tried on all tolerances; factors nearer to 1 than this are not tried


class Choice(NamedTuple):
    """What one layer does."""

    layer: int
    tolerance: float


@dataclasses.dataclass(frozen=True)
class Measured:
    """One policy on the tuning documents."""

    choices: tuple[Choice, ...]  # at most one per layer; the other layers are left open
    degradation: float  # relative change in perplexity per token
    experts_per_token: float  # mean over layers


class Step(NamedTuple):
    """One layer's move to its next choice."""

    choice: Choice
    loss: float  # added relative perplexity, measured in this layer alone


@dataclasses.dataclass(frozen=True)
class Ladder:
    """The measurements of single layers, and the steps that follow from them, the cheapest first."""

    single: tuple[Measured, ...]  # each choice alone
    steps: tuple[Step, ...]

    def after(self, length: int) -> list[Choice]:
        """The choices in force after the first `length` steps, by layer; a step replaces its layer's choice."""
        return _in_force([step.choice for step in self.steps[:length]])

    def within(self, budget: float) -> list[Choice]:
        """Find the choices whose losses, added up, reach a budget.

        The step that would exceed it is taken in part: its layer's tolerance moves by the share of its loss that is
        left. Measure what the budget really costs: losses add up only nearly.

        Args:
            budget: relative change in perplexity.

        Returns:
            The choices by layer.
        """
        taken: list[Choice] = []
        spent = 0.0
        for choice, loss in self.steps:
            if spent + loss > budget:
                before = {one.layer: one.tolerance for one in taken}.get(choice.layer, 0.0)
                share = max(budget - spent, 0.0) / loss
                part = choice._replace(tolerance=before + share * (choice.tolerance - before))
                return _in_force([*taken, part] if part.tolerance > 0 else taken)
            taken.append(choice)
            spent += loss
        return _in_force(taken)


@dataclasses.dataclass(frozen=True)
class Search:
    """What the search measured, and the config that it chose."""

    config: VARConfig
    chosen: Measured
    single: tuple[Measured, ...]  # each choice alone
    path: tuple[Measured, ...]  # several layers together, by falling number of experts


def search(subject: Subject, *, budget: float | None = None, frequency_threshold: int = FREQUENT) -> Search:
    """Find the policy with the fewest experts whose perplexity rises by at most `budget`.

    Args:
        subject: the tuning documents, from which the table was not built and on which the result must not be reported;
            the layer policies of its config are replaced, and its cached tier is left out.
        budget: relative change in perplexity; None: 90% of the published limit, because the tuning documents flatter
            what was chosen on them.
        frequency_threshold: occurrences that a key needs.

    Returns:
        The measurements and the chosen config.
    """
    budget = 0.9 * MAX_DEGRADATION if budget is None else budget
    model, answers, base = subject.model, subject.answers, subject.config
    plain, _ = score(plain_runner(model), None, subject.documents, progress=False, **subject.windows)
    bar = progress_bar(unit=" policies", show=subject.progress, desc="search")
    orders = answers.useful_orders

    def config_of(choices: Sequence[Choice]) -> VARConfig:
        layers = policies(choices, model.config.num_experts, orders, frequency_threshold)
        return dataclasses.replace(base, default=None, layers=layers, cache_size=0)

    everywhere = config_of([Choice(layer, 1.0) for layer in answers.layers])
    table = subject.build(everywhere)

    def measure(choices: Sequence[Choice]) -> Measured:
        tolerances = np.zeros(model.config.num_layers, np.float32)
        for choice in choices:
            tolerances[choice.layer] = choice.tolerance
        rules = dataclasses.replace(table.rules, tolerance=jnp.asarray(tolerances))
        var_model = VARModel(model, everywhere, table=dataclasses.replace(table, rules=rules))
        start = var_model.init()
        scores, state = score(var_runner(var_model), start, subject.documents, progress=False, **subject.windows)
        bar.update()
        experts = summary(state.counters, model.config.top_k)["experts_per_token"]
        return Measured(tuple(choices), math.expm1(scores.nll_per_token - plain.nll_per_token), experts)

    ladder = climb(measure, answers, base.answer_shrinkage, model.config.top_k)
    path = {0: Measured((), 0.0, float(model.config.top_k))}
    low, high = 0, len(ladder.steps)  # lengths: `low` is within the budget, everything above `high` is not
    while low < high:
        middle = (low + high + 1) // 2
        path[middle] = measure(ladder.after(middle))
        if path[middle].degradation <= budget:
            low = middle
        else:
            high = middle - 1
    chosen, tried = path[low], list(path.values())
    factor, step = 1.0, _FACTOR
    while chosen.choices and step - 1 > _FINEST:
        wider = measure([choice._replace(tolerance=factor * step * choice.tolerance) for choice in path[low].choices])
        tried.append(wider)
        if wider.degradation <= budget:
            chosen, factor = wider, factor * step
        step = math.sqrt(step)
    bar.close()
    ordered = tuple(sorted(tried, key=lambda point: -point.experts_per_token))
    return Search(config_of(chosen.choices), chosen, ladder.single, ordered)


def policies(
    choices: Sequence[Choice], num_experts: int, orders: tuple[int, ...], frequency_threshold: int = FREQUENT
) -> dict[int, LayerPolicy]:
    """Make layer policies from choices: any key that was seen often enough may answer, within the tolerance.

    Args:
        choices: at most one per layer.
        num_experts: E.
        orders: of the keys that may answer.
        frequency_threshold: occurrences that a key needs.

    Returns:
        The policies by layer.
    """
    return {
        choice.layer: LayerPolicy(
            experts_kept=None,
            tolerance=choice.tolerance,
            ngram_orders=orders,
            frequency_threshold=frequency_threshold,
            entropy_threshold=max(math.log(num_experts), 1.0) * 1.001,  # no key is above: the deviation decides
        )
        for choice in choices
    }


def climb(measure: Callable[[Sequence[Choice]], Measured], answers: Answers, shrinkage: float, top_k: int) -> Ladder:
    """Measure every layer alone at its candidate tolerances and order the steps of all layers.

    Args:
        measure: measures a policy on the tuning documents.
        answers: the answers of the table.
        shrinkage: as in `varjax.shrinkage.shrunk`.
        top_k: K of the model.

    Returns:
        The ladder.
    """
    single = [
        measure([Choice(layer, tolerance)])
        for layer in answers.layers
        for tolerance in _candidate_tolerances(answers, layer, shrinkage)
    ]
    return Ladder(tuple(single), tuple(_hull_steps(single, top_k)))


def _candidate_tolerances(answers: Answers, layer: int, shrinkage: float) -> tuple[float, ...]:
    """Ascending: quantiles of an answer's deviation times its expert's usual weight; the last drops all that it can."""
    a = answers.layers.index(layer)
    count, mass = answers.count[a], answers.mass[a]
    deviation = shrunk(answers, layer, shrinkage).deviation
    if answers.maps is not None:
        deviation = deviation * np.sqrt(answers.maps.unexplained[a][answers.experts(layer)])
    error = np.sqrt(mass / np.maximum(count, 1)) * deviation
    order = np.argsort(error)
    reached = np.cumsum(count[order]) / max(count.sum(), 1)
    found = [float(error[order][np.searchsorted(reached, q).clip(0, len(order) - 1)]) for q in QUANTILES[:-1]]
    return tuple(sorted({tolerance for tolerance in found if tolerance > 0} | {2.0 * float(deviation.max()) or 1.0}))


def _hull_steps(single: Sequence[Measured], top_k: int) -> list[Step]:
    """The steps along every layer's lower convex hull, in order of added loss per saved expert."""
    priced = []
    for layer in sorted({point.choices[0].layer for point in single}):
        here = [point for point in single if point.choices[0].layer == layer]
        saved, loss = 0.0, 0.0
        while ahead := [p for p in here if top_k - p.experts_per_token > saved + 1e-9]:
            slopes = [((p.degradation - loss) / (top_k - p.experts_per_token - saved), p) for p in ahead]
            slope, best = min(slopes, key=lambda pair: pair[0])
            priced.append((slope, Step(best.choices[0], best.degradation - loss)))
            saved, loss = top_k - best.experts_per_token, best.degradation
    return [step for _, step in sorted(priced, key=lambda pair: pair[0])]


def _in_force(choices: Sequence[Choice]) -> list[Choice]:
    """The last choice of each layer, by layer."""
    return [choice for _, choice in sorted({choice.layer: choice for choice in choices}.items())]

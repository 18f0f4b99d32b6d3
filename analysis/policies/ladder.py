"""The ladder of policies that a loss budget climbs: which layer should trust the table's answers a little more next.

Letters: L layers, E experts, K experts per token.

One number says what a layer does: its tolerance. An expert runs where its gate weight times the deviation of its answer
reaches the tolerance, which is the error that its absence would make; so the least error is spent for every expert
saved, token by token, and m = 0, 1, ... K experts run as it comes. The layers differ in what an error costs. Effects of
layers are nearly additive, so each layer is measured alone at several tolerances, its measurements are reduced to their
lower convex hull (saved experts against added loss), and the steps of all hulls are taken in order of loss per saved
expert.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from varjax.answers import Answers
from varjax.shrinkage import shrunk

QUANTILES = (0.2, 0.4, 0.6, 0.8, 0.95, 1.0)  # of an answer's error: where tolerances are tried


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


class Step(NamedTuple):
    """One layer's move to its next choice."""

    choice: Choice
    loss: float  # added relative perplexity, measured in this layer alone


@dataclasses.dataclass(frozen=True)
class Ladder:
    """What was measured, and the steps from it, the cheapest first."""

    single: tuple[Measured, ...]  # each choice alone
    steps: tuple[Step, ...]

    def after(self, length: int) -> list[Choice]:
        """The choices in force after the first `length` steps, by layer; a step replaces its layer's choice."""
        return _in_force([step.choice for step in self.steps[:length]])

    def within(self, budget: float) -> list[Choice]:
        """The choices in force where the steps' losses, added up, reach a budget, by layer.

        The step that would pass it is taken in part: its layer's tolerance moves by the share of its loss that is left.
        What the budget really costs is to be measured: losses only nearly add up.

        Args:
            budget: relative change of perplexity.
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


def climb(measure: Callable[[Sequence[Choice]], Measured], answers: Answers, shrinkage: float, top_k: int) -> Ladder:
    """Measure every layer alone at its candidate tolerances and put the steps of all layers in order.

    Args:
        measure: one policy on the tuning documents.
        shrinkage: as in `varjax.shrinkage.shrunk`.
        top_k: experts per token in the model.
    """
    single = [
        measure([Choice(layer, tolerance)])
        for layer in answers.layers
        for tolerance in candidate_tolerances(answers, layer, shrinkage)
    ]
    return Ladder(tuple(single), tuple(hull_steps(single, top_k)))


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


def hull_steps(single: Sequence[Measured], top_k: int) -> list[Step]:
    """The hulls' steps in order of added loss per saved expert.

    Args:
        single: policies of one choice each.
    """
    priced = []
    for layer in sorted({point.choices[0].layer for point in single}):
        here = [point for point in single if point.choices[0].layer == layer]
        saved, loss = 0.0, 0.0
        while True:
            ahead = [p for p in here if top_k - p.experts_per_token > saved + 1e-9]
            if not ahead:
                break
            slopes = [((p.degradation - loss) / (top_k - p.experts_per_token - saved), p) for p in ahead]
            slope, best = min(slopes, key=lambda pair: pair[0])
            priced.append((slope, Step(best.choices[0], best.degradation - loss)))
            saved, loss = top_k - best.experts_per_token, best.degradation
    return [step for _, step in sorted(priced, key=lambda pair: pair[0])]


def _in_force(choices: Sequence[Choice]) -> list[Choice]:
    """The last choice of each layer, by layer."""
    return [choice for _, choice in sorted({choice.layer: choice for choice in choices}.items())]

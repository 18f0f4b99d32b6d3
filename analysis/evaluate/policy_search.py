"""A per-layer policy under a loss budget: how far each layer may trust the table's answers.

Letters: L layers, E experts, K experts per token.

One number says what a layer does: its tolerance. An expert runs where the expected error of its absence (its gate
weight times that of its answer) reaches the tolerance. So the least error is spent for every expert saved, token by
token, and 0 to K experts run. The layers differ in what an error costs; one backward pass measures that
(`analysis.evaluate.prices`), and then a single price for all layers determines every tolerance.

How high the price may be is not predicted but measured: interpolation finds the highest one at which the loss on the
tuning documents stays within the budget.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial

from analysis.criteria import MAX_DEGRADATION
from analysis.evaluate.points import Subject, score_point
from analysis.evaluate.prices import Choice, Prices, measure_prices
from varjax.config import LayerPolicy, VARConfig
from varjax.errors import InputError
from varjax.progress import progress_bar
from varjax.table import with_policies

FREQUENT = 5  # occurrences that a key needs before its answers are used
_FINEST = 1.05  # ratio of two prices between which nothing is tried
_NEAR = 0.97  # share of the budget that is near enough
_STRIDE = 8.0  # the largest ratio of two predicted losses that are tried one after the other
_MOST = 14  # prices that are tried


@dataclasses.dataclass(frozen=True)
class Measured:
    """One policy on the tuning documents."""

    choices: tuple[Choice, ...]  # at most one per layer; the other layers are left open
    degradation: float  # relative change in perplexity per token
    experts_per_token: float  # mean over layers


@dataclasses.dataclass(frozen=True)
class Search:
    """What the search measured, and the config that it chose."""

    config: VARConfig
    chosen: Measured
    prices: Prices
    path: tuple[Measured, ...]  # the policies that were tried, by falling number of experts


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

    Raises:
        InputError: a loss is not finite.
    """
    budget = 0.9 * MAX_DEGRADATION if budget is None else budget
    plain, most = score_point(subject), float(subject.model.config.top_k)
    config_of = partial(config_with, subject, frequency_threshold=frequency_threshold)
    everywhere = config_of([Choice(layer, 1.0) for layer in subject.answers.layers])
    table = subject.build(everywhere)
    prices = measure_prices(subject, everywhere, table)
    bar = progress_bar(unit=" policies", show=subject.progress, desc="search")

    def measured(choices: Sequence[Choice]) -> Measured:
        config = config_of(choices)
        found = score_point(subject, config, with_policies(table, config, subject.stats, subject.answers))
        bar.update()
        change = math.expm1(found.nll_per_token - plain.nll_per_token)
        if not math.isfinite(change):
            raise InputError(
                f"the perplexity is {plain.perplexity} plain and {found.perplexity} under VAR: no policy can be found "
                "on losses that are not finite"
            )
        return Measured(tuple(choices), change, found.experts_per_token)

    chosen = Measured((), 0.0, most)
    tried = [chosen]
    # The nearest prices on both sides of the budget, and their losses.
    within, beyond = (0.0, 0.0), (math.inf, math.inf)
    price = prices.at(budget) or prices.highest / 1000
    while budget >= 0 and price > 0 and len(tried) <= _MOST and beyond[0] > within[0] * _FINEST:
        tried.append(measured(prices.choices(price)))
        loss = tried[-1].degradation
        if loss <= budget:
            within, chosen = (price, loss), tried[-1]
            if price >= prices.highest or loss >= _NEAR * budget:
                break
        else:
            beyond = price, loss
        price = _next_price(prices, within, beyond, price, loss, budget)
    bar.close()
    ordered = tuple(sorted(tried, key=lambda point: -point.experts_per_token))
    return Search(config_of(chosen.choices), chosen, prices, ordered)


def _next_price(
    prices: Prices, within: tuple[float, float], beyond: tuple[float, float], price: float, loss: float, budget: float
) -> float:
    """The price to try after `price`, whose loss is known."""
    aim = budget * (1 + _NEAR) / 2
    if within[0] > 0 and beyond[0] < math.inf:  # losses grow about as a power of the price
        known = 0 < within[1] < aim
        share = math.log(aim / within[1]) / math.log(beyond[1] / within[1]) if known else 0.5
        return within[0] * (beyond[0] / within[0]) ** min(max(share, 0.1), 0.9)
    wrong = aim / loss if loss > 0 else math.inf  # by which factor the prediction was
    found = prices.at(prices.expected(price) * min(max(wrong, 1 / _STRIDE), _STRIDE))
    return max(found, 1.1 * price) if loss <= budget else min(found, 0.9 * price)


def config_with(subject: Subject, choices: Sequence[Choice], frequency_threshold: int = FREQUENT) -> VARConfig:
    """Make a config of choices.

    Args:
        subject: its config has the other settings; the cached tier is left out.
        choices: at most one per layer; the other layers are left to the router.
        frequency_threshold: occurrences that a key needs.

    Returns:
        The config.
    """
    orders, experts = subject.answers.useful_orders, subject.model.config.num_experts
    layers = policies(choices, experts, orders, frequency_threshold)
    return dataclasses.replace(subject.config, default=None, layers=layers, cache_size=0)


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

"""The search space: which settings of VAR are searched, in which ranges, and the config that a point stands for.

A space is a tuple of `Parameter`s. Most of them are fields of `VARConfig` under their own names. Three are not:

- `loss_budget`: all layers' tolerances at once, by the price of an error (`analysis.evaluate.prices`). The budget is
  the expected divergence from the plain model; the real loss of a point is measured.
- `longest_context`: layers use the context orders from 1 to this one.
- `cached_tier`: whether there is a cached tier. Without one its settings (`CACHED`) have no effect; they are drawn
  nevertheless, because samplers model a space of fixed shape better.

To search another field of `VARConfig`, add a `Parameter` with its name, except for those in `OF_THE_TABLE`: they are
fixed in the one table that all points of a search share.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import optuna

from analysis.evaluate.prices import Prices
from varjax.config import LayerPolicy, VARConfig
from varjax.errors import InputError

Value = int | float | bool
Values = Mapping[str, Value]

OF_THE_TABLE = ("answer_shrinkage", "answers_per_layer", "answer_dtype")


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One setting and its range, both ends included; a "bool" has no range.

    Raises:
        InputError: the range is empty, not of the kind, or not above 0 on a logarithmic scale; or the name is in
            `OF_THE_TABLE`.
    """

    name: str
    kind: Literal["int", "float", "bool"]
    low: float = 0
    high: float = 1
    log: bool = False  # searched on a logarithmic scale
    unit: str = ""

    def __post_init__(self) -> None:
        span = f"{self.name}={self.low:g}:{self.high:g}"
        if self.name in OF_THE_TABLE:
            raise InputError(f"{self.name} is fixed in the table that all points share; set it in the config")
        if self.kind == "int" and not (float(self.low).is_integer() and float(self.high).is_integer()):
            raise InputError(f"{span}: expected whole numbers")
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise InputError(f"{span}: expected a low end below the high one")
        if self.log and self.low <= 0:
            raise InputError(f"{span}: searched on a logarithmic scale; expected a low end above 0")

    @property
    def distribution(self) -> optuna.distributions.BaseDistribution:
        """The range as Optuna describes it."""
        if self.kind == "bool":
            return optuna.distributions.CategoricalDistribution([False, True])
        if self.kind == "int":
            return optuna.distributions.IntDistribution(int(self.low), int(self.high), log=self.log)
        return optuna.distributions.FloatDistribution(self.low, self.high, log=self.log)


Space = tuple[Parameter, ...]

THRESHOLDS: Space = (
    Parameter("frequency_threshold", "int", 10, 200, log=True, unit="occurrences"),
    Parameter("entropy_threshold", "float", 0.1, 1.5, unit="nats"),
    Parameter("confidence_threshold", "float", 0.5, 0.95),
    Parameter("cache_size", "int", 100, 5000, log=True, unit="contexts"),
    Parameter("cache_ttl_seconds", "float", 10, 300, log=True, unit="seconds"),
    Parameter("context_window_size", "int", 2, 8, unit="ids"),
)
PUBLISHED_FOR = 8  # experts of the model for which the thresholds' ranges were published
CACHED_TIER = "cached_tier"
CACHED = ("confidence_threshold", "cache_size", "cache_ttl_seconds", "context_window_size")  # of the cached tier


def search_space(
    orders: Sequence[int],
    num_experts: int = PUBLISHED_FOR,
    *,
    ranges: Sequence[str] = (),
    names: Sequence[str] | None = None,
    span: float = math.inf,
) -> tuple[Space, dict[str, str]]:
    """The six thresholds in their published ranges, the loss budget, the cached tier and the context orders.

    Args:
        orders: context orders that a policy may use; order 0 is among them where answers are affine.
        num_experts: number of experts E. The entropy of a gate is at most ln E, so its range is scaled by
            ln E / ln 8. With one expert, it is always 0, and its threshold is not searched.
        ranges: ranges to replace, as "name=low:high".
        names: the parameters to search; None: all.
        span: the greatest age of a cached decision on the documents of the search, seconds
            (`analysis.evaluate.losses.Caching.span`).

    Returns:
        The space, and by name why a parameter is not searched: it cannot change anything on these documents.

    Raises:
        InputError: a name is unknown, a range is malformed, or nothing is left to search.
    """
    stretch = math.log(max(num_experts, 2)) / math.log(PUBLISHED_FOR)
    thresholds = [
        dataclasses.replace(one, low=stretch * one.low, high=stretch * one.high) if one.unit == "nats" else one
        for one in THRESHOLDS
    ]
    budget = Parameter("loss_budget", "float", 0.001, 0.03, log=True, unit="nats of expected divergence")
    longest = [Parameter("longest_context", "int", min(orders), max(orders), unit="ids")] if len(orders) > 1 else []
    space = {one.name: one for one in (budget, *thresholds, *longest, Parameter(CACHED_TIER, "bool"))}
    for text in ranges:
        old = _named(space, text.partition("=")[0])
        space[old.name] = _with_range(old, text)
    wanted = {_named(space, name).name for name in (space if names is None else names)}
    unsearched = {name: why for name, why in _without_effect(space, num_experts, span).items() if name in wanted}
    found = tuple(one for one in space.values() if one.name in wanted and one.name not in unsearched)
    if not found:
        raise InputError(
            f"nothing is left to search: {reasons(unsearched)}; give --shared_cache, or other --parameters"
        )
    return found, unsearched


def reasons(unsearched: Mapping[str, str]) -> str:
    """Say why parameters are not searched.

    Args:
        unsearched: reasons by name.

    Returns:
        One clause per reason, with the names that it applies to.
    """
    return "; ".join(
        f"{', '.join(name for name in unsearched if unsearched[name] == why)}: {why}"
        for why in dict.fromkeys(unsearched.values())
    )


def suggest(space: Space, trial: optuna.Trial) -> dict[str, Value]:
    """Let a trial choose a point of the space.

    Args:
        space: the parameters.
        trial: the trial that chooses.

    Returns:
        Values by name.
    """
    values: dict[str, Value] = {}
    for one in space:
        if one.kind == "bool":
            values[one.name] = trial.suggest_categorical(one.name, [False, True])
        elif one.kind == "int":
            values[one.name] = trial.suggest_int(one.name, int(one.low), int(one.high), log=one.log)
        else:
            values[one.name] = trial.suggest_float(one.name, one.low, one.high, log=one.log)
    return values


def grid(space: Space, number: int) -> list[dict[str, Value]]:
    """List all points of a grid.

    Args:
        space: the parameters.
        number: the most values of each parameter, evenly spaced on its scale from end to end.

    Returns:
        Every combination of the values.
    """
    names = [one.name for one in space]
    return [dict(zip(names, one, strict=True)) for one in itertools.product(*(_spaced(p, number) for p in space))]


def config_at(values: Values, base: VARConfig, prices: Prices, orders: Sequence[int]) -> VARConfig:
    """Build the config that a point of the space stands for.

    Args:
        values: by parameter; settings without a value stay as in `base`.
        base: the config of the search.
        prices: measured on the tune documents; used where there is a `loss_budget`.
        orders: context orders that a policy may use; order 0 is among them where answers are affine.

    Returns:
        The config.

    Raises:
        InputError: VARConfig refuses a value.
    """
    fields: dict[str, Any] = dict(values)
    budget, longest = fields.pop("loss_budget", None), fields.pop("longest_context", None)
    cached = fields.pop(CACHED_TIER, True)
    config = dataclasses.replace(base, **fields)
    if budget is not None:
        policies = {
            choice.layer: LayerPolicy(experts_kept=None, tolerance=choice.tolerance, ngram_orders=tuple(orders))
            for choice in prices.within(float(budget))
        }
        config = dataclasses.replace(config, default=None, layers=policies)
    if longest is not None:
        shorter = tuple(order for order in orders if order <= longest)

        def shortened(policy: LayerPolicy | None) -> LayerPolicy | None:
            return policy and dataclasses.replace(policy, ngram_orders=shorter)

        layers = {layer: shortened(policy) for layer, policy in dict(config.layers).items()}
        config = dataclasses.replace(config, default=shortened(config.default), layers=layers)
    return config if cached else dataclasses.replace(config, cache_size=0)


def _spaced(parameter: Parameter, number: int) -> list[Value]:
    if parameter.kind == "bool":
        return [False, True]
    low, high = parameter.low, parameter.high
    shares = [0.5] if number == 1 else [index / (number - 1) for index in range(number)]
    found = [low * (high / low) ** share if parameter.log else low + (high - low) * share for share in shares]
    found = [min(max(value, low), high) for value in found]  # rounding may pass an end
    return sorted({round(value) for value in found}) if parameter.kind == "int" else found


def _with_range(parameter: Parameter, text: str) -> Parameter:
    name, _, ends = text.partition("=")
    if parameter.kind == "bool":
        raise InputError(f"{name} is either true or false; leave it out of --parameters to keep the config's own")
    try:
        low, high = map(float, ends.split(":"))
    except ValueError:
        example = f"{name}={parameter.low:g}:{parameter.high:g}"
        raise InputError(f"{text!r} is not a range; write for example {example}") from None
    return dataclasses.replace(parameter, low=low, high=high)


def _without_effect(space: Mapping[str, Parameter], num_experts: int, span: float) -> dict[str, str]:
    """Parameters that cannot change anything, and why."""
    found = {}
    if num_experts == 1:
        always = "every layer has one expert, whose gate has no entropy and full confidence"
        found = dict.fromkeys(("entropy_threshold", "confidence_threshold"), always)
    if span == 0:
        why = "each document is read in one window with a cached tier of its own, which decides nothing then"
        found |= {name: why for name in space if name in (*CACHED, CACHED_TIER)}
    elif space["cache_ttl_seconds"].low >= span:
        why = f"no decision of the cached tier gets older than {span:,.2f} s on these documents"
        found["cache_ttl_seconds"] = why
    return found


def _named(space: Mapping[str, Parameter], name: str) -> Parameter:
    if name not in space:
        near = difflib.get_close_matches(name, space, n=1)
        meant = f"; did you mean {near[0]!r}?" if near else "."
        raise InputError(f"no parameter is called {name!r}{meant} The parameters are {', '.join(space)}")
    return space[name]

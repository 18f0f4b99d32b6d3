"""The search space: which settings of VAR are searched, in which ranges, and the config that a point of it stands for.

A space is data, a tuple of `Parameter`s. Most of them are fields of `VARConfig` by their own names. Three are not:

- `loss_budget`: every layer's tolerance at once, by the ladder of policies (`analysis.evaluate.policy_search`). It is
  what the losses of the single layers add up to; what a point really costs is measured.
- `longest_context`: the orders that the layers look at, from 1 to this.
- `cached_tier`: whether there is a cached tier at all. Where there is none, its settings (`CACHED`) mean nothing; they
  are drawn all the same, since a model of a space that changes its shape is a worse one.

To search another field of `VARConfig`, give a `Parameter` of its name; but not of those in `OF_THE_TABLE`: they went
into the one table that all points of a search share.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import optuna

from analysis.evaluate.policy_search import Ladder
from varjax.config import LayerPolicy, VARConfig
from varjax.errors import InputError

Value = int | float | bool
Values = Mapping[str, Value]

OF_THE_TABLE = ("answer_shrinkage", "answers_per_layer", "answer_dtype")


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One setting and its range, both ends included; a "bool" has none.

    Raises:
        InputError: a range that is empty, not of the kind, or, on a logarithmic scale, not above 0; a name that is in
            `OF_THE_TABLE`.
    """

    name: str
    kind: Literal["int", "float", "bool"]
    low: float = 0
    high: float = 1
    log: bool = False  # searched by factors instead of by differences
    unit: str = ""

    def __post_init__(self) -> None:
        if self.name in OF_THE_TABLE:
            raise InputError(f"{self.name} is laid down in the table that all points share; leave it to the config")
        if self.kind == "int" and not (float(self.low).is_integer() and float(self.high).is_integer()):
            raise InputError(f"{self.name}={self.low}:{self.high}: expected whole numbers")
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise InputError(f"{self.name}={self.low:g}:{self.high:g}: expected a low end below the high one")
        if self.log and self.low <= 0:
            raise InputError(f"{self.name}={self.low:g}:{self.high:g}: searched by factors; expected a low end above 0")

    def suggest(self, trial: optuna.Trial) -> Value:
        """What the trial tries."""
        if self.kind == "bool":
            return trial.suggest_categorical(self.name, [False, True])
        if self.kind == "int":
            return trial.suggest_int(self.name, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(self.name, self.low, self.high, log=self.log)

    def points(self, number: int) -> list[Value]:
        """At most so many values from end to end, evenly spaced on the parameter's scale."""
        if self.kind == "bool":
            return [False, True]
        shares = [0.5] if number == 1 else [index / (number - 1) for index in range(number)]
        if self.log:
            found = [self.low * (self.high / self.low) ** share for share in shares]
        else:
            found = [self.low + (self.high - self.low) * share for share in shares]
        found = [min(max(value, self.low), self.high) for value in found]  # rounding may pass an end
        return sorted({round(value) for value in found}) if self.kind == "int" else found

    @property
    def distribution(self) -> optuna.distributions.BaseDistribution:
        """The range as Optuna knows it."""
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
PUBLISHED_FOR = 8  # experts
CACHED_TIER = "cached_tier"  # whether there is one
CACHED = ("confidence_threshold", "cache_size", "cache_ttl_seconds", "context_window_size")  # of the cached tier


def default_space(orders: Sequence[int], num_experts: int = PUBLISHED_FOR) -> Space:
    """The six thresholds in their published ranges, the loss budget, the cached tier and the context orders.

    A gate's entropy is at most ln E, so its range is stretched by ln E / ln 8 for another number of experts.

    Args:
        orders: that a policy may look at, above 0; `config_at` has to be given the same.
        num_experts: E, of the statistics.
    """
    stretch = math.log(num_experts) / math.log(PUBLISHED_FOR)
    thresholds = tuple(
        dataclasses.replace(one, low=stretch * one.low, high=stretch * one.high) if one.unit == "nats" else one
        for one in THRESHOLDS
    )
    longest = Parameter("longest_context", "int", min(orders), max(orders), unit="ids") if len(orders) > 1 else None
    policy = Parameter("loss_budget", "float", 0.001, 0.03, log=True, unit="relative change of perplexity")
    return (policy, *thresholds, *([longest] if longest else []), Parameter("cached_tier", "bool"))


def with_ranges(space: Space, ranges: Sequence[str]) -> Space:
    """The space with other ranges, each as "name=low:high".

    Raises:
        InputError: no parameter has that name, or the range is none.
    """
    for text in ranges:
        name, _, span = text.partition("=")
        old = _named(space, name)
        if old.kind == "bool":
            raise InputError(f"{name} is either true or false; leave it out of --parameters to keep the config's own")
        try:
            low, high = map(float, span.split(":"))
        except ValueError:
            raise InputError(f"{text!r} is not a range; write for example {name}={old.low:g}:{old.high:g}") from None
        space = tuple(dataclasses.replace(one, low=low, high=high) if one is old else one for one in space)
    return space


def only(space: Space, names: Sequence[str]) -> Space:
    """The parameters of these names, in the order of the space; the others stay what the config says.

    Raises:
        InputError: no parameter has one of the names.
    """
    wanted = {_named(space, name).name for name in names}
    return tuple(one for one in space if one.name in wanted)


def without_effect(space: Space, seconds: float) -> dict[str, str]:
    """The parameters that can change nothing on the documents of a search, and why.

    Args:
        seconds: the greatest age of a decision of the cached tier there, `analysis.evaluate.losses.Caching.span`.
    """
    if seconds == 0:
        why = "each document is read in one window with a cached tier of its own, which decides nothing then"
        return {one.name: why for one in space if one.name in (*CACHED, CACHED_TIER)}
    old = f"no decision of the cached tier gets older than {seconds:,.2f} s on these documents"
    return {one.name: old for one in space if one.name == "cache_ttl_seconds" and one.low >= seconds}


def suggest(space: Space, trial: optuna.Trial) -> dict[str, Value]:
    """The point that a trial tries."""
    return {one.name: one.suggest(trial) for one in space}


def grid(space: Space, number: int) -> list[dict[str, Value]]:
    """Every combination of at most `number` values of each parameter."""
    names = [one.name for one in space]
    return [dict(zip(names, one, strict=True)) for one in itertools.product(*(p.points(number) for p in space))]


def config_at(values: Values, base: VARConfig, ladder: Ladder, orders: Sequence[int]) -> VARConfig:
    """The config that a point of the space stands for.

    Args:
        values: by parameter; what is not there stays as it is in `base`.
        ladder: measured on the tuning documents; asked where there is a `loss_budget`.
        orders: that a policy may look at, above 0, as given to `default_space`.

    Raises:
        InputError: a value that VARConfig refuses.
    """
    fields: dict[str, Any] = dict(values)
    budget = fields.pop("loss_budget", None)
    longest = fields.pop("longest_context", None)
    cached = fields.pop("cached_tier", True)
    config = dataclasses.replace(base, **fields)
    if budget is not None:
        policies = {
            choice.layer: LayerPolicy(experts_kept=None, tolerance=choice.tolerance, ngram_orders=tuple(orders))
            for choice in ladder.within(float(budget))
        }
        config = dataclasses.replace(config, default=None, layers=policies)
    if longest is not None:
        config = _with_orders(config, tuple(order for order in orders if order <= longest))
    return config if cached else dataclasses.replace(config, cache_size=0)


def _with_orders(config: VARConfig, orders: tuple[int, ...]) -> VARConfig:
    def changed(policy: LayerPolicy | None) -> LayerPolicy | None:
        return policy and dataclasses.replace(policy, ngram_orders=orders)

    layers = {layer: changed(policy) for layer, policy in dict(config.layers).items()}
    return dataclasses.replace(config, default=changed(config.default), layers=layers)


def _named(space: Space, name: str) -> Parameter:
    for one in space:
        if one.name == name:
            return one
    names = [one.name for one in space]
    near = difflib.get_close_matches(name, names, n=1)
    meant = f"; did you mean {near[0]!r}?" if near else "."
    raise InputError(f"no parameter is called {name!r}{meant} The parameters are {', '.join(names)}")

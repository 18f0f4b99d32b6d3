"""VAR, the simple alternatives to it, and VAR without one thing at a time: families of configurations with a dial.

Letters: L layers, K experts per token.

All of them are policies over the table of the policy that was given, built once with fixed shapes. Alternatives that
look at no token are policies of order 0, whose key every token has. The cached tier is off in all of them, VAR's own
included, but in "cache only".
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import numpy as np

from analysis.policies.scored_points import Subject
from analysis.studies.shuffled import shuffled_answers
from varjax.config import LayerPolicy, VARConfig
from varjax.errors import NotTestableError
from varjax.table import RouteTable, with_policies

VAR = "VAR"
RATIOS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # of the first expert's weight
MASSES = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)  # of the gate's probability; many experts share it
CACHES = ((0.9, 0.9), (0.7, 0.8), (0.5, 0.7), (0.3, 0.6), (0.0, 0.5))  # confidence to remember, weight to keep
SCALES = (0.25, 0.5, 0.7, 1.0, 1.4, 2.0)  # of the policy's tolerances
WIDE_SCALES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)  # where the policy says little about the tolerances to try
HARMFUL_SCALES = (0.05, 0.1, 0.2, 0.5, 1.0)  # where small tolerances cost much already
_NEVER = 2**31 - 1  # occurrences that no key has

Change = Literal["", "shuffled", "same keys"]  # "same keys": those from which the given policy would answer


@dataclasses.dataclass(frozen=True)
class Point:
    """One configuration of a family."""

    dial: float
    config: VARConfig


@dataclasses.dataclass(frozen=True)
class Family:
    """A rule, and its configurations from timid to bold."""

    name: str
    dial: str  # what is turned
    source: str  # who proposed it, or what it takes away from VAR
    points: tuple[Point, ...]
    from_plain: bool = True  # the dial's timid end is the plain model
    change: Change = ""  # of the table


def families(subject: Subject) -> tuple[Family, ...]:
    """VAR first, by the scale of its tolerances; then what others proposed; then VAR without one thing at a time.

    Raises:
        NotTestableError: a layer of the given policy does something that its tolerance does not govern.
    """
    config = dataclasses.replace(subject.config, cache_size=0, cache_layers=None)
    top_k = subject.model.config.top_k
    rescaled = subject.model.config.normalize_top_k  # what others proposed weighs the rest as the model weighs its K
    policies = _policies(subject)
    tolerances = [policy.tolerance for policy in policies.values() if policy is not None and policy.tolerance]
    typical = math.exp(sum(map(math.log, tolerances)) / len(tolerances))

    def each(change: Callable[[LayerPolicy], LayerPolicy]) -> VARConfig:
        changed = {layer: policy and change(policy) for layer, policy in policies.items()}
        return dataclasses.replace(config, default=None, layers=changed)

    def everywhere(**fields: Any) -> VARConfig:
        usual: dict[str, Any] = {"experts_kept": top_k, "ngram_orders": (0,), "use_answers": False}
        return dataclasses.replace(config, default=LayerPolicy(**(usual | fields)), layers={})

    def scaled(scale: float, **fields: Any) -> VARConfig:
        return each(lambda one: dataclasses.replace(one, tolerance=scale * (one.tolerance or 0), **fields))

    def unanswered(ratio: float) -> VARConfig:
        fields: dict[str, Any] = {
            "experts_kept": top_k,
            "tolerance": None,
            "use_answers": False,
            "renormalize": rescaled,
        }
        return each(lambda one: dataclasses.replace(one, gate_ratio=ratio, **fields))

    def cached(confidence: float, mass: float) -> VARConfig:
        nothing: dict[str, Any] = {
            "experts_kept": None,
            "ngram_orders": subject.stats.ngram_orders,
            "frequency_threshold": _NEVER,
        }
        size = subject.config.cache_size or VARConfig().cache_size
        alone = everywhere(renormalize=rescaled, **nothing)
        return dataclasses.replace(alone, cache_size=size, confidence_threshold=confidence, mass_threshold=mass)

    def points(dials: Iterable[float], config_at: Callable[[float], VARConfig]) -> tuple[Point, ...]:
        return tuple(Point(dial, config_at(dial)) for dial in dials)

    scale, number, smaller = "scale of the tolerances", "m, experts that run", "a smaller K"
    mone, top_one = "MoNE, arXiv 2507.00390", Point(1, everywhere(experts_kept=1, use_answers=True))
    fewer = range(top_k - 1, -1, -1)
    renormalized = points(fewer[:-1], lambda m: everywhere(experts_kept=int(m), renormalize=True))
    own = points(fewer, lambda m: everywhere(experts_kept=int(m)))
    answered = points(fewer, lambda m: each(lambda one: dataclasses.replace(one, experts_kept=int(m), tolerance=None)))
    by_ratio = points(RATIOS, lambda ratio: everywhere(gate_ratio=ratio, renormalize=rescaled))
    by_mass = points(MASSES, lambda mass: everywhere(gate_mass=mass, renormalize=rescaled))
    means = points(RATIOS, lambda ratio: everywhere(gate_ratio=ratio, use_answers=True))
    by_cache = tuple(Point(confidence, cached(confidence, mass)) for confidence, mass in CACHES)
    uniform = points(
        [typical * one for one in WIDE_SCALES], lambda t: each(lambda one: dataclasses.replace(one, tolerance=t))
    )
    found = (
        Family(VAR, scale, "the given policy", points(SCALES, scaled)),
        Family("top-m for all, renormalized", number, smaller, renormalized, from_plain=False),
        Family("top-m for all, own weights", number, smaller, own, from_plain=False),
        Family("weight ratio", "weight ratio", "NAEE, arXiv 2402.14800", by_ratio),
        Family("top-p", "probability to reach", "Huang et al. 2024, arXiv 2403.07652", by_mass),
        Family("one mean per expert, by ratio", "weight ratio; last: top-1", mone, (*means, top_one)),
        Family(
            "one mean per expert, by tolerance",
            scale,
            mone,
            points(WIDE_SCALES, lambda s: scaled(s, ngram_orders=(0,))),
        ),
        Family(
            "VAR without answers",
            "weight ratio",
            "the same keys, by weight ratio",
            points(RATIOS, unanswered),
            change="same keys",
        ),
        Family(
            "token ids only",
            scale,
            "answers of order 1 alone",
            points(WIDE_SCALES, lambda s: scaled(s, ngram_orders=(1,))),
        ),
        Family("cache only", "confidence to remember, weight to keep with it", "nothing known beforehand", by_cache),
        Family(
            "shuffled answers",
            scale,
            "the same slots, the answers of others",
            points(HARMFUL_SCALES, scaled),
            change="shuffled",
        ),
        Family("one tolerance for all layers", "tolerance", "no search by layer", uniform),
        Family("m experts and answers", number, "no tolerance: as many at every known key", answered, from_plain=False),
    )
    return tuple(one for one in found if one.points)  # no m is between 0 and K where K = 1


def table_of(subject: Subject, table: RouteTable, family: Family, point: Point) -> RouteTable:
    """The table of one point: `table`, which was built from the subject with `keep_shapes`, under its policies."""
    changed = with_policies(table, point.config, subject.stats, subject.answers)
    if family.change == "shuffled":
        return shuffled_answers(changed, np.random.default_rng(subject.seed))
    if family.change == "same keys":
        given = with_policies(table, subject.config, subject.stats, subject.answers)
        return dataclasses.replace(changed, eligible=given.eligible)
    return changed


def _policies(subject: Subject) -> dict[int, LayerPolicy | None]:
    """Those of all layers, each one governed by its tolerance alone."""
    policies = {layer: subject.config.policy(layer) for layer in range(subject.model.config.num_layers)}
    planned = {layer: policy for layer, policy in policies.items() if policy is not None}
    strange = [
        layer
        for layer, one in planned.items()
        if not one.tolerance
        or one.experts_kept not in (None, subject.model.config.top_k)
        or one.gate_ratio
        or one.gate_mass
    ]
    if strange or not planned:
        raise NotTestableError(
            f"the policies of layers {strange or 'all'} are not governed by a tolerance, so there is no dial to turn: "
            "expected policies with a tolerance, experts_kept=None, gate_ratio=None, gate_mass=None (--search_policy "
            "finds such)"
        )
    return policies

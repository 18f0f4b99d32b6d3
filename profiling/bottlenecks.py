"""What keeps VAR from being faster, found in measurements and named, the worst first.

    found = bottlenecks(evidence)          # [] where nothing stands out

A rule looks at one thing and gives a `Bottleneck` or None. Its severity is what it costs: the share of the call that
would be saved if it went away, as far as the evidence can tell. Each says what was seen in numbers, what to do, and,
where it can be tried at once, what came of trying (`Evidence.tried`).

To add a rule, write a function of `Evidence` and put it into `RULES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from analysis.criteria import MAX_LEARNED
from analysis.resampling import Estimate

Severity = Literal["high", "medium", "low"]
HIGH, MEDIUM = 0.2, 0.05  # share of the call from which a bottleneck is so severe
MIN_HITS = 0.01  # share of tokens and layers that a cached tier must decide to be of use
LOOKUP = ("plan", "commit")


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What was measured of one kind of call, plain and under VAR. What is None or not there was not measured.

    Where VAR is switched off, the call is that of the plain model, and the rules that compare with VAR are skipped.
    """

    phase: str  # "prefill" or "decode"
    batch: int
    plain: Mapping[str, float]  # s per call, by component of `profiling.costs`, and "other"
    var: Mapping[str, float]  # the same under VAR
    speedup: Estimate | None = None  # of the whole call, paired
    experts: tuple[float, float]  # that run per token and layer: plain and VAR
    tiers: Mapping[str, float] | None = None  # share of tokens and layers by tier
    cached_tier: bool = False  # whether there is one
    overhead: float | None = None  # s per call that no component accounts for: dispatch, small kernels
    waiting: Mapping[str, bool] | None = None  # by component, whether it waits for memory rather than arithmetic
    exponent: tuple[float, float] | None = None  # of time over tokens: measured, expected
    tried: Mapping[str, float] = field(default_factory=dict)  # name of a bottleneck -> speed-up over VAR as it is

    @property
    def total(self) -> float:
        """s, of the call that is judged: under VAR, or of the plain model where VAR is switched off."""
        return sum(self.var.values())

    @property
    def where(self) -> str:
        return f"{self.phase}, batch {self.batch}"


@dataclass(frozen=True)
class Bottleneck:
    """One thing that costs time."""

    name: str
    severity: Severity
    where: str  # phase and batch
    cost: float  # share of the call under VAR that would be saved without it
    evidence: str  # in numbers
    advice: str


Rule = Callable[[Evidence], Bottleneck | None]


def bottlenecks(evidence: Evidence) -> list[Bottleneck]:
    """All that the rules find, the dearest first."""
    found = [one for rule in RULES if (one := rule(evidence)) is not None]
    return sorted(found, key=lambda one: -one.cost)


def slow_down(evidence: Evidence) -> Bottleneck | None:
    """VAR is slower than the plain model."""
    one = evidence.speedup
    if one is None or one.high >= 1:
        return None
    grown = {name: seconds - evidence.plain.get(name, 0.0) for name, seconds in evidence.var.items()}
    worst = max(grown, key=lambda name: grown[name])
    return _named(
        "slow-down",
        evidence,
        1 - one.value,
        f"{one.value:.2f}x [{one.low:.2f}, {one.high:.2f}] of the plain model's speed; {worst} grew most, by "
        f"{_time(grown[worst])}",
        "plan more tokens (a larger loss budget, lower thresholds), or leave VAR off for calls of this kind",
    )


def look_up(evidence: Evidence) -> Bottleneck | None:
    """Planning and committing take a notable share of the call."""
    seconds = {name: evidence.var.get(name, 0.0) for name in LOOKUP}
    share = sum(seconds.values()) / evidence.total
    if share < MEDIUM:
        return None
    said = ", ".join(f"{name} {_time(one)}" for name, one in seconds.items())
    return _named(
        "look-up",
        evidence,
        share,
        f"{said}: {share:.0%} of the call",
        "fewer context orders, no cached tier, a larger batch; the look-up costs the same for a larger model, which it "
        "slows down less",
    )


def learned_share(evidence: Evidence) -> Bottleneck | None:
    """The router is left with more than the published share of the tokens."""
    if evidence.tiers is None:
        return None
    learned = evidence.tiers["learned"]
    if learned <= MAX_LEARNED:
        return None
    plain, var = evidence.experts
    planned = 1 - learned
    # What planned tokens save each, if the excess of open ones saved it too.
    each = (plain - var) / planned if planned > 0 else plain
    cost = evidence.var.get("experts", 0.0) / evidence.total * min(1.0, each * (learned - MAX_LEARNED) / max(var, 1e-9))
    return _named(
        "learned share",
        evidence,
        cost,
        f"{learned:.0%} of tokens and layers are left to the router, {MAX_LEARNED:.0%} is the criterion",
        "statistics of more text, or of text nearer to this; lower frequency_threshold, higher entropy_threshold",
    )


def cache_use(evidence: Evidence) -> Bottleneck | None:
    """There is a cached tier that decides next to nothing."""
    if not evidence.cached_tier or evidence.tiers is None:
        return None
    hits = evidence.tiers["cached"]
    if hits >= MIN_HITS:
        return None
    tried = evidence.tried.get("cache use")
    cost = 1 - 1 / tried if tried else sum(evidence.var.get(name, 0.0) for name in LOOKUP) / evidence.total
    return _named(
        "cache use",
        evidence,
        cost,
        f"the cached tier decides {hits:.2%} of tokens and layers, and is looked up and written for all",
        "cache_size=0; or a larger cache, a longer time to live, a lower confidence_threshold where texts repeat",
    )


def padding(evidence: Evidence) -> Bottleneck | None:
    """The experts' time does not fall with the experts that run."""
    plain, var = evidence.plain.get("experts", 0.0), evidence.var.get("experts", 0.0)
    ratio, active = var / plain if plain else 1.0, evidence.experts[1] / evidence.experts[0]
    excess = (ratio - active) * plain / evidence.total
    if excess < MEDIUM or ratio - active < 0.1:
        return None
    return _named(
        "padding waste",
        evidence,
        excess,
        f"{active:.2f} of the plain model's expert runs take {ratio:.2f} of its time in the experts",
        'an engine whose work follows the active assignments (implementation="blocks"), a larger batch, whose blocks '
        "are fuller",
    )


def dispatch_bound(evidence: Evidence) -> Bottleneck | None:
    """Starting kernels and calls takes a notable share of the call."""
    if evidence.overhead is None:
        return None
    share = evidence.overhead / evidence.total
    if share < HIGH:
        return None
    return _named(
        "dispatch-bound",
        evidence,
        share,
        f"{_time(evidence.overhead)} of {_time(evidence.total)} go into starting calls and small kernels, whatever "
        "they compute",
        "a larger batch, more tokens per call; a larger model feels it less",
    )


def memory_bound(evidence: Evidence) -> Bottleneck | None:
    """Most of the time goes into reading arrays, where fewer operations do not help."""
    if evidence.waiting is None:
        return None
    waits = {name: evidence.var.get(name, 0.0) for name, one in evidence.waiting.items() if one}
    share = sum(waits.values()) / evidence.total
    if share < 0.5:
        return None
    worst = max(waits, key=lambda name: waits[name])
    found = _named(
        "memory-bound",
        evidence,
        share,
        f"{share:.0%} of the call waits for arrays, most of it in {worst}",
        "weights of two bytes (--dtype bfloat16); VAR gains here by the distinct experts that a call reads, so at "
        "small batches",
    )
    # Not lost time but the nature of the call: a notice.
    return Bottleneck(found.name, "low", found.where, found.cost, found.evidence, found.advice)


def poor_scaling(evidence: Evidence) -> Bottleneck | None:
    """Time grows faster with the tokens than it has to."""
    if evidence.exponent is None:
        return None
    measured, expected = evidence.exponent
    if measured - expected < 0.15:
        return None
    return _named(
        "poor scaling",
        evidence,
        1 - 2 ** (expected - measured),  # what doubling the tokens costs too much
        f"time grows with the tokens to the power of {measured:.2f}, {expected:.2f} was to be expected",
        "shorter windows; see which component grows in the scaling figure",
    )


RULES: tuple[Rule, ...] = (
    slow_down,
    look_up,
    learned_share,
    cache_use,
    padding,
    dispatch_bound,
    memory_bound,
    poor_scaling,
)


def _named(name: str, evidence: Evidence, cost: float, seen: str, advice: str) -> Bottleneck:
    severity: Severity = "high" if cost >= HIGH else "medium" if cost >= MEDIUM else "low"
    tried = evidence.tried.get(name)
    if tried is not None:
        advice += f". Tried: {tried:.2f}x of the speed that it has now"
    return Bottleneck(name, severity, evidence.where, max(cost, 0.0), seen, advice)


def _time(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "an unknown time"
    return f"{seconds * 1e6:,.0f} µs" if seconds < 1e-3 else f"{seconds * 1e3:,.2f} ms"

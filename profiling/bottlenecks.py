"""What keeps VAR from being faster: measurements of one model, policy and text, and rules that name bottlenecks.

    breakdowns = measure_sides(var_model, texts, folder="traces")
    section, found = examine(var_model, texts, breakdowns)

A rule looks at one thing and returns a `Bottleneck` or None. Its severity is its cost: the share of the call that would
be saved without it, as far as the evidence shows. Each one gives its evidence in numbers, advice, and, where the advice
can be tried at once, the result (`Evidence.tried`). A new rule is a function of `Evidence` in `RULES`.

Letters: B sequences, T positions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from analysis.criteria import MAX_LEARNED
from analysis.evaluate.losses import SECONDS_PER_TOKEN
from analysis.report.report import Column, Section, Table
from analysis.resampling import Estimate
from profiling.calls import answer_rank, prepare, sides, workload_and_mix
from profiling.ceilings import Ceilings
from profiling.components import OTHER, Breakdown
from profiling.costs import component_costs
from profiling.performance_model import Scaling
from profiling.timing import compare, paired_ratio
from varjax.model import VARModel
from varjax.step import Counters, summary

HIGH, MEDIUM = 0.2, 0.05  # share of the call from which a bottleneck has this severity
_MIN_HITS = 0.01  # share of tokens and layers that a useful cached tier decides at least
_LOOKUP = ("plan", "commit")


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Measurements of one kind of call, plain and under VAR; None or a missing entry was not measured.

    Where VAR is switched off, the plain model is judged, and the rules that compare with VAR are skipped.
    """

    phase: str  # "prefill" or "decode"
    batch: int
    plain: Mapping[str, float]  # s per call, by component of `profiling.costs`, and "other"
    var: Mapping[str, float]  # the same under VAR
    speedup: Estimate | None = None  # of the whole call, paired
    experts: tuple[float, float]  # that run per token and layer: plain and VAR
    tiers: Mapping[str, float] | None = None  # share of tokens and layers by tier
    cached_tier: bool = False  # whether there is one
    answer_rank: int = 0  # of the maps of affine answers
    overhead: float | None = None  # s per call that no component accounts for: dispatch, small kernels
    waiting: Mapping[str, bool] | None = None  # by component, whether it waits for memory rather than arithmetic
    exponent: tuple[float, float] | None = None  # of time over tokens: measured, expected
    tried: Mapping[str, float] = field(default_factory=dict)  # name of a bottleneck -> speed-up over VAR as it is

    @property
    def total(self) -> float:
        """Seconds of the call that is judged: under VAR, or of the plain model where VAR is switched off."""
        return sum(self.var.values())

    @property
    def where(self) -> str:
        """Phase and batch in words."""
        return f"{self.phase}, batch {self.batch}"


@dataclass(frozen=True)
class Bottleneck:
    """One thing that costs time."""

    name: str
    severity: Literal["high", "medium", "low"]
    where: str  # phase and batch
    cost: float  # share of the call that would be saved without it
    evidence: str  # in numbers
    advice: str


def gather(
    var_model: VARModel,
    texts: Mapping[str, np.ndarray],
    breakdowns: Sequence[Breakdown],
    *,
    ceilings: Ceilings | None = None,
    scalings: Sequence[Scaling] = (),
    rounds: int = 11,
    seed: int = 0,
) -> list[Evidence]:
    """Measure what the rules need.

    Args:
        var_model: the model; where VAR is switched off, the evidence is about the plain model alone.
        texts: phase -> int32 [B, T], those that `breakdowns` were measured on.
        breakdowns: of every side and phase.
        ceilings: of this machine, to tell what waits for memory; None: that is left open.
        scalings: of a performance study; a phase without one leaves its scaling open.
        rounds: of timing.
        seed: of the order within rounds.

    Returns:
        The evidence of each phase.
    """
    return [
        _gather(var_model, ids, phase, breakdowns, ceilings, scalings, rounds, seed) for phase, ids in texts.items()
    ]


def examine(evidence: Sequence[Evidence]) -> tuple[Section, list[Bottleneck]]:
    """Apply the rules, and report the bottlenecks.

    Args:
        evidence: from `gather`.

    Returns:
        The section, whose criterion is that no bottleneck has high severity; and the bottlenecks.
    """
    found = [one for seen in evidence for one in _bottlenecks(seen)]
    ordered = sorted(found, key=lambda one: ("high", "medium", "low").index(one.severity))
    high = [f"{one.name} ({one.where})" for one in ordered if one.severity == "high"]
    columns = (Column("bottleneck"), Column("where"), Column("severity"), Column("cost", ".0%"))
    rows = tuple((one.name, one.where, one.severity, one.cost) for one in ordered)
    section = Section(
        "bottlenecks",
        "What keeps it from being faster?",
        "FAIL" if high else "PASS",
        f"bottlenecks of high severity: {', '.join(high) or 'none'}",
        (
            f"Severity is the share of a call that would be saved without the bottleneck: high from {HIGH:.0%}, medium "
            f"from {MEDIUM:.0%}. What merely describes the nature of a call is low.",
            *(f"{one.name} ({one.where}, {one.severity}): {one.evidence}. Advice: {one.advice}." for one in ordered),
        ),
        (Table("Bottlenecks", columns, rows),) if rows else (),
    )
    return section, found


def _gather(
    var_model: VARModel,
    ids: np.ndarray,
    phase: str,
    breakdowns: Sequence[Breakdown],
    ceilings: Ceilings | None = None,
    scalings: Sequence[Scaling] = (),
    rounds: int = 11,
    seed: int = 0,
) -> Evidence:
    """The evidence of one phase on texts int32 [B, T]."""
    config, top_k = var_model.config, var_model.model.config.top_k
    times = {one.side: one.by_trace for one in breakdowns if one.phase == phase}
    scales = [one for one in scalings if one.phase == phase]
    about: dict[str, Any] = {"var": times["plain"], "experts": (float(top_k), float(top_k))}
    if var_model.table is not None:
        compared = sides(var_model)
        if config.cache_size > 0:
            without = dataclasses.replace(config, cache_size=0)
            compared["no cache"] = VARModel(var_model.model, without, var_model.table, clock=var_model.clock)
        seconds = compare({name: _runner(side, ids, phase) for name, side in compared.items()}, rounds, seed=seed)
        decided = summary(_counters(var_model, ids, phase), top_k)
        about = {
            "var": times["VAR"],
            "speedup": paired_ratio(seconds["plain"], seconds["VAR"]),
            "experts": (float(top_k), decided["experts_per_token"]),
            "tiers": decided["tiers"],
            "cached_tier": config.cache_size > 0,
            "answer_rank": answer_rank(var_model.table),
        }
        if config.cache_size > 0:
            about["tried"] = {"cache use": paired_ratio(seconds["VAR"], seconds["no cache"]).value}
    return Evidence(
        phase=phase,
        batch=len(ids),
        plain=times["plain"],
        overhead=about["var"][OTHER],
        waiting=None if ceilings is None else _waiting(var_model, ids, phase, ceilings),
        exponent=(scales[-1].exponent, scales[-1].expected) if scales else None,
        **about,
    )


def _bottlenecks(evidence: Evidence) -> list[Bottleneck]:
    """What all rules find, the most expensive first."""
    found = [one for rule in RULES if (one := rule(evidence)) is not None]
    return sorted(found, key=lambda one: -one.cost)


def _slow_down(seen: Evidence) -> Bottleneck | None:
    """VAR is slower than the plain model."""
    one = seen.speedup
    if one is None or one.high >= 1:
        return None
    grown = {name: seconds - seen.plain.get(name, 0.0) for name, seconds in seen.var.items()}
    worst = max(grown, key=lambda name: grown[name])
    said = f"{one.value:.2f}x [{one.low:.2f}, {one.high:.2f}] of the plain model's speed; {worst} grew most, by "
    advice = "plan more tokens (a larger loss budget, lower thresholds), or leave VAR off for calls of this kind"
    return _named("slow-down", seen, 1 - one.value, said + _time(grown[worst]), advice)


def _look_up(seen: Evidence) -> Bottleneck | None:
    """Planning and committing take a notable share of the call."""
    seconds = {name: seen.var.get(name, 0.0) for name in _LOOKUP}
    share = sum(seconds.values()) / seen.total
    if share < MEDIUM:
        return None
    said = ", ".join(f"{name} {_time(one)}" for name, one in seconds.items()) + f": {share:.0%} of the call"
    advice = (
        "fewer context orders, no cached tier, or a larger batch; a larger model is slowed down less by the same cost"
    )
    return _named("look-up", seen, share, said, advice)


def _learned_share(seen: Evidence) -> Bottleneck | None:
    """The router decides more than the published share of the tokens."""
    if seen.tiers is None or seen.tiers["learned"] <= MAX_LEARNED:
        return None
    learned, (plain, var) = seen.tiers["learned"], seen.experts
    # What each planned token saves, if the open tokens beyond the criterion saved it too.
    each = (plain - var) / (1 - learned) if learned < 1 else plain
    share = seen.var.get("experts", 0.0) / seen.total
    cost = share * min(1.0, each * (learned - MAX_LEARNED) / max(var, 1e-9))
    said = f"the router decides {learned:.0%} of tokens and layers, the criterion is {MAX_LEARNED:.0%}"
    advice = "statistics of more or more similar text; a lower frequency_threshold, a higher entropy_threshold"
    return _named("learned share", seen, cost, said, advice)


def _cache_use(seen: Evidence) -> Bottleneck | None:
    """The cached tier decides almost nothing."""
    if not seen.cached_tier or seen.tiers is None or seen.tiers["cached"] >= _MIN_HITS:
        return None
    tried = seen.tried.get("cache use")
    cost = 1 - 1 / tried if tried else sum(seen.var.get(name, 0.0) for name in _LOOKUP) / seen.total
    said = (
        f"the cached tier decides {seen.tiers['cached']:.2%} of tokens and layers, but is looked up and written for all"
    )
    advice = "cache_size=0; or a larger cache, a longer time to live, a lower confidence_threshold where texts repeat"
    return _named("cache use", seen, cost, said, advice)


def _answering(seen: Evidence) -> Bottleneck | None:
    """Answers take a notable share of the call."""
    seconds = seen.var.get("answers", 0.0)
    share = seconds / seen.total
    if share < MEDIUM:
        return None
    maps = f", with maps of rank {seen.answer_rank}" if seen.answer_rank else ""
    said = f"answers take {_time(seconds)}{maps}: {share:.0%} of the call"
    advice = "answers in fewer bytes (answer_dtype); a larger model is slowed down less"
    if seen.answer_rank:
        advice = "maps of a smaller rank (--answer_rank of phase 1), or constant answers (0)"
    return _named("answers", seen, share, said, advice)


def _padding(seen: Evidence) -> Bottleneck | None:
    """The time of the experts does not fall with the experts that run."""
    plain, var = seen.plain.get("experts", 0.0), seen.var.get("experts", 0.0)
    ratio, active = var / plain if plain else 1.0, seen.experts[1] / seen.experts[0]
    excess = (ratio - active) * plain / seen.total
    if excess < MEDIUM or ratio - active < 0.1:
        return None
    said = f"{active:.2f} of the plain model's expert runs take {ratio:.2f} of its time in the experts"
    advice = 'an engine whose work follows the active assignments (implementation="blocks"), or a larger batch'
    return _named("padding waste", seen, excess, said, advice)


def _dispatch_bound(seen: Evidence) -> Bottleneck | None:
    """Starting kernels and calls takes a notable share of the call."""
    if seen.overhead is None or seen.overhead / seen.total < HIGH:
        return None
    said = (
        f"{_time(seen.overhead)} of {_time(seen.total)} go into starting calls and small kernels, whatever they compute"
    )
    advice = "a larger batch, more tokens per call; a larger model is affected less"
    return _named("dispatch-bound", seen, seen.overhead / seen.total, said, advice)


def _memory_bound(seen: Evidence) -> Bottleneck | None:
    """Most of the time goes into reading arrays, where fewer operations do not help."""
    waits = {name: seen.var.get(name, 0.0) for name, one in (seen.waiting or {}).items() if one}
    share = sum(waits.values()) / seen.total
    if share < 0.5:
        return None
    said = f"{share:.0%} of the call waits for arrays, most of it in {max(waits, key=lambda name: waits[name])}"
    advice = (
        "weights of two bytes (--dtype bfloat16); VAR gains here through the distinct experts that a call reads, so at "
        "small batches"
    )
    # This describes the nature of the call rather than lost time, so it is a notice.
    return dataclasses.replace(_named("memory-bound", seen, share, said, advice), severity="low")


def _poor_scaling(seen: Evidence) -> Bottleneck | None:
    """Time grows faster with the tokens than it should."""
    if seen.exponent is None or seen.exponent[0] - seen.exponent[1] < 0.15:
        return None
    measured, expected = seen.exponent
    cost = 1 - 2 ** (expected - measured)  # the excess of doubling the tokens
    said = f"time grows with the tokens to the power of {measured:.2f}, {expected:.2f} is expected"
    return _named("poor scaling", seen, cost, said, "shorter windows; the scaling figure shows which calls grow")


RULES: tuple[Callable[[Evidence], Bottleneck | None], ...] = (
    *(_slow_down, _look_up, _learned_share, _cache_use, _answering, _padding),
    *(_dispatch_bound, _memory_bound, _poor_scaling),
)


def _named(name: str, seen: Evidence, cost: float, said: str, advice: str) -> Bottleneck:
    if name in seen.tried:
        advice += f". Tried: {seen.tried[name]:.2f}x the current speed"
    severity: Any = "high" if cost >= HIGH else "medium" if cost >= MEDIUM else "low"
    return Bottleneck(name, severity, seen.where, max(cost, 0.0), said, advice)


def _time(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "an unknown time"
    return f"{seconds * 1e6:,.0f} µs" if seconds < 1e-3 else f"{seconds * 1e3:,.2f} ms"


def _counters(var_model: VARModel, ids: np.ndarray, phase: str) -> Counters:
    """What the tiers decide on texts int32 [B, T], in calls one after the other, so that a cached tier can learn.

    It ages by tokens. A prefill reads one text per call, a decoding step one token of each.
    """
    if phase == "prefill":
        state = var_model.init(1)
        for number, text in enumerate(ids):
            _, state = var_model(text[None], state, now=number * len(text) * SECONDS_PER_TOKEN, donate=True)
    else:
        out, state = var_model.prefill(ids[:, :1], var_model.init(len(ids)), capacity=ids.shape[1], now=0.0)
        real = jnp.ones((len(ids), 1), bool)
        for at in range(1, ids.shape[1]):
            following, now = jnp.asarray(ids[:, at : at + 1]), at * SECONDS_PER_TOKEN
            out, state = var_model.advance(state, following, real, out.kv, last_logits_only=True, now=now, donate=True)
    assert state is not None  # VAR is on
    return state.counters


def _runner(side: VARModel, ids: np.ndarray, phase: str) -> Callable[[], jax.Array]:
    """A round of calls one after the other."""
    calls = prepare(side, ids, phase)

    def run() -> jax.Array:
        for call in calls.each():
            out = call()
        return out

    return run


def _waiting(var_model: VARModel, ids: np.ndarray, phase: str, ceilings: Ceilings) -> dict[str, bool]:
    """By component, whether its bytes take longer than its operations at the machine's ceilings."""
    costs = component_costs(var_model.model.config, *workload_and_mix(var_model, ids, phase))
    return {name: one.bytes / ceilings.memory > one.flops / ceilings.product for name, one in costs.items()}

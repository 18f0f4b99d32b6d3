"""The steps of a replay: `varjax.step.plan` and `commit` over a trace, and the decisions of an unlimited cache.

Letters: N tokens, S steps, T tokens per step, L layers, E experts, K experts per token, A age buckets.

A step holds at most T tokens of one document, without a gap between them. A look-up sees what earlier steps committed.
The clock ticks once per token, so ages are whole tokens, whatever the duration of a token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from analysis.traces.trace import Trace
from varjax import cache as context_cache
from varjax import step as var_step
from varjax.config import VARConfig
from varjax.keys import NONE, contexts
from varjax.routing import CACHED, Plan, resolve
from varjax.step import TIERS, Settings, VARState
from varjax.table import RouteTable

_AT_ONCE = 128  # steps in one call
_TILT = 2.0**-20  # separates equal probabilities, so that the trace's order is kept
_LEAST = 1e-30  # a chosen expert's probability: above those of the others, which may be 0


class _Steps(NamedTuple):
    """Some steps, or one of them without the axis S. Padding has mask False."""

    ids: Array  # int32 [S, 1, T]
    mask: Array  # bool [S, 1, T]
    fresh: Array  # bool [S], nothing came before
    now: Array  # int32 [S], tokens
    experts: Array  # int16 [S, T, L, K], the router's choice
    probs: Array  # float32 [S, T, L, K]


class _StepSums(NamedTuple):
    """What is summed up besides the counters, for one step; see `analysis.traces.replaying.ReplaySums`."""

    recalled: Array  # int32 [L, 3]
    mass: Array  # float32 [L, 3]
    experts_kept: Array  # int32 [L, 3]
    kept_chosen: Array  # int32 [L, 3]
    aged: Array  # int32 [L, A]
    aged_agreements: Array  # int32 [L, A]


def run_steps(
    trace: Trace, table: RouteTable, config: VARConfig, step: int, seconds_per_token: float, age_edges: np.ndarray
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Run the tiers over a trace.

    Args:
        trace: with probabilities.
        table: built for `config`.
        config: the config.
        step: tokens per step.
        seconds_per_token: duration of a tick of the clock.
        age_edges: int64 [A], tokens, where each age bucket begins; the first at 0.

    Returns:
        Sums by name, as in `analysis.traces.replaying.ReplaySums`; int8 [N, L], the tier of every token.
    """
    settings = replace(Settings.of(config, trace.num_layers), ttl=_tokens(config.cache_ttl_seconds, seconds_per_token))
    state = var_step.init(table, config, batch_size=1)
    edges = jnp.asarray(np.minimum(age_edges, context_cache.HORIZON), jnp.int32)  # no age is beyond it
    tier = np.empty(trace.experts.shape[:2], np.int8)
    totals: list[np.ndarray] = [np.zeros(())] * len(_StepSums._fields)
    for rows, at, slot, steps in _chunks(trace, step):
        state, sums, tiers = _advance(table, state, settings, edges, steps, trace.probs_over == "all")
        totals = [total + np.asarray(part, np.float64).sum(axis=0) for total, part in zip(totals, sums, strict=True)]
        tier[rows] = np.asarray(tiers)[at, :, slot]
    counted = {name: np.asarray(value, np.int64) for name, value in vars(state.counters).items()}
    rest = dict(zip(_StepSums._fields, totals, strict=True))
    whole = {name: total if name == "mass" else total.astype(np.int64) for name, total in rest.items()}
    return counted | whole, tier


def unlimited_cache(trace: Trace, fast: np.ndarray, config: VARConfig, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Run the cached tier without bounds on size and age.

    This is exactly `varjax.cache` if it forgot nothing: of equal contexts in one step the last that has anything to
    store counts, and a decision is never replaced, since what is cached is not learned again.

    Args:
        trace: with probabilities.
        fast: bool [N, L], what the fast tier decides and the cached tier does not.
        config: the config.
        step: tokens per step.

    Returns:
        int64 [L], decisions; int64 [L], those that name the router's first expert.
    """
    assert trace.probs is not None
    layers = np.array([config.caches(layer) for layer in range(trace.num_layers)])
    code, first = trace.contexts(config.context_window_size), trace.experts[..., 0]
    open_ = ~fast & layers & (code >= 0)[:, None]
    sure = open_ & (trace.probs[..., 0] >= np.float32(config.confidence_threshold))
    source = np.full((int(code.max(initial=-1)) + 1, trace.num_layers), -1, np.int32)  # the token that decided
    decisions, agreements = np.zeros((2, trace.num_layers), np.int64)
    starts = np.append(np.flatnonzero(_places(trace, step)[1] == 0), len(code))
    for begin, end in pairwise(starts) if layers.any() and len(source) else ():
        here, ours = slice(begin, end), code[begin:end]
        held = source[ours]  # meaningless where there is no context
        hit = open_[here] & (held >= 0)
        decisions += hit.sum(axis=0)
        agreements += (hit & (np.take_along_axis(first, held, axis=0) == first[here])).sum(axis=0)
        allowed = sure[here] & ~hit
        storable = np.flatnonzero(allowed.any(axis=1))[::-1]
        writers = storable[np.unique(ours[storable], return_index=True)[1]]  # the last of each context
        source[ours[writers]] = np.where(allowed[writers], begin + writers[:, None], source[ours[writers]])
    return decisions, agreements


def _places(trace: Trace, step: int) -> tuple[np.ndarray, np.ndarray]:
    """int64 [N] each: the step that a token is in, and its place there."""
    token = np.arange(len(trace.token_id))
    begins = trace.begins()
    slot = (token - np.maximum.accumulate(np.where(begins, token, 0))) % step
    return np.cumsum(slot == 0) - 1, slot


def _tokens(ttl_seconds: float, seconds_per_token: float) -> Array:
    """int32 []: the age in tokens from which a decision is expired."""
    ticks = math.ceil(min(round(ttl_seconds / seconds_per_token, 6), context_cache.HORIZON))  # 0.07 / 0.01 is above 7
    return jnp.int32(ticks)


def _chunks(trace: Trace, step: int) -> Iterator[tuple[slice, np.ndarray, np.ndarray, _Steps]]:
    """`_AT_ONCE` steps at a time: which tokens they hold, step [n] and place [n] of each, and the arrays."""
    assert trace.probs is not None
    at, slot = _places(trace, step)
    starts = np.flatnonzero(slot == 0)
    fresh = trace.begins()[starts]
    shape = (_AT_ONCE, int(slot.max(initial=0)) + 1)
    choice = (*shape, trace.num_layers, trace.top_k)
    for first in range(0, len(starts), _AT_ONCE):
        many = min(_AT_ONCE, len(starts) - first)
        rows = slice(starts[first], starts[first + many] if first + many < len(starts) else len(at))
        here = at[rows] - first, slot[rows]

        def laid(values: np.ndarray, shape: tuple[int, ...], here: tuple[np.ndarray, ...] = here) -> np.ndarray:
            blank = np.zeros(shape, values.dtype)
            blank[here] = values
            return blank

        several = (np.arange(many),)
        yield (
            rows,
            *here,
            _Steps(
                ids=jnp.asarray(laid(trace.token_id[rows], shape)[:, None]),
                mask=jnp.asarray(laid(np.ones(len(here[0]), bool), shape)[:, None]),
                fresh=jnp.asarray(laid(fresh[first : first + many], shape[:1], several)),
                now=jnp.asarray(laid(starts[first : first + many], shape[:1], several), jnp.int32),
                experts=jnp.asarray(laid(trace.experts[rows], choice)),
                probs=jnp.asarray(laid(trace.probs[rows], choice)),
            ),
        )


@partial(jax.jit, static_argnames="over_all", donate_argnames="state")
def _advance(
    table: RouteTable, state: VARState, settings: Settings, age_edges: Array, steps: _Steps, over_all: bool
) -> tuple[VARState, _StepSums, Array]:
    """The state behind the steps, the sums of each [S, ...], and the tiers int8 [S, L, T]."""

    def one(state: VARState, given: _Steps) -> tuple[VARState, tuple[_StepSums, Array]]:
        state = replace(state, recent=jnp.where(given.fresh, NONE, state.recent))
        plan = var_step.plan(table, state, given.ids, given.now, settings, given.mask)
        probs = gate(given.experts, given.probs, table.num_experts, over_all)[:, None]  # [L, 1, T, E]
        # Undivided gate weights would decide the same: without answers, rules compare shares only.
        routing, _ = jax.vmap(lambda p, layer: resolve(p, table.top_k, layer))(probs, plan)
        sums = _measured(plan, given, _age(state, given), age_edges, table.num_experts)
        state = var_step.commit(state, plan, given.ids, routing, probs, given.now, settings, given.mask)
        return state, (sums, plan.tier[:, 0])

    state, (sums, tiers) = jax.lax.scan(one, state, steps)
    return state, sums, tiers


def gate(experts: Array, probs: Array, num_experts: int, over_all: bool) -> Array:
    """Make gate probabilities that choose what the trace's router chose, in the trace's order.

    The chosen experts have the trace's probabilities, equal ones separated by a millionth; the others have none or,
    where the probabilities are over all experts, equal parts of what is left.

    Args:
        experts: int16 [T, L, K].
        probs: float32 [T, L, K], falling.
        num_experts: E.
        over_all: the probabilities are over all experts.

    Returns:
        float32 [L, T, E].
    """
    k = experts.shape[-1]
    told_apart = jnp.maximum(probs, _LEAST) * (1 - _TILT * jnp.arange(k, dtype=jnp.float32))[None, None]
    chosen = experts[..., None] == jnp.arange(num_experts, dtype=experts.dtype)[None, None, None]  # [T, L, K, E]
    full = jnp.sum(jnp.where(chosen, told_apart[..., None], 0), axis=-2)
    if over_all and k < num_experts:
        rest = jnp.maximum(1 - jnp.sum(probs, axis=-1, keepdims=True), 0) / (num_experts - k)
        rest = jnp.minimum(rest, told_apart[..., -1:] * (1 - _TILT))  # rounding must not lift it above the chosen
        full = jnp.where(jnp.any(chosen, axis=-2), full, rest)
    return jnp.moveaxis(full, 1, 0)


def _age(state: VARState, given: _Steps) -> Array:
    """int32 [L, T]: tokens since the cached decision for each token was made."""
    if state.cache is None:
        return jnp.zeros((given.experts.shape[1], given.ids.shape[-1]), jnp.int32)
    seen = contexts(given.ids, state.recent, state.cache.ids.shape[-1], given.mask)
    return context_cache.age(state.cache, seen, given.now)[:, 0]


def _measured(plan: Plan, given: _Steps, age: Array, age_edges: Array, num_experts: int) -> _StepSums:
    tier, predicted = plan.tier[:, 0], plan.routing.experts[:, 0]  # [L, T], [L, T, K]
    chosen = jnp.moveaxis(given.experts, 1, 0).astype(predicted.dtype)
    probs = jnp.moveaxis(given.probs, 1, 0)
    same = predicted[..., :, None] == chosen[..., None, :]  # [L, T, K predicted, K chosen]
    caught, right = jnp.any(same, axis=-2), jnp.any(same, axis=-1)
    whole = jnp.sum(probs, axis=-1)
    share = jnp.sum(jnp.where(caught, probs, 0), axis=-1) / jnp.where(whole > 0, whole, 1)
    keeps = (
        jnp.arange(predicted.shape[-1], dtype=plan.experts_kept.dtype)[None, None] < plan.experts_kept[:, 0, :, None]
    ) & (predicted < num_experts)
    tiers = jnp.arange(len(TIERS), dtype=tier.dtype)[None, None]
    of_tier = (tier[..., None] == tiers) & given.mask[0][None, :, None]  # [L, T, 3]

    def total(values: Array) -> Array:
        return jnp.sum(jnp.where(of_tier, values[..., None], 0), axis=1, dtype=values.dtype)

    def counted(flags: Array) -> Array:
        return total(jnp.sum(flags, axis=-1, dtype=jnp.int32))

    bucket = jnp.searchsorted(age_edges, age, side="right").astype(jnp.int32) - 1
    buckets = jnp.arange(len(age_edges), dtype=jnp.int32)[None, None]
    aged = (bucket[..., None] == buckets) & of_tier[..., CACHED, None]  # [L, T, A]
    agreed = aged & (predicted[..., 0] == chosen[..., 0])[..., None]
    return _StepSums(
        recalled=counted(caught),
        mass=total(share),
        experts_kept=counted(keeps),
        kept_chosen=counted(keeps & right),
        aged=jnp.sum(aged, axis=1, dtype=jnp.int32),
        aged_agreements=jnp.sum(agreed, axis=1, dtype=jnp.int32),
    )

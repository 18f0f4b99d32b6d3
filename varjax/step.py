"""The tiers at work: `plan` before layer 0, `commit` after the last layer; state in, state out.

Letters: L layers, B sequences, T positions, C ids that a plan looks back at (its own included), E experts, K experts
per token.

    settings = Settings.of(config, num_layers)
    state = init(table, config, batch_size)
    plan_ = plan(table, state, token_ids, now, settings, mask)
    ...                                                  # the model runs under the plan
    state = commit(state, plan_, token_ids, routing, router_probs, now, settings, mask)

Both are pure and compiled; they may be called as they are or inside a jitted step. Padding (mask False) is open in
every layer, and neither counted nor remembered. `now` is in seconds on a clock of the caller's, which may begin
anywhere; only differences count. A jitted step takes `timestamp(now)` as an argument in its place, because a float32
would lose digits.
"""

from __future__ import annotations

import numbers
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from varjax import cache as context_cache
from varjax.cache import ContextCache
from varjax.config import VARConfig
from varjax.errors import InputError
from varjax.keys import NONE, contexts
from varjax.routing import CACHED, FAST, LEARNED, NO_ROW, Plan, Routing, slots_for_mass
from varjax.table import RouteTable, fast_plan
from varjax.transfer import passing_scalars, to_device

TIERS = ("fast", "cached", "learned")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Settings:
    """What `plan` and `commit` need of a config. Array data, so that other values recompile nothing."""

    ttl: Array  # int32 [], ms, at most `cache.HORIZON` (12.4 days)
    confidence_threshold: Array  # float32 [], top gate probability from which a decision is remembered
    mass_threshold: Array  # float32 [], share of a cached decision's weight that runs
    cache_layers: Array  # bool [L], layers that the cached tier may decide

    @classmethod
    def of(cls, config: VARConfig, num_layers: int) -> Settings:
        """The settings of a config as arrays on the device.

        Args:
            config: a config.
            num_layers: L.

        Returns:
            Settings.
        """
        return cls(
            ttl=to_device(np.int32(min(round(config.cache_ttl_seconds * 1000), context_cache.HORIZON))),
            confidence_threshold=to_device(np.float32(config.confidence_threshold)),
            mass_threshold=to_device(np.float32(config.mass_threshold)),
            cache_layers=to_device(np.array([config.caches(layer) for layer in range(num_layers)])),
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class WideCount:
    """Counts from 0 to 2^64 - 1, `high * 2^32 + low`. `np.asarray` of it gives int64, exact up to 2^63 - 1."""

    low: Array  # uint32 [...]
    high: Array  # uint32 [...]

    @classmethod
    def _zero(cls, shape: tuple[int, ...]) -> WideCount:
        """Counts that are all 0, in two arrays, so that each can be donated."""
        return cls(*to_device((np.zeros(shape, np.uint32), np.zeros(shape, np.uint32))))

    def plus(self, more: Array) -> WideCount:
        """The counts with `more` added. Pure, fit for jit.

        Args:
            more: int32 or uint32 [...], not negative.

        Returns:
            The sums.
        """
        low = self.low + more.astype(jnp.uint32)
        return WideCount(low, self.high + (low < self.low).astype(jnp.uint32))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """int64 [...] on the host."""
        low, high = (np.asarray(word).astype(np.int64) for word in jax.device_get((self.low, self.high)))
        return np.asarray((high << 32) | low, dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Counters:
    """What happened so far, by layer and tier. `np.asarray` of each gives int64 [L, 3]; they do not wrap around."""

    tokens: WideCount  # [L, 3]
    agreements: WideCount  # [L, 3], tokens whose predicted first expert, if any, was the learned router's
    active: WideCount  # [L, 3], experts that ran

    @classmethod
    def _zero(cls, num_layers: int) -> Counters:
        """Counters of a new state."""
        return cls(*(WideCount._zero((num_layers, len(TIERS))) for _ in range(3)))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class VARState:
    """What one step passes to the next."""

    cache: ContextCache | None  # of all sequences, or one of each (`cache.each`); None: no cached tier
    recent: Array  # int32 [B, C - 1], the ids before the next position, the latest last; NONE where there are none
    counters: Counters

    @property
    def own_caches(self) -> bool:
        """Whether there is a cached tier, and each sequence has one of its own."""
        return self.cache is not None and context_cache.is_each(self.cache)


def timestamp(seconds: float) -> np.int32:
    """A reading of the clock as an argument of a jitted step, for `plan` and `commit` inside it.

    Args:
        seconds: on any clock that does not go back.

    Returns:
        Milliseconds modulo 2^32, a NumPy scalar (see `varjax.transfer.passing_scalars`).

    Raises:
        InputError: the reading is NaN or infinite.
    """
    try:
        return np.uint32(round(seconds * 1000) & 0xFFFFFFFF).astype(np.int32)
    except (OverflowError, ValueError):
        raise InputError(f"now={seconds!r}: expected finite seconds") from None


def _reading(now: Any) -> Any:
    """int32 []: seconds as milliseconds, or what `timestamp` gave, possibly traced."""
    if getattr(now, "dtype", None) == np.int32:
        return now
    if isinstance(now, numbers.Real):
        return timestamp(float(now))
    raise InputError(
        f"now={now!r}: expected seconds as a float; pass varjax.step.timestamp(seconds) into a jitted step"
    )


def init(table: RouteTable, config: VARConfig, batch_size: int, shared_cache: bool = True) -> VARState:
    """The state before the first step: an empty cache, no recent ids, counters at zero.

    Args:
        table: that will make the plans.
        config: sizes of the cache.
        batch_size: B.
        shared_cache: one cache for all sequences, as in a service, so that the plan of a sequence depends on the ones
            before it and next to it; False: one for each, which a new sequence finds empty.

    Returns:
        The state.
    """
    cache, longest = None, table.context_width
    if config.cache_size > 0:
        window = config.context_window_size
        cache = context_cache.init(config.cache_size, window, table.num_layers, table.top_k)
        cache = cache if shared_cache else context_cache.each(cache, batch_size)
        longest = max(longest, window)
    recent = to_device(np.full((batch_size, longest - 1), NONE, np.int32))
    return VARState(cache, recent, Counters._zero(table.num_layers))


def begin(state: VARState, batch_size: int | None = None, kept: Array | None = None) -> VARState:
    """The state before new sequences, which have no past.

    Counters and a shared cache carry over; caches of the sequences' own start empty, unless `kept` says otherwise.

    Args:
        state: behind other sequences; it stays valid.
        batch_size: B; None: as many as before.
        kept: bool [B], sequences that are another window of the text before them, and keep the cache of their own.

    Returns:
        The state.
    """
    batch = state.recent.shape[0] if batch_size is None else batch_size
    if state.cache is not None and state.own_caches:
        state = replace(state, cache=context_cache.each(state.cache, batch, kept))
    return replace(state, recent=to_device(np.full((batch, state.recent.shape[1]), NONE, np.int32)))


def follow(state: VARState, token_ids: Array, mask: Array | None = None) -> VARState:
    """The state behind tokens that ran without a plan: they are the recent ids now, neither counted nor cached.

    Args:
        state: before them.
        token_ids: int32 [B, T].
        mask: bool [B, T], False at padding; None where there is none.

    Returns:
        The state.
    """
    seen = contexts(token_ids, state.recent, state.recent.shape[1] + 1, mask)
    real = jnp.ones(token_ids.shape, bool) if mask is None else mask
    return replace(state, recent=_recent(state.recent, seen, real))


def plan(
    table: RouteTable,
    state: VARState,
    token_ids: Array,
    now: float | Array,
    settings: Settings,
    mask: Array | None = None,
) -> Plan:
    """What the fast tier knows, else what the cached tier remembers; the rest is left open.

    A cached decision runs as few experts as reach the mass threshold and uses no answers.

    Args:
        table: with L layers.
        state: from `init`, or the `commit` before; it stays valid.
        token_ids: int32 [B, T].
        now: seconds, on the clock of the calls before; under jit an argument made by `timestamp`.
        settings: from the config.
        mask: bool [B, T], False at padding; None where there is none.

    Returns:
        The plan [L, B, T]. It holds the table's answers, which are not copied unless a jitted function returns them.

    Raises:
        InputError: `now` is neither a number nor a timestamp.
    """
    with passing_scalars():
        made = _plan(replace(table, answers=None), state, token_ids, _reading(now), settings, mask)
    return replace(made, answers=table.answers)


@partial(jax.jit, inline=True)
def _plan(
    table: RouteTable, state: VARState, token_ids: Array, now: Array, settings: Settings, mask: Array | None
) -> Plan:
    with jax.named_scope("plan"):
        seen = contexts(token_ids, state.recent, state.recent.shape[1] + 1, mask)
        fast = fast_plan(table, seen)
        if state.cache is None:
            return fast
        window = state.cache.ids.shape[-1]
        hit, cached = context_cache.lookup(state.cache, seen[..., -window:], now, settings.ttl)
        hit &= (fast.tier == LEARNED) & settings.cache_layers[:, None, None]
        kept = slots_for_mass(cached.weights, settings.mass_threshold)
        return Plan(
            tier=jnp.where(hit, jnp.int8(CACHED), fast.tier),
            experts_kept=jnp.where(hit, kept, fast.experts_kept),
            row=jnp.where(hit, NO_ROW, fast.row),
            routing=jax.tree.map(lambda ours, theirs: jnp.where(hit[..., None], ours, theirs), cached, fast.routing),
            rules=fast.rules,
        )


def commit(
    state: VARState,
    plan: Plan,
    token_ids: Array,
    routing: Routing,
    router_probs: Array,
    now: float | Array,
    settings: Settings,
    mask: Array | None = None,
) -> VARState:
    """Remember confident decisions of the learned router, and move the counters and the recent ids on.

    Args:
        state: as given to `plan`; it stays valid.
        plan: the plan under which the model ran.
        token_ids: int32 [B, T], as given to `plan`.
        routing: [L, B, T, K], what ran.
        router_probs: float32 [L, B, T, E], softmax of every layer's gate.
        now: seconds, not before any earlier step's; under jit an argument made by `timestamp`.
        settings: from the config.
        mask: bool [B, T], as given to `plan`.

    Returns:
        The state for the next step.

    Raises:
        InputError: `now` is neither a number nor a timestamp.
    """
    plan = replace(plan, answers=None)
    with passing_scalars():
        return _commit(state, plan, token_ids, routing, router_probs, _reading(now), settings, mask)


@partial(jax.jit, inline=True)
def _commit(
    state: VARState,
    plan: Plan,
    token_ids: Array,
    routing: Routing,
    router_probs: Array,
    now: Array,
    settings: Settings,
    mask: Array | None,
) -> VARState:
    with jax.named_scope("commit"):
        seen = contexts(token_ids, state.recent, state.recent.shape[1] + 1, mask)
        cache = state.cache
        if cache is not None:
            sure = jnp.max(router_probs, axis=-1) >= settings.confidence_threshold
            allowed = (plan.tier == LEARNED) & sure & settings.cache_layers[:, None, None]
            cache = context_cache.insert(cache, seen[..., -cache.ids.shape[-1] :], routing, allowed, now)
        real = jnp.ones(token_ids.shape, bool) if mask is None else mask
        counters = _counted(state.counters, plan, routing, router_probs, real)
        return VARState(cache, _recent(state.recent, seen, real), counters)


def summary(counters: Counters, top_k: int) -> dict[str, Any]:
    """The counters as shares.

    Args:
        counters: of a state.
        top_k: K.

    Returns:
        Over all layers, and per layer under `layers`: `tokens` (layers x tokens), the share of each tier under `tiers`
        (they sum to 1), `hit_rate` (share that was planned), `mispredictions` (share of the planned whose predicted
        first expert was not the learned one), `experts_per_token`, and `experts_share` of the model's K. Without
        tokens every share is 0.
    """
    host = np.stack([np.asarray(one) for one in (counters.tokens, counters.agreements, counters.active)])  # [3, L, 3]
    layers = [_shares(layer, top_k) for layer in host.swapaxes(0, 1)]
    return {**_shares(host.sum(axis=1), top_k), "layers": layers}


def agreed(plan: Plan, router_probs: Array) -> Array:
    """Where no expert was predicted as the first one but the learned router's.

    Where none was predicted nothing could be wrong: open tokens, and those planned by order 0.

    Args:
        plan: [L, B, T].
        router_probs: float32 [L, B, T, E], softmax of every layer's gate.

    Returns:
        bool [L, B, T].
    """
    predicted = plan.routing.experts[..., 0]
    silent = predicted == router_probs.shape[-1]
    return (predicted == jnp.argmax(router_probs, axis=-1).astype(jnp.int32)) | silent | (plan.tier == LEARNED)


def _counted(counters: Counters, plan: Plan, routing: Routing, router_probs: Array, real: Array) -> Counters:
    tier = jnp.arange(len(TIERS), dtype=jnp.int8)[None, None, None]
    of_tier = (plan.tier[..., None] == tier) & real[None, ..., None]  # [L, B, T, 3]
    agree = agreed(plan, router_probs).astype(jnp.int32)
    active = jnp.sum(routing.experts < router_probs.shape[-1], axis=-1, dtype=jnp.int32)

    def total(values: Array) -> Array:
        return jnp.sum(jnp.where(of_tier, values[..., None], 0), axis=(1, 2), dtype=jnp.int32)

    return Counters(
        tokens=counters.tokens.plus(jnp.sum(of_tier, axis=(1, 2), dtype=jnp.int32)),
        agreements=counters.agreements.plus(total(agree)),
        active=counters.active.plus(total(active)),
    )


def _recent(recent: Array, seen: Array, real: Array) -> Array:
    """int32 [B, C - 1]: the context at each sequence's last real position without its earliest id."""
    last = real.shape[1] - 1 - jnp.argmax(real[:, ::-1], axis=1).astype(jnp.int32)
    newest = jnp.take_along_axis(seen, last[:, None, None], axis=1)[:, 0, 1:]
    return jnp.where(jnp.any(real, axis=1, keepdims=True), newest, recent)


def _shares(counts: np.ndarray, top_k: int) -> dict[str, Any]:
    """From int64 [3, 3]: tokens, agreements and active experts of each tier."""
    tokens, agreements, active = counts
    total = max(int(tokens.sum()), 1)
    planned = int(tokens[[FAST, CACHED]].sum())
    agreed = int(agreements[[FAST, CACHED]].sum())
    experts = int(active.sum()) / total
    return {
        "tokens": int(tokens.sum()),
        "tiers": {name: int(count) / total for name, count in zip(TIERS, tokens, strict=True)},
        "hit_rate": planned / total,
        "mispredictions": (planned - agreed) / max(planned, 1),
        "experts_per_token": experts,
        "experts_share": experts / top_k,
    }

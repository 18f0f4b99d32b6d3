"""A model with adaptive routing around it: load, configure, call.

Letters: L layers with experts, B sequences, T positions, K experts per token.

    var_model = VARModel(model, VARConfig.from_routing_stats("results/routing_stats.parquet"))
    state = var_model.init(batch_size=1)
    out, state = var_model(input_ids, state)

The model is known by a protocol only (`RoutedModel`); nothing of it is changed, and nothing here holds state: what the
cache learned and the counters counted is in the `VARState` that the caller passes in and gets back.

Sequences of a batch share the cache, and nothing else. They need not be grouped by tier: the engine sorts the active
assignments of the whole batch by expert, so a dropped one saves the same in any company, while a group of its own
would read the weights of the attention and the head once more.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jax
import numpy as np

from varjax import answersfile, statefile, statsfile, step
from varjax.answers import Answers
from varjax.config import VARConfig
from varjax.errors import InputError, require_integer
from varjax.keys import NONE
from varjax.routing import Plan, Routing
from varjax.stats import RoutingStats
from varjax.step import Settings, VARState
from varjax.table import RouteTable, build
from varjax.transfer import passing_scalars

T = TypeVar("T")


class Network(Protocol):
    """The pure part of a model; hashable, because it is static under jit."""

    def __hash__(self) -> int: ...

    def forward(self, params: Any, token_ids: jax.Array, **options: Any) -> Any:
        """An output with `logits`, `router_probs`, `routing` and `kv`; see `models.decoder.forward`."""


class RoutedModel(Protocol):
    """What VARModel needs of a model; `models.Model` is one."""

    @property
    def config(self) -> Any:
        """With `num_layers` (L, those with experts: others take no part), `num_experts`, `top_k` and `normalize_top_k`
        (the K gate weights are divided by their sum)."""

    @property
    def params(self) -> Any: ...

    @property
    def fingerprint(self) -> str: ...  # tells checkpoints apart

    @property
    def network(self) -> Network: ...

    def empty_cache(self, batch_size: int, capacity: int) -> Any: ...

    def place(self, tree: T) -> T: ...  # arrays moved to the devices that the model runs on, if these are several

    def check_inputs(
        self, input_ids: Any, attention_mask: Any | None = None, *, going_on: bool = False
    ) -> tuple[jax.Array, jax.Array]: ...

    def generate(
        self,
        input_ids: Any,
        max_new_tokens: int,
        *,
        attention_mask: Any | None = None,
        sampling: Any | None = None,
        step: Any | None = None,
        carry: Any = None,
    ) -> tuple[np.ndarray, Any]: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VAROutput:
    """What one call gives. A call for the last logits only gives nothing else but `kv`: a step of decoding is short."""

    logits: jax.Array  # float32 [B, T, V], or [B, 1, V] where only the last position was asked for
    router_probs: jax.Array | None  # float32 [L, B, T, E]
    routing: Routing | None  # [L, B, T, K], the experts that ran; E = unused slot
    plan: Plan | None  # [L, B, T], what was settled before layer 0; None with VAR switched off
    kv: Any  # the key/value cache, where one was passed


class VARModel:
    """A model under a VARConfig. Immutable after construction."""

    def __init__(
        self,
        model: RoutedModel,
        config: VARConfig,
        *,
        table: RouteTable | None = None,
        clock: Callable[[], float] | None = None,
    ):
        """Build the table that `config` describes from its statistics and residual files.

        Args:
            model: a loaded model.
            config: with `routing_stats` set, unless `table` is given or VAR is switched off.
            table: a table built before (`varjax.build_table`).
            clock: seconds from any origin, never going back; None: `time.monotonic`.

        Raises:
            InputError: the files belong to another model, or they or the table do not fit it.
        """
        self.model, self.config = model, config
        self.clock = clock or time.monotonic
        self.table = None
        if config.enable_var:
            if table is not None:
                _check_table(table, model)
            self.table = model.place(build_table(model, config) if table is None else table)
        self.settings = model.place(Settings.of(config, model.config.num_layers))

    def disabled(self) -> VARModel:
        """The same model with VAR switched off: bit for bit the plain one.

        It takes a state of this one and hands it on with the cache and the counters as they are, and with the ids
        that went by, so either may go on with a text that the other began.
        """
        return VARModel(self.model, dataclasses.replace(self.config, enable_var=False), clock=self.clock)

    def init(self, batch_size: int = 1, *, shared_cache: bool = True) -> VARState | None:
        """The state before the first call; None with VAR switched off.

        Args:
            shared_cache: one cached tier for all sequences, over all calls; False: one for each sequence of a call, so
                that what it is given depends on no other (`varjax.step.init`).

        Raises:
            InputError: fewer than one text.
        """
        require_integer("batch_size", batch_size, least=1)
        if self.table is None:
            return None
        return self.model.place(step.init(self.table, self.config, batch_size, shared_cache))

    def __call__(
        self,
        input_ids: Any,
        state: VARState | None,
        attention_mask: Any | None = None,
        now: float | None = None,
    ) -> tuple[VAROutput, VARState | None]:
        """Whole texts, each from its beginning; the cached tier carries over from call to call.

        Args:
            input_ids: integers [B, T].
            state: from `init` or the call before; spent by this call. None only with VAR switched off.
            attention_mask: 1 for real tokens, 0 for padding, [B, T].
            now: as in `advance`.

        Raises:
            InputError: no state, though VAR is on, or inputs that `models.Model.check_inputs` refuses.
        """
        ids, mask = self.model.check_inputs(input_ids, attention_mask)
        return self.advance(self._begin(state, len(ids)), ids, mask, now=now)

    def prefill(
        self,
        input_ids: Any,
        state: VARState | None,
        capacity: int,
        attention_mask: Any | None = None,
        now: float | None = None,
    ) -> tuple[VAROutput, VARState | None]:
        """Begin each text and keep its keys and values in `.kv`, for `advance` to go on from.

        Args:
            input_ids: integers [B, T], padded on the left where the texts differ in length.
            state: from `init` or the call before; spent by this call.
            capacity: positions of the key/value cache, these T and those to come.
            attention_mask: 1 for real tokens, 0 for padding, [B, T].
            now: as in `advance`.

        Returns:
            The logits of the last position, [B, 1, V], with `.kv` and nothing else, and the state.

        Raises:
            InputError: as a call, and for texts that end in padding or do not fit into `capacity`.
        """
        ids, mask = self.model.check_inputs(input_ids, attention_mask, going_on=True)
        require_integer("capacity", capacity, least=1)
        if capacity < ids.shape[1]:
            raise InputError(f"capacity={capacity}: expected at least the {ids.shape[1]} positions of input_ids")
        kv = self.model.empty_cache(len(ids), capacity)
        return self.advance(self._begin(state, len(ids)), ids, mask, kv, last_logits_only=True, now=now)

    def advance(
        self,
        state: VARState | None,
        ids: jax.Array,
        mask: jax.Array,
        kv: Any = None,
        last_logits_only: bool = False,
        now: float | None = None,
    ) -> tuple[VAROutput, VARState | None]:
        """The next int32 [B, T] ids of the sequences that `state` and `kv` have seen so far; both are spent.

        With T = 1 and `last_logits_only`, which leaves out what else there is in `VAROutput`, this is a step of
        decoding. It may last less than a millisecond, so nothing is checked.

        Args:
            now: seconds, on the clock that the earlier calls of `state` were given; None: `clock` says it.
        """
        options = {"kv": kv, "last_logits_only": last_logits_only, "network": self.model.network}
        if self.table is None or state is None:
            state = None if state is None else _follow(state, ids, mask)
            return _plain(self.model.params, ids, mask, **options), state
        moment = step.milliseconds(self.clock() if now is None else now)
        with passing_scalars():
            return routed_forward(self.model.params, self.table, state, ids, mask, moment, self.settings, **options)

    def generate(
        self,
        input_ids: Any,
        state: VARState | None,
        max_new_tokens: int,
        *,
        attention_mask: Any | None = None,
        sampling: Any | None = None,
        clock: Callable[[], float] | None = None,
    ) -> tuple[np.ndarray, VARState | None]:
        """Continue each text under VAR; returns int32 [B, T + new] ids and the state.

        The other arguments, what ends a text, and the errors are those of `models.Model.generate`; `state` is spent by
        this call, unless it raises InputError.

        Args:
            clock: gives `advance` the time of each step, seconds; None: the model's own.
        """
        clock = clock or self.clock
        self.model.check_inputs(input_ids, attention_mask, going_on=True)  # before the state is touched

        def run(kv: Any, state: VARState | None, ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, Any, Any]:
            out, state = self.advance(state, ids, mask, kv, last_logits_only=True, now=clock())
            return out.logits[:, -1], out.kv, state

        state = self._begin(state, len(input_ids))
        options = {"attention_mask": attention_mask, "sampling": sampling}
        return self.model.generate(input_ids, max_new_tokens, step=run, carry=state, **options)

    def _begin(self, state: VARState | None, batch_size: int) -> VARState | None:
        if state is None:
            if self.table is not None:
                raise InputError("VAR is on but state is None; begin with var_model.init(batch_size)")
            return None
        return self.model.place(step.begin(state, batch_size))

    def summary(self, state: VARState | None) -> str:
        """Share per tier and layer, hits and experts per token so far, as a table to print."""
        if state is None:
            return "VAR is switched off: the learned router decides everything."
        return format_summary(step.summary(state.counters, self.model.config.top_k))

    def report(self, state: VARState | None) -> dict[str, Any]:
        """What `summary` prints, as JSON can hold it, with what fills the cache; see `step.summary`.

        `enabled` says whether VAR is on; `cache` holds the contexts `held` and those that there is room for (`size`).
        """
        if state is None:
            return {"enabled": False}
        cache = None
        if state.cache is not None:
            used = np.asarray(state.cache.ids)[..., 0] != NONE
            cache = {"held": int(used.sum()), "size": used.size}
        counted = step.summary(state.counters, self.model.config.top_k)
        return {"enabled": self.table is not None, **counted, "cache": cache}

    def save(self, path: str | Path, state: VARState) -> None:
        """Write the state to a folder, whole or not at all; it is not spent. See `statefile.save`.

        Raises InputError for a state whose sequences have caches of their own: they end with their sequences.
        """
        if state.own_caches:
            raise InputError(
                "the state has a cache for each sequence (shared_cache=False), which ends with it; save a state of "
                "init(shared_cache=True)"
            )
        statefile.save(path, state, step.milliseconds(self.clock()), self._about)

    def load(self, path: str | Path) -> VARState:
        """The state that `save` wrote, under this model and these sizes of the cache; see `statefile.load`.

        Raises InputError naming what differs, FileNotFoundError if nothing was saved there.
        """
        like = self.init()
        if like is None:
            raise InputError("VAR is switched off, so there is no state to load; load it with VAR on (enable_var=True)")
        return self.model.place(statefile.load(path, like, step.milliseconds(self.clock()), self._about))

    @property
    def _about(self) -> dict[str, Any]:
        """What a saved state belongs to. Another table or policy may go on with it."""
        names = ("cache_size", "context_window_size")
        return {"fingerprint": self.model.fingerprint} | {name: getattr(self.config, name) for name in names}


@partial(jax.jit, static_argnames=("network", "last_logits_only"), donate_argnames=("state", "kv"))
def routed_forward(
    params: Any,
    table: RouteTable,
    state: VARState,
    ids: jax.Array,
    mask: jax.Array,
    now: jax.Array,
    settings: Settings,
    *,
    kv: Any,
    network: Network,
    last_logits_only: bool = False,
) -> tuple[VAROutput, VARState]:
    """plan, forward, commit: one pure step. `state` and `kv` are donated."""
    plan = step.plan(table, state, ids, now, settings, mask)
    out = network.forward(
        params,
        ids,
        attention_mask=mask,
        kv=kv,
        plan=plan,
        answers=table.answers,
        last_logits_only=last_logits_only,
    )
    state = step.commit(state, plan, ids, out.routing, out.router_probs, now, settings, mask)
    return _output(out, plan, last_logits_only), state


@partial(jax.jit, static_argnames=("network", "last_logits_only"), donate_argnames="kv")
def _plain(
    params: Any, ids: jax.Array, mask: jax.Array, *, kv: Any, network: Network, last_logits_only: bool
) -> VAROutput:
    out = network.forward(params, ids, attention_mask=mask, kv=kv, last_logits_only=last_logits_only)
    return _output(out, None, last_logits_only)


def _output(out: Any, plan: Plan | None, logits_only: bool) -> VAROutput:
    if logits_only:
        return VAROutput(out.logits, None, None, None, out.kv)
    return VAROutput(out.logits, out.router_probs, out.routing, plan, out.kv)


@jax.jit
def _follow(state: VARState, ids: jax.Array, mask: jax.Array) -> VARState:
    return step.follow(state, ids, mask)


def build_table(model: RoutedModel, config: VARConfig) -> RouteTable:
    """The table that `config`'s files describe, checked against the model that they were collected from.

    Raises InputError naming the file at fault.
    """
    stats, answers = read_files(model, config)
    return build_for(model, stats, config, answers)


def build_for(
    model: RoutedModel,
    stats: RoutingStats,
    config: VARConfig,
    answers: Answers | None = None,
    *,
    keep_shapes: bool = False,
) -> RouteTable:
    """`varjax.table.build` for a model: with its experts per token and its way of weighing them."""
    return build(stats, config, model.config.top_k, answers, model.config.normalize_top_k, keep_shapes)


def read_files(model: RoutedModel, config: VARConfig) -> tuple[RoutingStats, Answers | None]:
    """The statistics and residuals that `config` names.

    Raises InputError if they are another model's, or the residuals belong to other statistics.
    """
    if config.routing_stats is None:
        raise InputError(
            "VARConfig.routing_stats is not set, so there is nothing to look up; "
            "make the config with VARConfig.from_routing_stats(path)"
        )
    stats, meta = statsfile.read(config.routing_stats)
    _check_origin(config.routing_stats, meta, model)
    shape = (len(stats.count), stats.num_experts)
    if shape != (model.config.num_layers, model.config.num_experts):
        raise InputError(
            f"{config.routing_stats}: statistics of {shape[0]} layers and {shape[1]} experts, but the model has "
            f"{model.config.num_layers} and {model.config.num_experts}; collect them with this model"
        )
    if config.residuals is None:
        return stats, None
    answersfile.check_statistics(config.residuals, config.routing_stats)
    answers, meta = answersfile.read(config.residuals)
    _check_origin(config.residuals, meta, model)
    return stats, answers


def _check_table(table: RouteTable, model: RoutedModel) -> None:
    theirs = (table.num_layers, table.num_experts, table.top_k)
    ours = (model.config.num_layers, model.config.num_experts, model.config.top_k)
    if theirs != ours:
        raise InputError(
            f"the table has (layers, experts, experts per token) {theirs}, the model {ours}; build it for this model "
            "(varjax.build_table)"
        )


def _check_origin(path: str, meta: dict[str, Any], model: RoutedModel) -> None:
    origin = meta.get("fingerprint")
    if origin is not None and origin != model.fingerprint:
        raise InputError(
            f"{path}: fingerprint {origin[:12]}… is of another model ({meta.get('model', 'unnamed')}), this one has "
            f"{model.fingerprint[:12]}…; collect the statistics with this model"
        )


def format_summary(shares: dict[str, Any]) -> str:
    """`step.summary` as a table for people."""
    lines = [f"{'layer':>7}{'fast':>8}{'cached':>8}{'learned':>9}{'mispredictions':>12}{'experts/token':>15}"]
    for name, row in [*enumerate(shares["layers"]), ("all", shares)]:
        fast, cached, learned = (row["tiers"][tier] for tier in step.TIERS)
        lines.append(
            f"{name:>7}{fast:>8.1%}{cached:>8.1%}{learned:>9.1%}{row['mispredictions']:>12.1%}"
            f"{row['experts_per_token']:>15.2f}"
        )
    return "\n".join(lines)

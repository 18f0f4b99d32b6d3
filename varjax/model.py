"""A model with adaptive routing around it: load, configure, call.

Letters: L layers with experts, B sequences, T positions, K experts per token.

    config = VARConfig.from_routing_stats("results/routing_stats.parquet")
    table = load_table(model, config, "results/routing_stats.parquet")
    var_model = VARModel(model, config, table)
    state = var_model.init(batch_size=1)
    out, state = var_model(input_ids, state)

The model is known by a protocol only (`RoutedModel`); nothing of it is changed, and nothing here holds state: what the
cache learned and the counters counted is in the `VARState` that the caller passes in and gets back.

Sequences of a batch share the cache and nothing else. They need not be grouped by tier: the engine sorts the active
assignments of the whole batch by expert, so a dropped one saves the same whatever the rest of the batch does, while
separate groups would read the weights of the attention and the head once more.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from varjax import answersfile, statefile, statsfile, step
from varjax.answers import Answers
from varjax.config import VARConfig
from varjax.errors import InputError, require_integer
from varjax.keys import NONE
from varjax.routing import Plan, Routing
from varjax.stats import RoutingStats
from varjax.step import Settings, VARState
from varjax.table import RouteTable, build_table
from varjax.tablefiles import TableFiles
from varjax.transfer import passing_scalars

T = TypeVar("T")


class Generation(NamedTuple):
    """What a call of `generate` gives, with VAR or without."""

    tokens: np.ndarray  # int32 [B, T + new], which begin with the ids that were given
    state: Any  # the VARState behind the last token; None for the plain model


class Network(Protocol):
    """The pure part of a model; hashable, because it is static under jit."""

    def __hash__(self) -> int: ...

    def forward(self, params: Any, token_ids: jax.Array, **options: Any) -> Any:
        """An output with `logits`, `router_probs`, `routing` and `kv`; see `models.decoder.forward`."""
        ...


class RoutedModel(Protocol):
    """What VARModel needs of a model; `models.Model` is one."""

    @property
    def config(self) -> Any:
        """With `num_layers` (L, those with experts), `num_experts`, `top_k`, `hidden_size` and `normalize_top_k`."""

    @property
    def params(self) -> Any:
        """The parameters, a pytree."""

    @property
    def fingerprint(self) -> str:
        """A name that tells checkpoints apart."""

    @property
    def network(self) -> Network:
        """The pure part."""

    def empty_cache(self, batch_size: int, capacity: int) -> Any:
        """A key/value cache for `capacity` positions."""
        ...

    def place(self, tree: T) -> T:
        """Arrays moved to the devices that the model runs on, if there are several."""
        ...

    def check_inputs(self, *args: Any, **options: Any) -> tuple[jax.Array, jax.Array]:
        """Ids int32 and mask bool, [B, T] each; see `models.Model.check_inputs`."""
        ...

    def generate(self, *args: Any, **options: Any) -> Generation:
        """Continue each text; see `models.Model.generate`."""
        ...


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
        table: RouteTable | None = None,
        *,
        clock: Callable[[], float] | None = None,
    ):
        """Put a table's plans around a model.

        Args:
            model: a loaded model.
            config: the settings.
            table: what is looked up (`load_table`, `build_table`); not needed if VAR is switched off.
            clock: seconds from any origin, never going back; None: `time.monotonic`.

        Raises:
            InputError: VAR is on and there is no table, or the table does not fit the model.
        """
        self.model, self.config = model, config
        self.clock = clock or time.monotonic
        self.table = None
        if config.enable_var:
            if table is None:
                raise InputError(
                    "VAR is on, but there is no table; make one with varjax.load_table(model, config, "
                    '"routing_stats.parquet") or varjax.build_table, or set enable_var=False'
                )
            _check_table(table, model)
            self.table = model.place(table)
        self.settings = model.place(Settings.of(config, model.config.num_layers))

    @property
    def digest(self) -> str:
        """SHA-256 of the settings and, where the table was loaded from files, of their contents."""
        return self.config.digest("" if self.table is None else self.table.files_sha256)

    def disabled(self) -> VARModel:
        """The same model with VAR switched off: bit for bit the plain one.

        It takes a state of this one and returns it with the cache and the counters as they are, and with the ids
        that it has read, so either may continue a text that the other began.

        Returns:
            The model without a table.
        """
        return VARModel(self.model, dataclasses.replace(self.config, enable_var=False), clock=self.clock)

    def init(self, batch_size: int = 1, *, shared_cache: bool = True) -> VARState | None:
        """The state before the first call.

        Args:
            batch_size: sequences of a call.
            shared_cache: one cached tier for all sequences, over all calls; False: one for each sequence of a call, so
                that its plan depends on no other sequence (`varjax.step.init`).

        Returns:
            The state; None with VAR switched off.

        Raises:
            InputError: `batch_size` is not an integer of at least 1.
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
        *,
        donate: bool = False,
    ) -> tuple[VAROutput, VARState | None]:
        """Run whole texts, each from its beginning; the cached tier carries over from call to call.

        Args:
            input_ids: integers [B, T].
            state: from `init` or the call before. None only with VAR switched off.
            attention_mask: 1 for real tokens, 0 for padding, [B, T].
            now: as in `advance`.
            donate: as in `advance`.

        Returns:
            The output and the state behind these texts.

        Raises:
            InputError: no state, though VAR is on, or inputs that `models.Model.check_inputs` refuses.
        """
        ids, mask = self.model.check_inputs(input_ids, attention_mask)
        return self.advance(self._begin(state, len(ids)), ids, mask, now=now, donate=donate)

    def prefill(
        self,
        input_ids: Any,
        state: VARState | None,
        capacity: int,
        attention_mask: Any | None = None,
        now: float | None = None,
        *,
        donate: bool = False,
    ) -> tuple[VAROutput, VARState | None]:
        """Begin each text and keep its keys and values in `.kv`, for `advance` to continue from.

        Args:
            input_ids: integers [B, T], padded on the left where the texts differ in length.
            state: from `init` or the call before. None only with VAR switched off.
            capacity: positions of the key/value cache, these T and those to come.
            attention_mask: 1 for real tokens, 0 for padding, [B, T].
            now: as in `advance`.
            donate: as in `advance`.

        Returns:
            The logits of the last position, [B, 1, V], with `.kv` and nothing else, and the state.

        Raises:
            InputError: as a call, and for texts that end in padding or do not fit into `capacity`.
        """
        ids, mask = self.model.check_inputs(input_ids, attention_mask, going_on=True)
        require_integer("capacity", capacity, least=1)
        if capacity < ids.shape[1]:
            raise InputError(f"capacity={capacity}: expected at least the {ids.shape[1]} positions of input_ids")
        state = self._begin(state if donate else copied(state), len(ids))
        kv = self.model.empty_cache(len(ids), capacity)
        return self.advance(state, ids, mask, kv, last_logits_only=True, now=now, donate=True)

    def advance(
        self,
        state: VARState | None,
        ids: jax.Array,
        mask: jax.Array,
        kv: Any = None,
        last_logits_only: bool = False,
        now: float | None = None,
        *,
        donate: bool = False,
    ) -> tuple[VAROutput, VARState | None]:
        """Run the next ids of the sequences that `state` and `kv` have seen so far.

        With T = 1, `last_logits_only` and `donate` this is a step of decoding. It may last less than a millisecond, so
        nothing is checked.

        Args:
            state: from `prefill`, a call or a step before.
            ids: int32 [B, T].
            mask: bool [B, T], False at padding.
            kv: the key/value cache; None: `ids` are whole texts.
            last_logits_only: give the logits of the last position and nothing else but `.kv`.
            now: seconds, on the clock that the earlier calls of `state` were given; None: `clock` says it.
            donate: give up `state` and `kv`, which must not be used again, so that nothing is copied.

        Returns:
            The output and the state behind these ids.
        """
        if not donate and (state is not None or kv is not None):
            state, kv = copied((state, kv))
        options = {"kv": kv, "last_logits_only": last_logits_only, "network": self.model.network}
        if self.table is None or state is None:
            state = None if state is None else _follow(state, ids, mask)
            return _plain(self.model.params, ids, mask, **options), state
        moment = step.timestamp(self.clock() if now is None else now)
        with passing_scalars():
            out, state = routed_forward(
                self.model.params, self.table, state, ids, mask, moment, self.settings, **options
            )
        if out.plan is not None:  # the compiled step would have copied the answers
            out = dataclasses.replace(out, plan=dataclasses.replace(out.plan, answers=self.table.answers))
        return out, state

    def generate(
        self,
        input_ids: Any,
        state: VARState | None,
        max_new_tokens: int,
        *,
        attention_mask: Any | None = None,
        sampling: Any | None = None,
        clock: Callable[[], float] | None = None,
        **options: Any,
    ) -> Generation:
        """Continue each text under VAR.

        What ends a text, and the errors, are as in `models.Model.generate`.

        Args:
            input_ids: integers [B, T], padded on the left where the texts differ in length.
            state: from `init` or the call before. None only with VAR switched off.
            max_new_tokens: the maximum, per text.
            attention_mask: 1 for real tokens, 0 for padding, [B, T].
            sampling: how to choose; None: the most probable token.
            clock: gives the time of each step, seconds; None: the model's own. It is read before each dispatch, once
                for each token that may follow.
            **options: `tokens_per_dispatch` of `models.Model.generate`.

        Returns:
            The tokens and the state behind them.

        Raises:
            InputError: no state, though VAR is on, or inputs that `models.Model.generate` refuses.
        """
        clock = clock or self.clock
        self.model.check_inputs(input_ids, attention_mask, going_on=True)
        state = self._begin(copied(state), len(input_ids))
        return self.model.generate(
            input_ids,
            max_new_tokens,
            attention_mask=attention_mask,
            sampling=sampling,
            step=RoutedStep(self.model.params, self.table, self.settings, self.model.network),
            carry=state,
            clock=lambda: step.timestamp(clock()),
            **options,
        )

    def _begin(self, state: VARState | None, batch_size: int) -> VARState | None:
        if state is None:
            if self.table is not None:
                raise InputError("VAR is on but state is None; begin with var_model.init(batch_size)")
            return None
        return self.model.place(step.begin(state, batch_size))

    def summary(self, state: VARState | None) -> str:
        """Share per tier and layer, hits and experts per token so far, as a table to print.

        Args:
            state: the state behind the last call.

        Returns:
            Several lines of text.
        """
        if state is None:
            return "VAR is switched off: the learned router decides everything."
        return _format_summary(step.summary(state.counters, self.model.config.top_k))

    def report(self, state: VARState | None) -> dict[str, Any]:
        """What `summary` prints, as JSON can hold it, with what fills the cache.

        Args:
            state: the state behind the last call.

        Returns:
            The fields of `varjax.step.summary`; `enabled`, whether VAR is on; and `cache` with the number of contexts
            `held` and of those that there is room for (`size`), None without a cached tier.
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
        """Write the state to a folder, whole or not at all; see `varjax.statefile.save`.

        Args:
            path: the folder.
            state: with a cached tier that all sequences share, or none.

        Raises:
            InputError: the sequences of the state have caches of their own, which end with them.
        """
        if state.own_caches:
            raise InputError(
                "the state has a cache for each sequence (shared_cache=False), which ends with it; save a state of "
                "init(shared_cache=True)"
            )
        statefile.save(path, state, self.clock(), self._about)

    def load(self, path: str | Path) -> VARState:
        """The state that `save` wrote, under this model and these sizes of the cache; see `varjax.statefile.load`.

        Args:
            path: the folder.

        Returns:
            The state, whose ages continue from when it was saved.

        Raises:
            FileNotFoundError: nothing was saved there.
            InputError: VAR is switched off, or naming what differs from this model and config.
        """
        like = self.init()
        if like is None:
            raise InputError("VAR is switched off, so there is no state to load; load it with VAR on (enable_var=True)")
        return self.model.place(statefile.load(path, like, self.clock(), self._about))

    @property
    def _about(self) -> dict[str, Any]:
        """What a saved state belongs to. Another table or policy may go on with it."""
        names = ("cache_size", "context_window_size")
        return {"fingerprint": self.model.fingerprint} | {name: getattr(self.config, name) for name in names}


@jax.jit
def copied(tree: T) -> T:
    """A copy of a pytree of arrays, so that the caller's stay valid when a compiled step takes the copy's memory.

    Args:
        tree: a state, a key/value cache, or None.

    Returns:
        The same with memory of its own.
    """
    return jax.tree.map(jnp.copy, tree)


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
    """plan, forward, commit: one compiled step of a library loop, whose `state` and `kv` are donated.

    Args:
        params: the model's.
        table: the model's.
        state: given up, not to be used again.
        ids: int32 [B, T].
        mask: bool [B, T], False at padding.
        now: from `varjax.step.timestamp`.
        settings: from the config.
        kv: the key/value cache, given up; None: `ids` are whole texts.
        network: static.
        last_logits_only: static; as in `VARModel.advance`.

    Returns:
        The output and the next state. The output's plan lacks the answers, which would be copied.
    """
    plan = step.plan(table, state, ids, now, settings, mask)
    out = network.forward(params, ids, attention_mask=mask, kv=kv, plan=plan, last_logits_only=last_logits_only)
    state = step.commit(state, plan, ids, out.routing, out.router_probs, now, settings, mask)
    return _output(out, plan, last_logits_only), state


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoutedStep:
    """A step of generation (`models.generation.Step`) under VAR, or of the plain model without a table."""

    params: Any
    table: RouteTable | None
    settings: Settings
    network: Network = dataclasses.field(metadata={"static": True})

    def __call__(
        self, kv: Any, state: VARState | None, ids: jax.Array, mask: jax.Array, now: jax.Array
    ) -> tuple[jax.Array, Any, VARState | None]:
        """Run the next ids of each text.

        Args:
            kv: the key/value cache so far.
            state: the state so far; None only without a table.
            ids: int32 [B, T].
            mask: bool [B, T], False at padding.
            now: from `varjax.step.timestamp`.

        Returns:
            The logits float32 [B, V] of the last position, and the next `kv` and state.
        """
        options = {"kv": kv, "network": self.network, "last_logits_only": True}
        if self.table is None or state is None:
            state = None if state is None else _follow(state, ids, mask)
            out = _plain(self.params, ids, mask, **options)
        else:
            out, state = routed_forward(self.params, self.table, state, ids, mask, now, self.settings, **options)
        return out.logits[:, -1], out.kv, state


@partial(jax.jit, static_argnames=("network", "last_logits_only"), donate_argnames="kv")
def _plain(
    params: Any, ids: jax.Array, mask: jax.Array, *, kv: Any, network: Network, last_logits_only: bool
) -> VAROutput:
    out = network.forward(params, ids, attention_mask=mask, kv=kv, last_logits_only=last_logits_only)
    return _output(out, None, last_logits_only)


def _output(out: Any, plan: Plan | None, logits_only: bool) -> VAROutput:
    if logits_only:
        return VAROutput(out.logits, None, None, None, out.kv)
    plan = None if plan is None else dataclasses.replace(plan, answers=None)
    return VAROutput(out.logits, out.router_probs, out.routing, plan, out.kv)


@jax.jit
def _follow(state: VARState, ids: jax.Array, mask: jax.Array) -> VARState:
    return step.follow(state, ids, mask)


def build_for(
    model: RoutedModel,
    config: VARConfig,
    stats: RoutingStats,
    answers: Answers | None = None,
    *,
    keep_shapes: bool = False,
) -> RouteTable:
    """`varjax.build_table` with a model's experts per token and its way of weighing them.

    Args:
        model: the model that the statistics belong to.
        config: the policies.
        stats: what the routers did at each key.
        answers: the experts' mean outputs; None: there are none.
        keep_shapes: as in `varjax.build_table`.

    Returns:
        The table.
    """
    top_k, normalize = model.config.top_k, model.config.normalize_top_k
    return build_table(config, stats, answers, top_k=top_k, normalize=normalize, keep_shapes=keep_shapes)


def load_table(
    model: RoutedModel,
    config: VARConfig,
    routing_stats: str | os.PathLike[str],
    answers: str | os.PathLike[str] | None = None,
    *,
    keep_shapes: bool = False,
) -> RouteTable:
    """The table that files describe, checked against the model that they were collected from.

    Args:
        model: a loaded model.
        config: the policies.
        routing_stats: Parquet file of the statistics.
        answers: safetensors file of the answers; None: the one next to the statistics, if there is one.
        keep_shapes: as in `varjax.build_table`.

    Returns:
        The table.

    Raises:
        FileNotFoundError: one of the files does not exist.
        InputError: naming the file at fault, or each layer whose policy does not fit.
    """
    files = TableFiles.find(routing_stats, answers)
    table = build_for(model, config, *load_statistics(model, files), keep_shapes=keep_shapes)
    return dataclasses.replace(table, files_sha256=files.digest())


def load_statistics(model: RoutedModel, files: TableFiles) -> tuple[RoutingStats, Answers | None]:
    """The statistics and answers of a table, checked against the model that they were collected from.

    Args:
        model: a loaded model.
        files: their paths.

    Returns:
        The statistics and the answers; None for answers that are not there.

    Raises:
        FileNotFoundError: one of the files does not exist.
        InputError: a file cannot be read or is of another model, or the answers belong to other statistics.
    """
    stats, meta = statsfile.read(files.routing_stats)
    _check_origin(files.routing_stats, meta, model)
    shape = (len(stats.count), stats.num_experts)
    if shape != (model.config.num_layers, model.config.num_experts):
        raise InputError(
            f"{files.routing_stats}: statistics of {shape[0]} layers and {shape[1]} experts, but the model has "
            f"{model.config.num_layers} and {model.config.num_experts}; collect them with this model"
        )
    if files.answers is None:
        return stats, None
    answersfile.check_statistics(files.answers, files.routing_stats)
    answers, meta = answersfile.read(files.answers)
    _check_origin(files.answers, meta, model)
    return stats, answers


def _check_table(table: RouteTable, model: RoutedModel) -> None:
    if not isinstance(table, RouteTable):
        raise InputError(f"table={table!r}: expected a RouteTable; make one with varjax.load_table")
    theirs = (table.num_layers, table.num_experts, table.top_k)
    ours = (model.config.num_layers, model.config.num_experts, model.config.top_k)
    if theirs != ours:
        raise InputError(
            f"the table has (layers, experts, experts per token) {theirs}, the model {ours}; build it for this model "
            "(varjax.load_table)"
        )
    hidden = model.config.hidden_size
    for layer, known in enumerate(table.answers or ()):
        sizes = {"answers": known.answers.shape[1]}
        if known.affine is not None:
            sizes |= {"maps that read": known.affine.read.shape[0], "maps that write": known.affine.write.shape[1]}
        wrong = [f"{what} {size}" for what, size in sizes.items() if size != hidden]
        if wrong:
            raise InputError(
                f"the table has, in layer {layer}, {', '.join(wrong)} numbers, but the model's hidden size is "
                f"{hidden}; build it from answers that were collected with this model"
            )


def _check_origin(path: str, meta: dict[str, Any], model: RoutedModel) -> None:
    origin = meta.get("fingerprint")
    if origin is not None and origin != model.fingerprint:
        raise InputError(
            f"{path}: fingerprint {origin[:12]}… is of another model ({meta.get('model', 'unnamed')}), this one has "
            f"{model.fingerprint[:12]}…; collect the statistics with this model"
        )


def _format_summary(shares: dict[str, Any]) -> str:
    """`step.summary` as a table for people."""
    lines = [f"{'layer':>7}{'fast':>8}{'cached':>8}{'learned':>9}{'mispredictions':>15}{'experts/token':>15}"]
    for name, row in [*enumerate(shares["layers"]), ("all", shares)]:
        fast, cached, learned = (row["tiers"][tier] for tier in step.TIERS)
        lines.append(
            f"{name:>7}{fast:>8.1%}{cached:>8.1%}{learned:>9.1%}{row['mispredictions']:>15.1%}"
            f"{row['experts_per_token']:>15.2f}"
        )
    return "\n".join(lines)

"""One call of a model, plain or under VAR, as a pure step; the inputs of several calls in a row; and what they run.

Letters: L layers, B sequences, T positions, E experts.

The profiler trace, the untraced clock and XLA's cost analysis all use this step, so they describe the same program. It
is what `VARModel.__call__` (prefill: whole texts, all logits) and `VARModel.advance` (decode: one token each, last
logits) run, without their few lines of Python.

A prefill reads the same texts in every call. Decoding continues through the second halves of the texts, one token of
each sequence per call, with the first halves in the key/value cache. Every round of calls starts from a copy of the
same state, because a cache that already knew the text would make VAR look too good.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Traced

from models.config import MoEConfig
from profiling.costs import Mix, Workload, table_bytes
from varjax.errors import InputError
from varjax.model import VARModel, routed_forward
from varjax.step import VARState, timestamp
from varjax.table import RouteTable

T = TypeVar("T")

PHASES = ("prefill", "decode")
_THREADS = 4  # at most: what one job runs takes device memory next to what the others run


class Fixed(NamedTuple):
    """What a step reads and keeps."""

    params: Any
    table: Any  # None: VAR is switched off
    settings: Any
    now: Any  # ms


class Carry(NamedTuple):
    """What a step consumes and returns."""

    kv: Any
    state: VARState | None


Step = Callable[[Fixed, Carry, jax.Array], tuple[Carry, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Calls:
    """A step and the calls to make of it."""

    step: Step  # pure, not jitted
    fixed: Fixed
    carry: Carry  # before the first call; it must not be donated
    inputs: list[jax.Array]  # int32 [B, T], one per call

    def traced(self) -> Traced:
        """The jitted step, traced for these calls.

        Returns:
            What `xla.analyze` takes.
        """
        return _jitted(self.step).trace(self.fixed, self.carry, self.inputs[0])

    def each(self, rounds: int = 1) -> Iterator[Callable[[], Any]]:
        """The calls one by one, to be made in this order; each round starts from a fresh copy of the carry.

        Args:
            rounds: how often the calls are repeated.

        Yields:
            Functions that make one call and return its logits.
        """
        step = _jitted(self.step)
        for _ in range(rounds):
            held = [jax.block_until_ready(jax.tree.map(jnp.copy, self.carry))]
            for ids in self.inputs:
                yield partial(_call, step, self.fixed, held, ids)


def sides(var_model: VARModel) -> dict[str, VARModel]:
    """The models to compare.

    Args:
        var_model: a model with VAR on or off.

    Returns:
        "plain" -> the plain model and, unless VAR is switched off, "VAR" -> the model under VAR.
    """
    plain = {"plain": var_model.disabled()}
    return plain if var_model.table is None else plain | {"VAR": var_model}


def prepare(var_model: VARModel, ids: np.ndarray, phase: str, max_calls: int = 16) -> Calls:
    """The calls that read some texts.

    Args:
        var_model: the model, VAR on or off.
        ids: int32 [B, T], the texts; all positions are real.
        phase: "prefill" or "decode".
        max_calls: tokens of each text that decoding reads at most.

    Returns:
        One call of a prefill, or one per token decoded.

    Raises:
        InputError: an unknown phase, or texts too short to decode.
    """
    if phase not in PHASES:
        raise InputError(f"phase={phase!r}: expected one of {', '.join(PHASES)}")
    batch, length = ids.shape
    fixed = Fixed(var_model.model.params, var_model.table, var_model.settings, timestamp(var_model.clock()))
    step = _stepping(var_model.model.network, phase == "decode")
    if phase == "prefill":
        return Calls(step, fixed, Carry(None, var_model.init(batch)), [jnp.asarray(ids)])
    if length < 2:
        raise InputError(f"texts of {length} positions: decoding needs at least 2, half of them are read beforehand")
    half = length // 2
    inputs = [jnp.asarray(ids[:, at : at + 1]) for at in range(half, min(length, half + max_calls))]
    out, state = var_model.prefill(ids[:, :half], var_model.init(batch), capacity=length)
    return Calls(step, fixed, Carry(out.kv, state), inputs)


@cache
def _jitted(step: Step) -> Any:
    """The step as it is run: its carry is donated."""
    return jax.jit(step, donate_argnums=1, keep_unused=True)  # traces and XLA's account need all arguments


def at_once(jobs: Iterable[Callable[[], T]]) -> list[T]:
    """Run jobs that mostly compile, several at the same time: XLA compiles on one core and releases Python's lock.

    Args:
        jobs: functions; an error in one of them is raised here.

    Returns:
        Their results, in order.
    """
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda job: job(), jobs))


def used_experts(var_model: VARModel, ids: np.ndarray) -> np.ndarray:
    """Which experts run at each token of whole texts.

    Args:
        var_model: the model, VAR on or off.
        ids: int32 [B, T].

    Returns:
        bool [L, B, T, E].
    """
    out, _ = var_model(ids, var_model.init(len(ids)))
    assert out.routing is not None
    return np.any(np.asarray(out.routing.experts)[..., None] == np.arange(var_model.model.config.num_experts), axis=-2)


def workload_and_mix(var_model: VARModel, ids: np.ndarray, phase: str) -> tuple[Workload, Mix]:
    """What one call of a phase computes on some texts, in the terms of `profiling.costs`.

    Args:
        var_model: the model, VAR on or off.
        ids: int32 [B, T].
        phase: "prefill" or "decode"; a decoding step is one in the middle of the texts.

    Returns:
        The shapes of the call, and its mix of experts and answers.
    """
    config, (batch, length) = var_model.model.config, ids.shape
    decodes = phase == "decode"
    # Text by text: one program for any batch size.
    used = np.concatenate([used_experts(var_model, text[None]) for text in ids], axis=1)  # [L, B, T, E]
    experts = float(used.sum(-1).mean())
    mix = Mix(min(experts, config.top_k), float(used.any(axis=1 if decodes else (1, 2)).sum(-1).mean()))
    if var_model.table is not None:
        tokens = batch * (1 if decodes else length)
        mix = planned(mix, config, var_model.table, tokens, orders=len(var_model.table.ngram_orders))
    itemsize = jax.tree.leaves(var_model.model.params)[0].dtype.itemsize
    if decodes:
        return Workload(batch, 1, length // 2, length, last_logits_only=True, itemsize=itemsize), mix
    return Workload(batch, length, itemsize=itemsize), mix


def planned(mix: Mix, config: MoEConfig, table: RouteTable, tokens: int, orders: int) -> Mix:
    """Add to a mix what a table does: its plan, and the answers that replace the experts left out.

    Args:
        mix: what runs.
        config: the model.
        table: what is looked up.
        tokens: N of the call.
        orders: context orders looked up per token.

    Returns:
        The mix of a call under VAR.
    """
    rank = answer_rank(table)
    return dataclasses.replace(
        mix,
        answers=max(config.top_k - mix.experts, 0.0) if table.answers else 0.0,
        planned=True,
        table_bytes=table_bytes(config, tokens, orders),
        answer_rank=rank,
        mapped=float(np.mean([known.affine is not None for known in table.answers or ()])) if rank else 1.0,
    )


def answer_rank(table: RouteTable) -> int:
    """The rank of the maps of a table's answers, the same in all layers that have one.

    Args:
        table: what is looked up.

    Returns:
        r; 0 where no layer has a map.
    """
    maps = [known.affine for known in table.answers or () if known.affine is not None]
    return maps[0].read.shape[1] if maps else 0


@cache
def _stepping(network: Any, decoding: bool) -> Step:
    """The same function for the same network, so that it is compiled once."""
    return partial(_step, network=network, decoding=decoding)


def _step(fixed: Fixed, carry: Carry, ids: jax.Array, *, network: Any, decoding: bool) -> tuple[Carry, jax.Array]:
    mask = jnp.ones(ids.shape, bool)
    options = {"kv": carry.kv, "last_logits_only": decoding}
    if carry.state is None:
        out = network.forward(fixed.params, ids, attention_mask=mask, **options)
        return Carry(out.kv, None), out.logits
    out, state = routed_forward(
        fixed.params, fixed.table, carry.state, ids, mask, fixed.now, fixed.settings, network=network, **options
    )
    return Carry(out.kv, state), out.logits


def _call(step: Any, fixed: Fixed, held: list[Carry], ids: jax.Array) -> jax.Array:
    held[0], logits = step(fixed, held[0], ids)
    return logits

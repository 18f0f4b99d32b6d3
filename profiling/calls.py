"""One call of a model, with VAR or without, as a pure step; and the inputs of several calls in a row.

Letters: B sequences, T positions.

Trace, ablation and the untraced clock all run this step, so that they speak of the same program. It is what
`VARModel.__call__` (prefill: whole texts, all logits) and `VARModel.advance` (decode: one token each, last logits) run,
less their few lines of Python.

A prefill reads the same texts in every call. Decoding goes on through the second halves of the texts, one token of each
sequence per call, their first halves in the key/value cache. Every round of calls begins from a copy of the same state:
a cache that knew this very text would flatter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Traced

from varjax.errors import InputError
from varjax.model import VARModel, routed_forward
from varjax.step import VARState, timestamp

PHASES = ("prefill", "decode")


class Fixed(NamedTuple):
    """What a step reads and keeps."""

    params: Any
    table: Any  # None: VAR is switched off
    settings: Any
    now: Any  # ms


class Carry(NamedTuple):
    """What a step spends and gives back."""

    kv: Any
    state: VARState | None


Step = Callable[[Fixed, Carry, jax.Array], tuple[Carry, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Calls:
    """A step and the calls to make of it."""

    phase: str
    batch: int  # B
    length: int  # T of one call
    cached: int  # positions in the key/value cache before the first call
    step: Step  # pure, not jitted
    fixed: Fixed
    carry: Carry  # before the first call; not to be spent
    inputs: list[jax.Array]  # int32 [B, T], one per call

    def traced(self) -> Traced:
        """The step as it is run, traced for these calls: what `programs.describe` and `xla_costs.analyze` take."""
        return jitted(self.step).trace(self.fixed, self.carry, self.inputs[0])

    def fresh(self) -> Carry:
        """A copy of the first carry, to be spent."""
        return jax.block_until_ready(jax.tree.map(jnp.copy, self.carry))

    def each(self, step: Any, rounds: int = 1) -> Iterator[Callable[[], Any]]:
        """The calls of a jitted `step` one by one, to be made in this order; copies are made between the rounds."""
        for _ in range(rounds):
            held = [self.fresh()]
            for ids in self.inputs:
                yield partial(_call, step, self.fixed, held, ids)


def sides(var_model: VARModel) -> dict[str, VARModel]:
    """What is compared, by name: the plain model and, unless VAR is switched off, the model under VAR."""
    plain = {"plain": var_model.disabled()}
    return plain if var_model.table is None else plain | {"VAR": var_model}


def prepare(var_model: VARModel, ids: np.ndarray, phase: str, max_calls: int = 16) -> Calls:
    """The calls that read texts.

    Args:
        ids: int32 [B, T], the texts, all positions real.
        phase: "prefill" or "decode".
        max_calls: tokens of each text that decoding reads at most.

    Raises:
        InputError: an unknown phase, or texts too short to decode.
    """
    if phase not in PHASES:
        raise InputError(f"phase={phase!r}: expected one of {', '.join(PHASES)}")
    batch, length = ids.shape
    fixed = Fixed(var_model.model.params, var_model.table, var_model.settings, timestamp(var_model.clock()))
    step = _stepping(var_model.model.network, phase == "decode")
    if phase == "prefill":
        carry = Carry(None, var_model.init(batch))
        return Calls(phase, batch, length, 0, step, fixed, carry, [jnp.asarray(ids)])
    if length < 2:
        raise InputError(f"texts of {length} positions: decoding needs 2 at least, half of them are read beforehand")
    half = length // 2
    inputs = [jnp.asarray(ids[:, at : at + 1]) for at in range(half, min(length, half + max_calls))]
    out, state = var_model.prefill(ids[:, :half], var_model.init(batch), capacity=length)
    return Calls(phase, batch, 1, half, step, fixed, Carry(out.kv, state), inputs)


@cache
def _stepping(network: Any, decoding: bool) -> Step:
    """The same function for the same network: whoever asks again compiles nothing anew."""
    return partial(_step, network=network, decoding=decoding)


@cache
def jitted(step: Step) -> Any:
    """The step as it is run: what it carries is spent."""
    return jax.jit(step, donate_argnums=1, keep_unused=True)  # `programs.describe` wants all arguments


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

"""What the rules of `profiling.bottlenecks` judge by, measured on one model, one policy and some texts.

Letters: B sequences, T positions.

    breakdowns = measure_sides(var_model, texts, folder="traces")
    for found in gather(var_model, texts, breakdowns):
        bottlenecks(found)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from analysis.evaluate.losses import SECONDS_PER_TOKEN
from profiling.bottlenecks import Evidence
from profiling.calls import jitted, prepare, sides
from profiling.ceilings import Ceilings
from profiling.components import Breakdown
from profiling.costs import component_costs
from profiling.scaling import Scaling
from profiling.scopes import OTHER
from profiling.throughput import used_experts
from profiling.timing import compare, paired_ratio
from profiling.workload import Mix, Workload, table_bytes
from varjax.model import VARModel
from varjax.step import Counters, summary


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
    """One piece of evidence per phase. Where VAR is switched off, it is about the plain model alone.

    Args:
        texts: phase -> int32 [B, T], those that `breakdowns` were measured on.
        breakdowns: of every side and phase.
        ceilings: of this machine, to tell what waits for memory; None: that is left open.
        scalings: of a performance study; None of a phase leaves its scaling open.
        rounds: of timing.
    """
    found = []
    for phase, ids in texts.items():
        times = {one.side: one.by_trace for one in breakdowns if one.phase == phase}
        scales = [one for one in scalings if one.phase == phase]
        open_questions: dict[str, Any] = {
            "waiting": None if ceilings is None else _waiting(var_model, ids, phase, ceilings),
            "exponent": (scales[-1].exponent, scales[-1].expected) if scales else None,
        }
        if var_model.table is None:
            alone, k = times["plain"], float(var_model.model.config.top_k)
            found.append(
                Evidence(
                    phase=phase,
                    batch=len(ids),
                    plain=alone,
                    var=alone,
                    experts=(k, k),
                    overhead=alone[OTHER],
                    **open_questions,
                )
            )
            continue
        compared = sides(var_model)
        cached = var_model.config.cache_size > 0
        if cached:
            config = dataclasses.replace(var_model.config, cache_size=0)
            compared["no cache"] = VARModel(var_model.model, config, table=var_model.table, clock=var_model.clock)
        seconds = _seconds(compared, ids, phase, rounds, seed)
        shares = summary(_counters(var_model, ids, phase), var_model.model.config.top_k)
        experts = (float(var_model.model.config.top_k), shares["experts_per_token"])
        found.append(
            Evidence(
                phase=phase,
                batch=len(ids),
                plain=times["plain"],
                var=times["VAR"],
                speedup=paired_ratio(seconds["plain"], seconds["VAR"]),
                experts=experts,
                tiers=shares["tiers"],
                cached_tier=cached,
                overhead=times["VAR"][OTHER],
                **open_questions,
                tried={"cache use": paired_ratio(seconds["VAR"], seconds["no cache"]).value} if cached else {},
            )
        )
    return found


def _counters(var_model: VARModel, ids: np.ndarray, phase: str) -> Counters:
    """What the tiers decided on texts int32 [B, T], one call after the other, so that a cached tier may learn.

    It ages by tokens, not by the machine's clock. A prefill reads one text per call, a step of decoding one token of
    each.
    """
    if phase == "prefill":
        state = var_model.init(1)
        for number, text in enumerate(ids):
            _, state = var_model(text[None], state, now=number * len(text) * SECONDS_PER_TOKEN, donate=True)
    else:
        out, state = var_model.prefill(ids[:, :1], var_model.init(len(ids)), capacity=ids.shape[1], now=0.0)
        kv, real = out.kv, jnp.ones((len(ids), 1), bool)
        for at in range(1, ids.shape[1]):
            following, now = jnp.asarray(ids[:, at : at + 1]), at * SECONDS_PER_TOKEN
            out, state = var_model.advance(state, following, real, kv, last_logits_only=True, now=now, donate=True)
            kv = out.kv
    assert state is not None  # VAR is on
    return state.counters


def _seconds(
    compared: Mapping[str, VARModel], ids: np.ndarray, phase: str, rounds: int, seed: int
) -> dict[str, np.ndarray]:
    """float64 [rounds] per side: a round's calls one after the other."""

    def runner(side: VARModel) -> Callable[[], jax.Array]:
        calls = prepare(side, ids, phase)
        step = jitted(calls.step)

        def run() -> jax.Array:
            for call in calls.each(step):
                out = call()
            return out

        return run

    return compare({name: runner(side) for name, side in compared.items()}, rounds, seed=seed)


def _waiting(var_model: VARModel, ids: np.ndarray, phase: str, ceilings: Ceilings) -> dict[str, bool]:
    """By component, whether its bytes take longer than its operations, at the machine's ceilings."""
    workload, mix = workload_and_mix(var_model, ids, phase)
    costs = component_costs(var_model.model.config, workload, mix)
    return {name: one.bytes / ceilings.memory > one.flops / ceilings.product for name, one in costs.items()}


def workload_and_mix(var_model: VARModel, ids: np.ndarray, phase: str) -> tuple[Workload, Mix]:
    """What one call of a phase is asked to do on texts int32 [B, T], as `profiling.costs` counts it.

    VAR may be off. A step of decoding is one at the middle of the texts.
    """
    model, table, (batch, length) = var_model.model, var_model.table, ids.shape
    config = model.config
    # bool [L, B, T, E]; text by text, as `_counters` reads them: one program for both.
    used = np.concatenate([used_experts(var_model, text[None]) for text in ids], axis=1)
    decodes = phase == "decode"
    distinct = float(used.any(axis=1 if decodes else (1, 2)).sum(-1).mean())
    experts = float(used.sum(-1).mean())
    mix = Mix(min(experts, config.top_k), distinct)
    if table is not None:
        answered = config.top_k - experts if table.answers is not None else 0.0
        read = table_bytes(config, batch * (1 if decodes else length), orders=len(table.ngram_orders))
        mix = dataclasses.replace(mix, answers=max(answered, 0.0), planned=True, table_bytes=read)
    itemsize = jax.tree.leaves(model.params)[0].dtype.itemsize
    if decodes:
        held = {"cached": length // 2, "capacity": length}
        return Workload(batch, 1, **held, last_logits_only=True, itemsize=itemsize), mix
    return Workload(batch, length, itemsize=itemsize), mix

"""The device memory that a call needs at its peak: predicted from shapes, and as XLA laid the compiled program out.

Letters: N tokens, B sequences, S keys that they see, D hidden size, G key/value heads, H query heads, K slots per
token.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np

from analysis.report.report import Column, Section, Table
from models.config import MoEConfig
from profiling.calls import prepare, sides
from profiling.compiling import at_once
from profiling.costs import computed, parameters
from profiling.workload import FLOAT32, Workload
from profiling.xla_costs import analyze
from varjax.model import VARModel

NAME = "memory"

STREAMS = 3  # arrays [N, D] beside the scores: the residual stream, its norm, and queries or attention's output


@dataclass(frozen=True)
class Peak:
    """Of one kind of call; bytes."""

    side: str  # "plain" or "VAR"
    batch: int
    length: int
    predicted: float
    allocated: int  # by XLA, arguments included

    @property
    def relative(self) -> float:
        return self.predicted / self.allocated - 1


def prefill_peaks(var_model: VARModel, shapes: Iterable[tuple[int, int]]) -> list[Peak]:
    """Of whole texts of these shapes [B, T], on every side; nothing is run."""
    compared = sides(var_model).items()
    return at_once(partial(_prefill_peak, *side, *shape) for shape in dict.fromkeys(shapes) for side in compared)


def peak_memory(config: MoEConfig, workload: Workload, *, held: int = 0, answers: bool = False) -> float:
    """Bytes: what the call is given, what it gives back and what stands in between where that is most, in attention.

    Between: the scores of a layer and their softmax, all blocks of queries together; the layer's keys and values, in
    the order that products want; `STREAMS` arrays [N, D]; the gathered answers [N, K, D] where VAR adds some. A donated
    cache is given back in its own place.

    Args:
        held: bytes of VAR's table and state.
    """
    pairs, _ = computed(workload)
    slots, key_values = workload.capacity or 0, 2 * config.num_kv_heads * config.head_dim
    cache = config.depth * workload.batch * slots * key_values
    logits = (workload.batch if workload.last_logits_only else workload.tokens) * config.vocab_size
    rows = STREAMS + (config.top_k if answers else 0)
    between = (
        2 * workload.batch * config.num_heads * pairs
        + workload.batch * (slots or workload.length) * key_values
        + rows * workload.tokens * config.hidden_size
    )
    return held + workload.itemsize * (parameters(config) + cache) + FLOAT32 * (logits + between)


def section(found: Iterable[Peak]) -> Section:
    """How the peak grows with batch and length, against the prediction."""
    rows = tuple(
        (one.side, one.batch, one.length, one.predicted / 1e6, one.allocated / 1e6, one.relative) for one in found
    )
    if not rows:
        return Section(NAME, _TITLE, "not measured", "left out of a quick run")
    columns = (
        *(Column("side"), Column("batch"), Column("length"), Column("predicted [MB]", ",.1f")),
        *(Column("XLA [MB]", ",.1f"), Column("error", "+.1%")),
    )
    worst = max(rows, key=lambda row: abs(row[-1]))
    return Section(
        NAME,
        _TITLE,
        "reported",
        f"predicted from shapes and as XLA laid the program out; farthest off: {worst[-1]:+.1%}, {worst[0]}, "
        f"{worst[1]} x {worst[2]}",
        (),
        (Table("Peak memory of a prefill", columns, rows),),
    )


_TITLE = "How much memory does a call need?"


def _prefill_peak(side: str, var_model: VARModel, batch: int, length: int) -> Peak:
    calls = prepare(var_model, np.zeros((batch, length), np.int32), "prefill")
    held = sum(leaf.nbytes for leaf in jax.tree.leaves((calls.fixed.table, calls.carry.state)))
    table = var_model.table
    predicted = peak_memory(
        var_model.model.config,
        Workload(batch, length, itemsize=jax.tree.leaves(calls.fixed.params)[0].dtype.itemsize),
        held=held,
        answers=table is not None and table.answers is not None,
    )
    return Peak(side, batch, length, predicted, analyze(calls.traced()).peak_bytes)

"""What a call costs, counted from its shapes, beside what XLA says of the compiled program."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from analysis.report.report import Column, Section, Table
from profiling.calls import prepare, sides
from profiling.compiling import at_once
from profiling.costs import COMPONENTS, Cost, component_costs
from profiling.evidence import workload_and_mix
from profiling.xla_costs import XlaCost, analyze, explain
from varjax.model import VARModel

NAME = "costs"


@dataclass(frozen=True)
class CallCosts:
    """One call, counted in two ways."""

    side: str  # "plain" or "VAR"
    phase: str
    batch: int
    needed: dict[str, Cost]  # by component
    written: dict[str, Cost]  # what the code does
    xla: XlaCost


def count(var_model: VARModel, texts: Mapping[str, np.ndarray]) -> list[CallCosts]:
    """Of every side and phase.

    Args:
        texts: phase -> int32 [B, T].
    """
    compared = sides(var_model).items()
    return at_once(partial(_count, *side, phase, ids) for phase, ids in texts.items() for side in compared)


def _count(side: str, var_model: VARModel, phase: str, ids: np.ndarray) -> CallCosts:
    workload, mix = workload_and_mix(var_model, ids, phase)
    xla = analyze(prepare(var_model, ids, phase).traced())
    given = (var_model.model.config, workload, mix)
    needed, written = component_costs(*given), component_costs(*given, as_written=True)
    return CallCosts(side, phase, len(ids), needed, written, xla)


def section(found: Sequence[CallCosts]) -> Section:
    totals = tuple(_total(one) for one in found)
    columns = (
        *(Column("call"), Column("MFLOP", ",.2f"), Column("as written", ",.2f"), Column("XLA", ",.2f")),
        *(Column("MB", ",.2f"), Column("as written", ",.2f"), Column("XLA", ",.2f"), Column("peak memory, MB", ",.1f")),
    )
    doubts = sum((Counter(one.xla.doubts) for one in found), Counter())  # over all calls
    parts = tuple(
        Table(
            f"{_name(one)}, by component",
            (Column("component"), Column("MFLOP", ",.3f"), Column("MB", ",.3f"), Column("FLOP per byte", ",.1f")),
            tuple(
                (name, cost.flops / 1e6, cost.bytes / 1e6, cost.flops / cost.bytes if cost.bytes else None)
                for name in COMPONENTS
                for cost in [one.needed[name]]
                if cost.flops or cost.bytes
            ),
        )
        for one in found
    )
    return Section(
        NAME,
        "What does a call cost?",
        "reported",
        "operations and bytes counted from shapes, and what XLA says of the compiled programs",
        (
            "Counted: what the call has to do; as written: what the code does beyond it (scores that the mask throws "
            "away, answers gathered whether wanted or not).",
            "XLA's counts are its own, and wrong where its program holds: " + "; ".join(explain(doubts)) + "."
            if doubts
            else "XLA's counts hold: its programs have none of the constructs that it counts wrongly.",
        ),
        (Table("Totals of one call", columns, totals), *parts),
    )


def _total(one: CallCosts) -> tuple[str | float, ...]:
    needed, written = (sum(costs.values(), Cost()) for costs in (one.needed, one.written))
    return (
        *(_name(one), needed.flops / 1e6, written.flops / 1e6, one.xla.flops / 1e6),
        *(needed.bytes / 1e6, written.bytes / 1e6, one.xla.bytes / 1e6, one.xla.peak_bytes / 1e6),
    )


def _name(one: CallCosts) -> str:
    return f"{one.phase}, batch {one.batch}, {one.side}"

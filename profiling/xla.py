"""What XLA reports about compiled programs: operations, bytes and peak memory, compared with `profiling.costs`.

    cost = analyze(jax.jit(f).trace(*arguments))
    print(cost.flops, cost.doubts)

XLA's numbers (`cost_analysis`, `memory_analysis` of the compiled program) are not corrected. Where a program holds none
of the constructs in `KNOWN_ERRORS`, its operations agree with `profiling.costs`; otherwise trust the analytical count.
Each of these errors has a test, so a version of JAX that fixes one is noticed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.stages import Traced

from analysis.report.report import Column, Section, Table
from models.attention import BLOCKS, SCORES_BYTES
from models.config import MoEConfig
from profiling.calls import at_once, planned, prepare, sides, workload_and_mix
from profiling.costs import FLOAT32, Cost, Mix, Workload, component_costs, computed_scores, parameters
from varjax.model import VARModel

KNOWN_ERRORS = {
    "loop": "its body is counted once, however often it runs (scan, fori_loop, while_loop, map)",
    "conditional": "its most expensive branch is counted, whichever is taken (cond, switch)",
    "opaque call": "counts -1: nothing of its own work, and one less of the rest (top_k, callbacks, library kernels)",
    "gather": "its bytes are those of the whole array that it reads from",
    "ragged product": "where it is expanded, E groups of rows cost E times the useful operations (ragged_dot)",
}

_OPCODES = {"while": "loop", "conditional": "conditional", "custom-call": "opaque call", "gather": "gather"}
_INSTRUCTION = re.compile(rf"^\s*(?:ROOT )?%?[\w.-]+ = .*? ({'|'.join(_OPCODES)})\(", re.MULTILINE)
_STREAMS = 3  # arrays [N, D] besides the scores: the residual stream, its norm, and queries or attention's output


@dataclass(frozen=True)
class XlaCost:
    """XLA's account of a compiled program."""

    flops: float  # with elementwise operations; too low, perhaps negative, where there are doubts
    bytes: float  # read and written by its kernels, cached or not
    argument_bytes: int
    output_bytes: int
    aliased_bytes: int  # outputs that replace donated arguments
    temporary_bytes: int  # largest sum of intermediate arrays
    doubts: dict[str, int]  # constructs of KNOWN_ERRORS in the program, and how many there are

    @property
    def peak_bytes(self) -> int:
        """Device memory that a call needs, including its arguments."""
        return self.argument_bytes + self.output_bytes - self.aliased_bytes + self.temporary_bytes


@dataclass(frozen=True)
class CallCosts:
    """One call, counted from its shapes and by XLA."""

    side: str  # "plain" or "VAR"
    phase: str
    batch: int
    needed: dict[str, Cost]  # by component
    written: dict[str, Cost]  # what the code does
    xla: XlaCost


@dataclass(frozen=True)
class Peak:
    """Peak memory of one kind of call; bytes."""

    side: str  # "plain" or "VAR"
    batch: int
    length: int
    predicted: float
    allocated: int  # by XLA, including arguments

    @property
    def relative(self) -> float:
        """Relative error of the prediction."""
        return self.predicted / self.allocated - 1


def analyze(traced: Traced) -> XlaCost:
    """Compile a traced function and read XLA's account of it.

    Args:
        traced: from `jax.jit(f).trace(*arguments)`.

    Returns:
        XLA's numbers and the constructs that make them doubtful.

    Raises:
        NotImplementedError: the backend gives no such account.
    """
    compiled = traced.lower().compile()
    costs, memory = compiled.cost_analysis(), compiled.memory_analysis()
    if costs is None or memory is None:
        raise NotImplementedError("this backend has no cost or memory analysis; analyze the program on a CPU or a GPU")
    doubts = _constructs(compiled.as_text() or "")
    # A ragged product is expanded while lowering, before there is any text that could name it.
    ragged = sum(one.primitive.name in ("ragged_dot", "ragged_dot_general") for one in _equations(traced.jaxpr))
    return XlaCost(
        flops=float(costs["flops"]),
        bytes=float(costs["bytes accessed"]),
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        aliased_bytes=memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        doubts=doubts | ({"ragged product": ragged} if ragged else {}),
    )


def _constructs(hlo: str) -> dict[str, int]:
    """Count the instructions of an optimized program that XLA's cost analysis gets wrong."""
    found = Counter(_OPCODES[opcode] for opcode in _INSTRUCTION.findall(hlo))
    return {name: found[name] for name in KNOWN_ERRORS if name in found}


def _explain(doubts: Mapping[str, int]) -> list[str]:
    """Say why XLA's count cannot be trusted."""
    return [f"{count} x {name}: {KNOWN_ERRORS[name]}" for name, count in doubts.items()]


def _equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a jaxpr, including those of its loops, branches and calls."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if hasattr(inner, "eqns"):
                    yield from _equations(inner)


def costs(var_model: VARModel, texts: Mapping[str, np.ndarray]) -> list[CallCosts]:
    """Count what the calls of every side and phase cost, from their shapes and by XLA, in total and by component.

    Args:
        var_model: the model, VAR on or off.
        texts: phase -> int32 [B, T].

    Returns:
        One entry per phase and side.
    """
    compared = sides(var_model).items()
    return at_once(partial(_count, *side, phase, ids) for phase, ids in texts.items() for side in compared)


def costs_section(found: Sequence[CallCosts]) -> Section:
    """Report what calls cost.

    Args:
        found: from `costs`.

    Returns:
        The section, which has no criterion.
    """
    columns = (
        *(Column("call"), Column("MFLOP", ",.2f"), Column("as written", ",.2f"), Column("XLA", ",.2f")),
        *(Column("MB", ",.2f"), Column("as written", ",.2f"), Column("XLA", ",.2f"), Column("peak memory, MB", ",.1f")),
    )
    parts = (Column("component"), Column("MFLOP", ",.3f"), Column("MB", ",.3f"), Column("FLOP per byte", ",.1f"))
    totals, tables = [], []
    for one in found:
        name = f"{one.phase}, batch {one.batch}, {one.side}"
        needed, written = (sum(costs.values(), Cost()) for costs in (one.needed, one.written))
        operations, moved = (needed.flops, written.flops, one.xla.flops), (needed.bytes, written.bytes, one.xla.bytes)
        totals.append((name, *(value / 1e6 for value in (*operations, *moved, one.xla.peak_bytes))))
        rows = tuple(
            (part, cost.flops / 1e6, cost.bytes / 1e6, cost.flops / cost.bytes if cost.bytes else None)
            for part, cost in one.needed.items()
            if cost.flops or cost.bytes
        )
        tables.append(Table(f"{name}, by component", parts, rows))
    doubts = sum((Counter(one.xla.doubts) for one in found), Counter())
    return Section(
        "costs",
        "What does a call cost?",
        "reported",
        "operations and bytes counted from shapes, and XLA's counts of the compiled programs",
        (
            "The first columns count what the call needs; `as written` adds the extra work of the code (scores that "
            "the mask discards, answers that are gathered but not used).",
            "XLA's counts are wrong because of " + "; ".join(_explain(doubts)) + "."
            if doubts
            else "XLA's counts can be trusted: its programs have none of the constructs that it counts wrongly.",
        ),
        (Table("Totals of one call", columns, tuple(totals)), *tables),
    )


def _peak_memory(
    config: MoEConfig, workload: Workload, *, held: int = 0, answers: bool = False, answer_rank: int = 0
) -> float:
    """Predict the peak memory of a call: its arguments, its results, and the intermediate arrays of attention.

    These are the scores of a layer and their softmax for all blocks of queries, of which large ones are computed in
    parts (`models.attention.SCORES_BYTES`); the layer's keys and values in the order that products need; a few arrays
    [N, D]; and the gathered answers [N, K, D]. What the mixes of affine answers give, [N, E, r], is needed before the
    answers are gathered. A donated cache is updated in place.
    """
    pairs, _ = computed_scores(workload)
    slots, key_values = workload.capacity or 0, 2 * config.num_kv_heads * config.head_dim
    cache = config.depth * workload.batch * slots * key_values
    blocks = 1 if slots else BLOCKS
    scores = 2 * min(workload.batch * config.num_heads * pairs, blocks * SCORES_BYTES // FLOAT32)
    width = max(config.top_k * config.hidden_size, config.num_experts * answer_rank) if answers else 0
    between = (
        scores
        + workload.batch * (slots or workload.length) * key_values
        + (_STREAMS * config.hidden_size + width) * workload.tokens
    )
    logits = workload.logit_rows * config.vocab_size
    return held + workload.itemsize * (parameters(config) + cache) + FLOAT32 * (logits + between)


def memory(var_model: VARModel, shapes: Iterable[tuple[int, int]]) -> list[Peak]:
    """Predict the peak memory of prefills and compare it with XLA's layout; nothing is run.

    Args:
        var_model: the model, VAR on or off.
        shapes: (B, T) of each prefill; repeated ones count once; empty: not measured.

    Returns:
        One entry per shape and side.
    """
    compared = sides(var_model).items()
    return at_once(partial(_peak, *side, *shape) for shape in dict.fromkeys(shapes) for side in compared)


def memory_section(found: Sequence[Peak]) -> Section:
    """Report peak memory.

    Args:
        found: from `memory`.

    Returns:
        The section, which has no criterion.
    """
    rows = [(one.side, one.batch, one.length, one.predicted / 1e6, one.allocated / 1e6, one.relative) for one in found]
    title = "How much memory does a call need?"
    if not rows:
        return Section("memory", title, "not measured", "left out of a quick run")
    columns = (
        *(Column("side"), Column("batch"), Column("length"), Column("predicted [MB]", ",.1f")),
        *(Column("XLA [MB]", ",.1f"), Column("error", "+.1%")),
    )
    side, batch, length, *_, error = max(rows, key=lambda row: abs(row[-1]))
    outcome = f"predicted from shapes and compared with XLA's layout; largest error: {error:+.1%}, {side}, "
    table = Table("Peak memory of a prefill", columns, tuple(rows))
    return Section("memory", title, "reported", f"{outcome}{batch} x {length}", (), (table,))


def _count(side: str, var_model: VARModel, phase: str, ids: np.ndarray) -> CallCosts:
    given = (var_model.model.config, *workload_and_mix(var_model, ids, phase))
    xla = analyze(prepare(var_model, ids, phase).traced())
    return CallCosts(side, phase, len(ids), component_costs(*given), component_costs(*given, as_written=True), xla)


def _peak(side: str, var_model: VARModel, batch: int, length: int) -> Peak:
    calls = prepare(var_model, np.zeros((batch, length), np.int32), "prefill")
    held = sum(leaf.nbytes for leaf in jax.tree.leaves((calls.fixed.table, calls.carry.state)))
    table = var_model.table
    workload = Workload(batch, length, itemsize=jax.tree.leaves(calls.fixed.params)[0].dtype.itemsize)
    config = var_model.model.config
    mix = Mix.plain(config, workload.tokens)
    mix = mix if table is None else planned(mix, config, table, workload.tokens, orders=len(table.ngram_orders))
    answers = table is not None and table.answers is not None
    predicted = _peak_memory(config, workload, held=held, answers=answers, answer_rank=mix.answer_rank)
    return Peak(side, batch, length, predicted, analyze(calls.traced()).peak_bytes)

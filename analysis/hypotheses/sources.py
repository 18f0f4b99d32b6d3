"""What the hypotheses are tested on: routing statistics, or a trace and the statistics computed from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from analysis.traces import trace as traces
from analysis.traces.importing import import_npz
from analysis.traces.statistics import trace_statistics
from analysis.traces.trace import Trace
from varjax import statsfile
from varjax.stats import RoutingStats

STATS_FILE = "routing_stats.parquet"  # looked for in a folder


@dataclass(frozen=True)
class Source:
    """What a file holds."""

    stats: RoutingStats
    meta: Mapping[str, Any]  # as `varjax.statsfile.read` returns it
    strings: Mapping[int, str] = field(default_factory=dict)  # the text of token ids, as far as known
    trace: Trace | None = None  # that the statistics were computed from


def statistics_of(path: Path) -> Path:
    """A folder's routing statistics; any other path as it is.

    Raises:
        FileNotFoundError: the folder has none.
    """
    if not path.is_dir():
        return path
    if not (path / STATS_FILE).is_file():
        raise FileNotFoundError(f"{path}: this folder has no {STATS_FILE}; give the file itself, or the right folder")
    return path / STATS_FILE


def open_source(path: Path) -> Source:
    """Statistics, or a trace and the statistics computed from it.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: neither; names file, column and fix.
    """
    trace = read_trace(path)
    if trace is not None:
        return trace_source(trace)
    stats, meta = statsfile.read(path)
    return Source(stats, meta, statsfile.token_strings(path))


def read_trace(path: Path) -> Trace | None:
    """The trace in a file, or None if the file does not say that it holds one."""
    if path.suffix == ".npz":
        return import_npz(path)
    try:
        is_trace = path.is_file() and traces.is_trace(pq.read_schema(path))
    except (pa.ArrowException, OSError):
        return None
    return traces.read(path) if is_trace else None


def strangers(source: Source, trace: Trace) -> str:
    """Why a trace cannot be of the model that the source's statistics are of, or "".

    Compared are layers, experts and, where both say so, the fingerprint of the model (`revision` of a trace).
    """
    stats, faults = source.stats, []
    if trace.num_layers != len(stats.count):
        faults.append(f"layers: {trace.num_layers}, the statistics have {len(stats.count)}")
    guessed = "num_experts" in source.meta.get("filled", {})  # the largest id in the file: there may be more
    if trace.num_experts < stats.num_experts or (trace.num_experts != stats.num_experts and not guessed):
        faults.append(f"experts: {trace.num_experts}, the statistics have {stats.num_experts}")
    ours, theirs = source.meta.get("fingerprint"), trace.origin.get("revision")
    if ours and theirs and ours != theirs:
        faults.append(f"revision: {theirs}, the statistics are of the model with fingerprint {ours}")
    return "; ".join(faults)


def trace_source(trace: Trace) -> Source:
    """A trace and its statistics on all token ids.

    The metadata say as `entropy_from` what entropy was computed from: `all` or `chosen` as in `Trace.probs_over`, or
    None where it is the gate's own; and as `scores` what the probabilities were computed from, as in `Trace.scores`.
    """
    entropy_from = trace.probs_over if trace.entropy is None else None
    meta = {**trace.origin, "entropy_from": entropy_from, "top_k": trace.top_k, "filled": {}, "rows_with_nan": 0}
    if trace.probs is not None:
        meta["scores"] = trace.scores
    return Source(trace_statistics(trace), meta, trace.token_strings, trace)

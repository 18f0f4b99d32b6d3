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


@dataclass(frozen=True)
class Source:
    """What a file holds."""

    stats: RoutingStats
    meta: Mapping[str, Any]  # as `varjax.statsfile.read` returns it
    strings: Mapping[int, str] = field(default_factory=dict)  # the text of token ids, as far as known
    trace: Trace | None = None  # that the statistics were computed from


def open_source(path: Path) -> Source:
    """Statistics, or a trace and the statistics computed from it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: neither; names file, column and mend.
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


def trace_source(trace: Trace) -> Source:
    """A trace and its statistics on all token ids.

    The metadata say as `entropy_from` what entropy was computed from: `all` or `chosen` as in `Trace.probs_over`, or
    None where it is the gate's own.
    """
    entropy_from = trace.probs_over if trace.entropy is None else None
    meta = {**trace.origin, "entropy_from": entropy_from, "top_k": trace.top_k, "filled": {}, "rows_with_nan": 0}
    return Source(trace_statistics(trace), meta, trace.token_strings, trace)

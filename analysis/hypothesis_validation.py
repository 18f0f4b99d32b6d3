"""Phase 1's hypotheses, tested on routing statistics and, where there is one, on a routing trace.

    python -m analysis.hypothesis_validation --input results/phase1/routing_stats.parquet --output results/hypotheses

Reads routing statistics (`varjax.statsfile`), a routing trace (`analysis.traces.trace`) or a NumPy trace
(`analysis.traces.importing`); writes hypotheses.txt, .json and .html and the figures as PNG and PDF into --output, and
prints the text. From a trace alone the statistics are computed as well. A FAIL is a result: the command ends well.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.figure import Figure

from analysis.figures import save
from analysis.html_report import write_html
from analysis.hypotheses import criteria as hypotheses
from analysis.hypotheses import statistics_figures as routing_figures
from analysis.hypotheses import statistics_sections as sections
from analysis.hypotheses import trace_figures
from analysis.hypotheses.consistency import Consistency, consistency
from analysis.hypotheses.paired_runs import PairedMeasure, compare
from analysis.hypotheses.trace_findings import Settings, TraceFindings, examine_trace
from analysis.hypotheses.trace_sections import trace_sections
from analysis.provenance import provenance, write_json
from analysis.report import Report, fields, text
from analysis.traces import trace as traces
from analysis.traces.importing import import_npz
from analysis.traces.statistics import trace_statistics
from analysis.traces.trace import Trace
from varjax import statsfile
from varjax.files import replacing
from varjax.stats import RoutingStats

TRACE_FILE = "routing_trace.parquet"  # looked for beside the statistics

_NOTES = (
    "PASS and FAIL follow the published criteria as they stand; a criterion over layers passes only if every "
    "layer that can be tested passes. FAIL is a finding about the model and the text, not a fault of the run.",
    "Error control: p values of one test are corrected by Holm over layers (of the paired tests, over layers and "
    "figures); bands of permutation nulls are family-wise, 95 % for all layers and orders of a measure together. "
    "Intervals are 95 %, each for itself. Over different tests nothing is corrected.",
    "Tests on statistics treat token ids as independent, since a statistics file does not know documents; their "
    "intervals are too narrow rather than too wide. Tests on a trace draw whole documents.",
    "Everything holds for this model on this text; nothing here says how far it carries.",
)


@dataclass(frozen=True)
class Findings:
    """Every result of a validation, and what it was computed from."""

    stats: RoutingStats
    meta: Mapping[str, Any]
    strings: Mapping[int, str]
    zipf: hypotheses.Zipf
    correlation: hypotheses.Correlation
    distribution: hypotheses.EntropyDistribution
    consistency: Consistency
    coverage: hypotheses.Coverage
    paired: tuple[PairedMeasure, ...] | None  # None: no second run
    trace: TraceFindings | None  # None: no trace


@dataclass(frozen=True)
class Source:
    """What a file holds."""

    stats: RoutingStats
    meta: Mapping[str, Any]  # as `varjax.statsfile.read` returns it
    strings: Mapping[int, str]  # the text of token ids, as far as known
    trace: Trace | None  # of statistics: none


def validate(
    stats: RoutingStats, meta: Mapping[str, Any], *, compared_with: str = "another run", **given: Any
) -> Report:
    """`report(examine(...))`: all tests in one call; the other arguments are those of `examine`."""
    return report(examine(stats, meta, **given), compared_with)


def examine(
    stats: RoutingStats,
    meta: Mapping[str, Any],
    *,
    strings: Mapping[int, str] | None = None,
    trace: Trace | None = None,
    other: RoutingStats | None = None,
    settings: Settings | None = None,
    progress: bool = False,
) -> Findings:
    """Run every test that the data allow.

    Args:
        stats: their keys of order 1 are looked at.
        meta: as `varjax.statsfile.read` returns it, or of `trace_source`.
        strings: the text of token ids, to name them.
        trace: for held-out predictability and whatever else needs single tokens.
        other: a second run, to compare with.
        settings: of the estimates from the trace; none: the defaults.
        progress: show bars on standard error.

    Raises:
        ValueError: `other` has another number of layers.
    """
    settings = settings or Settings()
    return Findings(
        stats=stats,
        meta=meta,
        strings=strings or {},
        zipf=hypotheses.zipf(stats),
        correlation=hypotheses.frequency_entropy(stats),
        distribution=hypotheses.entropy_distribution(stats),
        consistency=consistency(stats, not _estimated(meta), seed=settings.seed),
        coverage=hypotheses.coverage(stats),
        paired=None if other is None else compare(stats, other),
        trace=None if trace is None else examine_trace(trace, settings, progress),
    )


def report(found: Findings, compared_with: str = "another run") -> Report:
    """The findings in words, tables and verdicts."""
    stats = found.stats

    def name(row: int) -> str:
        token = int(stats.keys[row, -1])
        known = found.strings.get(token)
        return f"id {token}" if known is None else f"{known!r} (id {token})"

    kind = _entropy_kind(stats, found.meta)
    parts = (
        sections.zipf_section(found.zipf),
        sections.correlation_section(found.correlation, kind, name),
        sections.entropy_section(found.distribution, kind, name),
        sections.consistency_section(found.consistency, _estimated(found.meta), name),
        sections.coverage_section(found.coverage, kind, name),
        sections.paired_section(found.paired, compared_with, name),
        *trace_sections(found.trace),
    )
    return Report("Routing hypotheses", tuple(_facts(stats, found.meta)), _NOTES, parts)


def draw(found: Findings) -> Iterator[tuple[str, Figure]]:
    """The name and the figure of everything that was found, one after the other."""
    stats = found.stats
    over = _entropy_kind(stats, found.meta).experts
    if found.correlation.rho.testable.any():
        yield "frequency_entropy", routing_figures.frequency_against_entropy(stats, over)
        yield "entropy_distribution", routing_figures.entropy_distribution(stats, over)
    if not all(found.consistency.untestable):
        yield "routing_consistency", routing_figures.consistency_by_decile(found.consistency, stats)
        yield "token_experts", routing_figures.token_experts(stats, found.strings)
    if found.coverage.presets["balanced"].testable.any():
        yield "fast_path_coverage", routing_figures.fast_path_coverage(found.coverage, stats)
    if found.trace is not None:
        yield from trace_figures.draw(found.trace)


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
    return Source(stats, meta, statsfile.token_strings(path), None)


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
    """A trace and its statistics on all token ids."""
    meta = {**trace.origin, "probs_over": trace.probs_over, "top_k": trace.top_k, "filled": {}, "rows_with_nan": 0}
    return Source(trace_statistics(trace), meta, trace.token_strings, trace)


def save_all(found: Findings, said: Report, folder: Path, about: Mapping[str, Any]) -> None:
    """Write the report as text, JSON and HTML, and the figures.

    Args:
        about: provenance.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in draw(found):
        save(figure, folder, name)
    with replacing(folder / "hypotheses.txt") as temporary:
        temporary.write_text(text(said), encoding="utf-8")
    saved = {**fields(said), "provenance": about}
    if found.trace is not None and not isinstance(found.trace.load, str):
        saved["expert_load"] = found.trace.load.share  # of every expert: too wide for a table
    write_json(folder / "hypotheses.json", saved)
    write_html(folder / "hypotheses.html", said, folder)


def main(arguments: list[str] | None = None) -> None:
    """The command; `arguments` are those of the command line if not given."""
    defaults = Settings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="routing_stats.parquet, or a trace")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--trace", type=Path, help=f"a trace; without it, {TRACE_FILE} beside the input if it is there")
    parser.add_argument("--compare", type=Path, help="statistics or a trace of a second run")
    parser.add_argument("--orders", type=int, nargs="+", default=defaults.orders, help="context lengths (trace)")
    parser.add_argument(
        "--min_count", type=int, default=defaults.min_count, help="occurrences that a key needs (trace)"
    )
    parser.add_argument("--permutations", type=int, default=defaults.permutations, help="of the nulls; 0: none (trace)")
    parser.add_argument("--samples", type=int, default=defaults.samples, help="bootstrap draws (trace)")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    args = parser.parse_args(arguments)
    try:
        _run(args)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")


def _run(args: argparse.Namespace) -> None:
    settings = Settings(tuple(sorted(args.orders)), args.min_count, args.permutations, args.samples, args.seed)
    source = open_source(args.input)
    used = {"input": args.input}
    trace, beside = source.trace, args.input.parent / TRACE_FILE
    if args.trace is not None or (trace is None and beside.is_file()):
        used["trace"] = args.trace or beside
        trace = read_trace(used["trace"]) or traces.read(used["trace"])  # the latter says what is wrong
    other = None
    if args.compare is not None:
        used["compare"] = args.compare
        other = open_source(args.compare).stats
    found = examine(
        source.stats,
        source.meta,
        strings=source.strings,
        trace=trace,
        other=other,
        settings=settings,
        progress=True,
    )
    said = report(found, str(args.compare))
    files = {name: {"path": path, "sha256": _sha256(path)} for name, path in used.items()}
    made = source.meta.get("provenance")
    about = provenance(seed=args.seed, files=files, settings=asdict(settings), input_provenance=made)
    save_all(found, said, args.output, about)
    print(text(said))
    print(f"written to {args.output}")


def _facts(stats: RoutingStats, meta: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name in ("model", "revision", "dtype", "tokenizer", "phase"):
        if meta.get(name):
            yield name, str(meta[name])
    yield "data", routing_figures.size(stats)
    yield "layers, experts", f"{len(stats.count)}, {stats.num_experts}"
    keys = (f"{int((stats.row_orders == order).sum()):,} of order {order}" for order in stats.orders)
    yield "keys", ", ".join(keys)
    if stats.nonfinite.any():
        bad = (f"{count:,} in layer {layer}" for layer, count in enumerate(stats.nonfinite) if count)
        yield "not finite", f"tokens left out because the router gave NaN or infinity: {', '.join(bad)}"
    if meta.get("rows_with_nan"):
        yield "rows with NaN", f"{meta['rows_with_nan']:,}; each test says which it leaves out"
    if meta.get("filled"):
        yield "not in the file", "; ".join(f"{name}: {how}" for name, how in meta["filled"].items())


def _entropy_kind(stats: RoutingStats, meta: Mapping[str, Any]) -> sections.EntropyKind:
    if meta.get("probs_over") == "chosen":
        k = int(meta["top_k"])
        caution = (
            f"Caution: the trace has probabilities over the {k} chosen experts only. Their entropy is not that of "
            f"the router over all {stats.num_experts}, which the criterion was published for; it holds for what "
            "was measured."
        )
        return sections.EntropyKind(k, f"ln {k} = {np.log(k):.3f} nats (over the chosen experts)", (caution,))
    number = stats.num_experts
    words = f"ln {number} = {np.log(number):.3f} nats"
    if "num_experts" in meta.get("filled", {}):
        words += " (experts up to the largest id in the file)"
    if meta.get("probs_over") == "all":
        caution = (
            "Caution: the trace has the chosen experts' probabilities only, so entropy is a lower bound: a FAIL "
            "for too much entropy stands, a PASS for little may not."
        )
        return sections.EntropyKind(number, words, (caution,))
    return sections.EntropyKind(number, words)


def _estimated(meta: Mapping[str, Any]) -> bool:
    """Whether the file names only the commonest first choice of each key."""
    return "top1_counts" in meta.get("filled", {})


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main()

"""Phase 1's hypotheses, tested on routing statistics and, where there is one, on a routing trace.

    python -m analysis.hypothesis_validation --input results/phase1 --output results/hypotheses

Reads routing statistics (`varjax.statsfile`), a routing trace (`analysis.traces.trace`) or a NumPy trace
(`analysis.traces.importing`); writes hypotheses.txt, .json and .html and the figures as PNG and PDF into --output (for
an --output such as NAME.txt: NAME.txt, NAME.json, ...), and prints one line per hypothesis. From a trace the statistics
are computed as well, and their intervals draw its documents. A FAIL is a result: the command ends well.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from analysis.command import HelpFormatter, path_argument, program
from analysis.hypotheses import statistics_figures, trace_figures
from analysis.hypotheses.document_draws import SAMPLES
from analysis.hypotheses.entropy_kind import entropy_kind
from analysis.hypotheses.paired_runs import PairedMeasure, compare
from analysis.hypotheses.paired_section import paired_section
from analysis.hypotheses.sources import STATS_FILE, Source, open_source, read_trace, statistics_of, strangers
from analysis.hypotheses.statistics_findings import Drawn, StatisticsFindings, examine_statistics
from analysis.hypotheses.statistics_sections import statistics_sections
from analysis.hypotheses.trace_findings import Settings, TraceFindings, examine_trace
from analysis.hypotheses.trace_sections import trace_sections
from analysis.inputs import STATISTICS, find_statistics, listed
from analysis.report.figures import save
from analysis.report.files import write_output
from analysis.report.output import OUTPUT_HELP, Output
from analysis.report.provenance import provenance
from analysis.report.report import Report, summary
from analysis.traces import trace as traces
from analysis.traces.trace import Trace
from varjax.checksums import digest_of_file
from varjax.errors import InputError
from varjax.stats import RoutingStats

TRACE_FILE = "routing_trace.parquet"  # looked for beside the statistics


@dataclass(frozen=True)
class Findings:
    """Every result of a validation, and what it was computed from."""

    source: Source
    tests: StatisticsFindings
    paired: tuple[PairedMeasure, ...] | None  # None: no second run
    trace: TraceFindings | None  # None: no trace
    origin: Mapping[str, Any] = field(default_factory=dict)  # of the trace
    remarks: tuple[str, ...] = ()  # of the trace


def validate(source: Source, *, compared_with: str = "another run", **given: Any) -> Report:
    """`report(examine(...))`: all tests in one call; the other arguments are those of `examine`."""
    return report(examine(source, **given), compared_with)


def examine(
    source: Source,
    *,
    trace: Trace | None = None,
    other: RoutingStats | None = None,
    settings: Settings | None = None,
    progress: bool = False,
) -> Findings:
    """Run every test that the data allow.

    Args:
        source: the keys of order 1 of its statistics are looked at; where these were computed from a trace, their
            intervals draw its documents.
        trace: for held-out predictability and whatever else needs single tokens; none: that of the source.
        other: a second run, to compare with.
        settings: of the estimates from traces; none: the defaults.
        progress: show bars on standard error.

    Raises:
        InputError: `other` has another number of layers.
    """
    settings = settings or Settings()
    trace = trace or source.trace
    tests = examine_statistics(
        source.stats,
        source.trace,
        first_choices_known=not _estimated(source.meta),
        samples=settings.samples,
        seed=settings.seed,
        progress=progress,
    )
    return Findings(
        source=source,
        tests=tests,
        paired=None if other is None else compare(source.stats, other),
        trace=None if trace is None else examine_trace(trace, settings, progress),
        origin={} if trace is None else trace.origin,
        remarks=() if trace is None else trace.remarks(),
    )


def report(found: Findings, compared_with: str = "another run") -> Report:
    """The findings in words, tables and verdicts."""
    stats, meta = found.source.stats, found.source.meta

    def name(row: int) -> str:
        token = int(stats.keys[row, -1])
        known = found.source.strings.get(token)
        return f"id {token}" if known is None else f"{known!r} (id {token})"

    parts = (
        *statistics_sections(found.tests, entropy_kind(stats, meta), _estimated(meta), name),
        paired_section(found.paired, compared_with, name),
        *trace_sections(found.trace),
    )
    facts = (*_facts(stats, meta), *_trace_facts(found))
    return Report("Routing hypotheses", facts, (*found.remarks, *_notes(found.tests.drawn)), parts)


def draw(found: Findings) -> Iterator[tuple[str, Figure]]:
    """The name and the figure of everything that was found, one after the other."""
    stats, tests = found.source.stats, found.tests
    over = entropy_kind(stats, found.source.meta).experts
    if tests.correlation.rho.testable.any():
        yield "frequency_entropy", statistics_figures.frequency_against_entropy(stats, over)
        yield "entropy_distribution", statistics_figures.entropy_distribution(stats, over)
    if not all(tests.consistency.untestable):
        yield "routing_consistency", statistics_figures.consistency_by_decile(tests.consistency, stats)
        yield "token_experts", statistics_figures.token_experts(stats, found.source.strings)
    if tests.coverage.presets["balanced"].testable.any():
        yield "fast_path_coverage", statistics_figures.fast_path_coverage(tests.coverage, stats)
    if found.trace is not None:
        yield from trace_figures.draw(found.trace)


def overview(said: Report) -> str:
    """The facts about the data, and one line per hypothesis."""
    width = max(len(name) for name, _ in said.facts)
    return "\n".join([said.title, "", *(f"{name:<{width}}  {value}" for name, value in said.facts), "", *summary(said)])


def save_all(found: Findings, said: Report, output: Output, about: Mapping[str, Any]) -> None:
    """Write the report as text, JSON and HTML, and the figures.

    Args:
        about: provenance.
    """
    drawn = []
    for name, figure in draw(found):  # one by one: all of them together take much memory
        save(figure, output.folder, f"{output.prefix}{name}")
        drawn.append(name)
    beside: dict[str, Any] = {"provenance": about}
    if found.trace is not None and not isinstance(found.trace.load, str):
        beside["expert_load"] = found.trace.load.share  # of every expert: too wide for a table
    write_output(said, output, earlier=drawn, beside=beside)


@program
def main(arguments: Sequence[str] | None) -> None:
    defaults = Settings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--input",
        type=path_argument,
        help=f"routing statistics, a folder with {STATS_FILE}, or a trace; without it, the first of "
        f"{listed(STATISTICS)} that exists",
    )
    parser.add_argument("--output", type=path_argument, default=Path("results/hypotheses"), help=OUTPUT_HELP)
    parser.add_argument(
        "--trace",
        type=path_argument,
        help=f"a trace; without it, {TRACE_FILE} beside the input if it is there",
    )
    parser.add_argument("--compare", type=path_argument, help="statistics, a folder or a trace of a second run")
    parser.add_argument("--orders", type=int, nargs="+", default=defaults.orders, help="context lengths (trace)")
    parser.add_argument(
        "--min_count", type=int, default=defaults.min_count, help="occurrences that a key needs (trace)"
    )
    parser.add_argument("--permutations", type=int, default=defaults.permutations, help="of the nulls; 0: none (trace)")
    parser.add_argument(
        "--samples",
        type=int,
        default=defaults.samples,
        help=f"bootstrap draws of documents (trace); at most {SAMPLES} for the tests on statistics",
    )
    parser.add_argument("--seed", type=int, default=defaults.seed, help="of all draws")
    args = parser.parse_args(arguments)
    output = Output.of(args.output, "hypotheses")
    with output.locked():
        _run(args, output)


def _run(args: argparse.Namespace, output: Output) -> None:
    settings = Settings(tuple(sorted(args.orders)), args.min_count, args.permutations, args.samples, args.seed)
    path = statistics_of(find_statistics(args.input))
    source = open_source(path)
    used = {"input": path}
    trace, asked = source.trace, args.trace
    if asked is None and trace is None:
        asked = _trace_beside(path)
    if asked is not None:
        used["trace"] = asked
        trace = read_trace(used["trace"]) or traces.read(used["trace"])  # the latter says what is wrong
        why = strangers(source, trace)
        if why and args.trace is not None:
            raise InputError(f"{args.trace}: not a trace of what {path} was collected from ({why}); give one that is")
        if why:
            print(f"note: {used.pop('trace')} is left out, since it is not of these statistics ({why})")
            trace = None
    other = None
    if args.compare is not None:
        used["compare"] = statistics_of(args.compare)
        other = open_source(used["compare"]).stats
    found = examine(source, trace=trace, other=other, settings=settings, progress=True)
    said = report(found, str(args.compare))
    files = {name: {"path": path, "sha256": digest_of_file(path)} for name, path in used.items()}
    made = source.meta.get("provenance")
    about = provenance(seed=args.seed, files=files, settings=asdict(settings), input_provenance=made)
    save_all(found, said, output, about)
    print(overview(said))
    print(f"\nEverything behind these lines: {output.main('.txt')} (also .html with the figures, and .json)")


def _trace_beside(stats: Path) -> Path | None:
    """The trace that the run that wrote these statistics left next to them."""
    places = (stats.with_name(f"{stats.stem}.{TRACE_FILE}"), stats.with_name(TRACE_FILE))
    return next((place for place in places if place.is_file()), None)


def _notes(drawn: Drawn | None) -> tuple[str, ...]:
    intervals = (
        "The statistics come from a file, which does not know documents: intervals of the tests on them treat token "
        "ids as independent, and are too narrow rather than too wide. Tests on a trace draw whole documents."
    )
    if drawn is not None:
        intervals = (
            "Intervals draw whole documents, also those of the tests on statistics, as these were computed from a "
            "trace. Only the paired tests and the p values of rho treat token ids as independent."
        )
    return (
        "PASS and FAIL follow the published criteria as they stand (that of predictability is this project's own); a "
        "criterion over layers passes only if every layer that can be tested passes. FAIL is a finding "
        "about the model and the text, not a fault of the run.",
        "Error control: p values of one test are corrected by Holm over layers (of the paired tests, over layers and "
        "figures); bands of permutation nulls are family-wise, 95 % for all layers and orders of a measure together. "
        "Intervals are 95 %, each for itself. Over different tests nothing is corrected.",
        intervals,
        "Everything holds for this model on this text; nothing here says how far it carries.",
    )


def _facts(stats: RoutingStats, meta: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name in ("model", "revision", "dtype", "tokenizer", "phase"):
        if meta.get(name):
            yield name, str(meta[name])
    yield "data", statistics_figures.size(stats)
    yield "layers, experts", f"{len(stats.count)}, {stats.num_experts}"
    keys = (f"{int((stats.row_orders == order).sum()):,} of order {order}" for order in stats.ngram_orders)
    yield "keys", ", ".join(keys)
    if stats.nonfinite.any():
        bad = (f"{count:,} in layer {layer}" for layer, count in enumerate(stats.nonfinite) if count)
        yield "not finite", f"tokens left out because the router gave NaN or infinity: {', '.join(bad)}"
    if meta.get("rows_with_nan"):
        yield "rows with NaN", f"{meta['rows_with_nan']:,}; each test says which it leaves out"
    if meta.get("filled"):
        yield "not in the file", "; ".join(f"{name}: {how}" for name, how in meta["filled"].items())


def _trace_facts(found: Findings) -> Iterator[tuple[str, str]]:
    if found.trace is None:
        return
    said = [f"{name} {found.origin[name]}" for name in ("model", "phase") if found.origin.get(name)]
    yield "trace", ", ".join([*said, f"{found.trace.tokens:,} tokens", f"{found.trace.documents:,} documents"])
    if found.remarks:
        yield "about the trace", " ".join(found.remarks)


def _estimated(meta: Mapping[str, Any]) -> bool:
    """Whether the file names only the commonest first choice of each key."""
    return "top1_counts" in meta.get("filled", {})


if __name__ == "__main__":
    main()

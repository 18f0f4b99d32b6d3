"""Test the hypotheses of phase 1 on routing statistics and, if there is one, on a routing trace.

    python -m analysis.hypothesis_validation --input results/phase1 --output results/hypotheses

Reads routing statistics (`varjax.statsfile`), a routing trace (`analysis.traces.trace`) or a NumPy trace
(`analysis.traces.importing`). Writes hypotheses.txt, .json and .html and the figures as PNG and PDF into --output (if
--output is a file such as NAME.txt: NAME.txt, NAME.json, ...), and prints one line per hypothesis. If the input is a
trace, the statistics are computed from it, and their intervals resample its documents. A FAIL is a result, not an error
of the program.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from analysis.command import HelpFormatter, path_argument, program
from analysis.inputs import STATISTICS, find_statistics, listed
from analysis.questions.by_layer import size
from analysis.questions.data import RoutingData, Source, TraceSettings, trace_source
from analysis.questions.drawn import SAMPLES
from analysis.questions.question import Question
from analysis.questions.registry import ROUTING_QUESTIONS
from analysis.report.files import write_report
from analysis.report.output import OUTPUT_HELP, Output
from analysis.report.provenance import provenance
from analysis.report.report import Report, summary
from analysis.resampling import MIN_DIFFERENT, MIN_DOCUMENTS
from analysis.traces import trace as traces
from analysis.traces.importing import import_npz
from analysis.traces.trace import Trace
from varjax import statsfile
from varjax.checksums import digest_of_file
from varjax.errors import InputError

STATS_FILE = "routing_stats.parquet"  # looked for in a folder
TRACE_FILE = "routing_trace.parquet"  # looked for next to the statistics


def open_source(path: Path) -> Source:
    """Read statistics, or a trace and compute its statistics.

    Args:
        path: of the file.

    Returns:
        Its contents.

    Raises:
        FileNotFoundError: the file does not exist.
        InputError: the file is neither; names file, column and fix.
    """
    trace = _read_trace(path)
    if trace is not None:
        return trace_source(trace)
    stats, meta = statsfile.read(path)
    return Source(stats, meta, statsfile.token_strings(path))


def validate(
    data: RoutingData,
    questions: Sequence[Question[RoutingData]] = ROUTING_QUESTIONS,
    each: Callable[[Report, dict[str, Any]], Report] = lambda report, _: report,
) -> tuple[Report, dict[str, Any]]:
    """Answer every question that the data allow, and say why the others cannot be answered.

    Args:
        data: statistics, and a trace or a second run if there are any.
        questions: in the order of the report.
        each: takes the report and its fields after each question, to write them; returns the report.

    Returns:
        The report, and more fields of its JSON file.

    Raises:
        InputError: the second run has another number of layers.
    """
    remarks = () if data.trace is None else data.trace.remarks()
    report = Report("Routing hypotheses", tuple(_facts(data)), (*remarks, *_notes(data)), ())
    fields: dict[str, Any] = {}
    for question in questions:
        answer = question.answer(data)
        fields |= answer.result or {}
        report = each(dataclasses.replace(report, sections=(*report.sections, *answer.sections)), fields)
    return report, fields


@program
def main(arguments: Sequence[str] | None) -> None:
    """Run the command.

    Args:
        arguments: None for those of the command line.
    """
    defaults = TraceSettings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--input",
        type=path_argument,
        help=f"routing statistics, a folder with {STATS_FILE}, or a trace (default: the first of "
        f"{listed(STATISTICS)} that exists)",
    )
    parser.add_argument("--output", type=path_argument, default=Path("results/hypotheses"), help=OUTPUT_HELP)
    parser.add_argument(
        "--trace", type=path_argument, help=f"routing trace (default: {TRACE_FILE} next to the input, if it exists)"
    )
    parser.add_argument(
        "--compare", type=path_argument, help="statistics, folder or trace of a second run to compare with"
    )
    parser.add_argument(
        "--orders",
        type=int,
        nargs="+",
        default=defaults.orders,
        help="context lengths, in token ids (only for a trace)",
    )
    for name, about in {
        "min_count": "minimum number of occurrences of a key (only for a trace)",
        "permutations": "permutations of each null distribution; 0 for none (only for a trace)",
        "samples": f"bootstrap draws of documents (only for a trace; at most {SAMPLES} for the tests on statistics)",
        "seed": "random seed",
    }.items():
        parser.add_argument(f"--{name}", type=int, default=getattr(defaults, name), help=about)
    args = parser.parse_args(arguments)
    output = Output.of(args.output, "hypotheses")
    with output.locked():
        _run(args, output)


def _run(args: argparse.Namespace, output: Output) -> None:
    settings = TraceSettings(tuple(args.orders), args.min_count, args.permutations, args.samples, args.seed)
    path = _statistics_of(find_statistics(args.input))
    source = open_source(path)
    used = {"input": path}
    trace, asked = source.trace, args.trace
    if asked is None and trace is None:
        asked = _trace_next_to(path)
    if asked is not None:
        trace = _read_trace(asked) or traces.read(asked)  # the latter says what is wrong
        why = _mismatch(source, trace)
        if why and args.trace is not None:
            raise InputError(f"{args.trace}: not a trace of what {path} was collected from ({why}); give one that is")
        if why:
            print(f"note: {asked} is left out, because it does not belong to these statistics ({why})")
            trace = None
        else:
            used["trace"] = asked
    other = None
    if args.compare is not None:
        used["compare"] = _statistics_of(args.compare)
        other = open_source(used["compare"]).stats
    files = {name: {"path": path, "sha256": digest_of_file(path)} for name, path in used.items()}
    made = source.meta.get("provenance")
    about = provenance(seed=args.seed, files=files, settings=asdict(settings), input_provenance=made)

    def written(report: Report, fields: dict[str, Any]) -> Report:
        return write_report(report, output, extra={"provenance": about} | fields)

    data = RoutingData(source, trace, other, str(args.compare), settings, progress=True)
    report, _ = validate(data, each=written)
    print(_overview(report))
    print(f"\nEverything behind these lines: {output.main('.txt')} (also .html with the figures, and .json)")


def _overview(report: Report) -> str:
    """The facts about the data, and one line per hypothesis."""
    width = max(len(name) for name, _ in report.facts)
    facts = (f"{name:<{width}}  {value}" for name, value in report.facts)
    return "\n".join([report.title, "", *facts, "", *summary(report)])


def _trace_next_to(stats: Path) -> Path | None:
    """The trace that the run that wrote these statistics left next to them."""
    places = (stats.with_name(f"{stats.stem}.{TRACE_FILE}"), stats.with_name(TRACE_FILE))
    return next((place for place in places if place.is_file()), None)


def _statistics_of(path: Path) -> Path:
    """The routing statistics in a folder; any other path unchanged."""
    if not path.is_dir():
        return path
    if not (path / STATS_FILE).is_file():
        raise FileNotFoundError(f"{path}: this folder has no {STATS_FILE}; give the file itself, or the right folder")
    return path / STATS_FILE


def _read_trace(path: Path) -> Trace | None:
    """The trace in a file, or None if the file does not say that it holds one."""
    if path.suffix == ".npz":
        return import_npz(path)
    try:
        is_trace = path.is_file() and traces.is_trace(pq.read_schema(path))
    except (pa.ArrowException, OSError):
        return None
    return traces.read(path) if is_trace else None


def _mismatch(source: Source, trace: Trace) -> str:
    """Why a trace cannot belong to the model that statistics were collected from, or "".

    Layers, experts and, where both are known, the model's fingerprint (`revision` of a trace) must agree.
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


def _notes(data: RoutingData) -> tuple[str, ...]:
    if data.draws is None:
        intervals = (
            "Intervals of the tests on statistics treat token ids as independent (documents are not known in the "
            "file), and are too narrow rather than too wide. Those of the tests on a trace draw whole documents."
        )
    elif data.draws.documents < 2:
        intervals = "No intervals: they draw documents, and there is only one."
    else:
        intervals = (
            f"Intervals of the tests on statistics are from {data.draws.samples} bootstrap draws of the "
            f"{data.draws.documents:,} documents: the percentiles, shifted so that the draws' mean is the figure. Only "
            "the paired tests and the p values of rho treat token ids as independent."
        )
    return (
        "PASS and FAIL follow the published criteria (that of predictability is this project's own); a criterion over "
        "layers passes only if every layer that can be tested passes. FAIL is a finding about the model and the text.",
        "p values of one test are corrected by Holm over layers (of the paired tests, over layers and figures). "
        f"Bands of the nulls of a trace ({data.settings.permutations} permutations) are family-wise, 95% for all "
        f"layers and orders of a measure, except for figures with fewer than {MIN_DIFFERENT} different permuted "
        "values. Nothing is corrected across tests.",
        f"{intervals} A figure of a trace over fewer than {MIN_DOCUMENTS} documents has no interval.",
        "All results are for this model on this text, and may not hold for others.",
    )


def _facts(data: RoutingData) -> Iterator[tuple[str, str]]:
    stats, meta, trace = data.stats, data.source.meta, data.trace
    for name in ("model", "revision", "dtype", "tokenizer", "phase"):
        if meta.get(name):
            yield name, str(meta[name])
    yield "data", size(stats)
    yield "layers, experts", f"{len(stats.count)}, {stats.num_experts}"
    keys = (f"{int((stats.row_orders == order).sum()):,} of order {order}" for order in stats.ngram_orders)
    yield "keys", ", ".join(keys)
    if stats.tokens and 1 in stats.ngram_orders:  # ids that are too rare for a key are absent
        absent = int(stats.absent[list(stats.ngram_orders).index(1)])
        yield "token ids", f"those that are keys; they cover {1 - absent / stats.tokens:.1%} of all occurrences"
    if stats.nonfinite.any():
        bad = (f"{count:,} in layer {layer}" for layer, count in enumerate(stats.nonfinite) if count)
        yield "not finite", f"tokens left out because the router gave NaN or infinity: {', '.join(bad)}"
    if meta.get("rows_with_nan"):
        yield "rows with NaN", f"{meta['rows_with_nan']:,}; each test says which it leaves out"
    if meta.get("filled"):
        yield "not in the file", "; ".join(f"{name}: {how}" for name, how in meta["filled"].items())
    if trace is not None:
        said = [f"{name} {trace.origin[name]}" for name in ("model", "phase") if trace.origin.get(name)]
        documents = f"{len(np.unique(trace.document)):,} documents"
        yield "trace", ", ".join([*said, f"{len(trace.token_id):,} tokens", documents])
        if trace.remarks():
            yield "about the trace", " ".join(trace.remarks())


if __name__ == "__main__":
    main()

"""Test phase 1's hypotheses on routing statistics and, where there is one, on a routing trace.

    python -m analysis.hypothesis_validation --input results/phase1 --output results/hypotheses

Reads routing statistics (`varjax.statsfile`), a routing trace (`analysis.traces.trace`) or a NumPy trace
(`analysis.traces.importing`). Writes hypotheses.txt, .json and .html and the figures as PNG and PDF into --output (for
an --output such as NAME.txt: NAME.txt, NAME.json, ...), and prints one line per hypothesis. From a trace the statistics
are computed too, and their intervals draw its documents. A FAIL is a result, not an error of the program.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from analysis.command import HelpFormatter, path_argument, program
from analysis.inputs import STATISTICS, find_statistics, listed
from analysis.questions.data import (
    STATS_FILE,
    RoutingData,
    Settings,
    mismatch,
    open_source,
    read_trace,
    statistics_of,
)
from analysis.questions.drawn import SAMPLES
from analysis.questions.layers import size
from analysis.questions.question import Question
from analysis.questions.registry import ROUTING_QUESTIONS
from analysis.report.files import write_report
from analysis.report.output import OUTPUT_HELP, Output
from analysis.report.provenance import provenance
from analysis.report.report import Report, summary
from analysis.traces import trace as traces
from varjax.checksums import digest_of_file
from varjax.errors import InputError

TRACE_FILE = "routing_trace.parquet"  # looked for next to the statistics


def validate(
    data: RoutingData, questions: Sequence[Question[RoutingData]] = ROUTING_QUESTIONS
) -> tuple[Report, dict[str, Any]]:
    """Answer every question that the data allow, and say why the others cannot be answered.

    Args:
        data: statistics, and a trace or a second run if there are any.
        questions: in the order of the report.

    Returns:
        The report, and more fields of its JSON file.

    Raises:
        InputError: the second run has another number of layers.
    """
    answers = [question.answer(data) for question in questions]
    fields = {name: value for answer in answers for name, value in (answer.result or {}).items()}
    remarks = () if data.trace is None else data.trace.remarks()
    sections = tuple(section for answer in answers for section in answer.sections)
    return Report("Routing hypotheses", tuple(_facts(data)), (*remarks, *_notes(data)), sections), fields


def overview(report: Report) -> str:
    """Summarize a report for the terminal.

    Args:
        report: of `validate`.

    Returns:
        The facts about the data, and one line per hypothesis.
    """
    width = max(len(name) for name, _ in report.facts)
    facts = (f"{name:<{width}}  {value}" for name, value in report.facts)
    return "\n".join([report.title, "", *facts, "", *summary(report)])


@program
def main(arguments: Sequence[str] | None) -> None:
    """Run the command.

    Args:
        arguments: None for those of the command line.
    """
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
        "--trace", type=path_argument, help=f"a trace; without it, {TRACE_FILE} next to the input if it is there"
    )
    parser.add_argument("--compare", type=path_argument, help="statistics, a folder or a trace of a second run")
    parser.add_argument("--orders", type=int, nargs="+", default=defaults.orders, help="context lengths (trace)")
    parser.add_argument(
        "--min_count", type=int, default=defaults.min_count, help="occurrences that a key needs (trace)"
    )
    parser.add_argument(
        "--permutations", type=int, default=defaults.permutations, help="permutations of each null; 0: none (trace)"
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=defaults.samples,
        help=f"bootstrap draws of documents (trace); at most {SAMPLES} for the tests on statistics",
    )
    parser.add_argument("--seed", type=int, default=defaults.seed, help="seed of all random draws")
    args = parser.parse_args(arguments)
    output = Output.of(args.output, "hypotheses")
    with output.locked():
        _run(args, output)


def _run(args: argparse.Namespace, output: Output) -> None:
    settings = Settings(tuple(args.orders), args.min_count, args.permutations, args.samples, args.seed)
    path = statistics_of(find_statistics(args.input))
    source = open_source(path)
    used = {"input": path}
    trace, asked = source.trace, args.trace
    if asked is None and trace is None:
        asked = _trace_next_to(path)
    if asked is not None:
        trace = read_trace(asked) or traces.read(asked)  # the latter says what is wrong
        why = mismatch(source, trace)
        if why and args.trace is not None:
            raise InputError(f"{args.trace}: not a trace of what {path} was collected from ({why}); give one that is")
        if why:
            print(f"note: {asked} is left out, because it does not belong to these statistics ({why})")
            trace = None
        else:
            used["trace"] = asked
    other = None
    if args.compare is not None:
        used["compare"] = statistics_of(args.compare)
        other = open_source(used["compare"]).stats
    report, fields = validate(RoutingData(source, trace, other, str(args.compare), settings, progress=True))
    files = {name: {"path": path, "sha256": digest_of_file(path)} for name, path in used.items()}
    made = source.meta.get("provenance")
    about = provenance(seed=args.seed, files=files, settings=asdict(settings), input_provenance=made)
    write_report(report, output, beside={"provenance": about} | fields)
    print(overview(report))
    print(f"\nEverything behind these lines: {output.main('.txt')} (also .html with the figures, and .json)")


def _trace_next_to(stats: Path) -> Path | None:
    """The trace that the run that wrote these statistics left next to them."""
    places = (stats.with_name(f"{stats.stem}.{TRACE_FILE}"), stats.with_name(TRACE_FILE))
    return next((place for place in places if place.is_file()), None)


def _notes(data: RoutingData) -> tuple[str, ...]:
    intervals = (
        "The statistics come from a file, which does not know documents: intervals of the tests on them treat token "
        "ids as independent, and are too narrow rather than too wide. Tests on a trace draw whole documents."
    )
    if data.draws is not None:
        intervals = (
            "Intervals draw whole documents, also those of the tests on statistics, which were computed from a trace. "
            "Only the paired tests and the p values of rho treat token ids as independent."
        )
    return (
        "PASS and FAIL follow the published criteria (that of predictability is this project's own); a criterion over "
        "layers passes only if every layer that can be tested passes. FAIL is a finding about the model and the text.",
        "p values of one test are corrected by Holm over layers (of the paired tests, over layers and figures); "
        "bands of permutation nulls are family-wise, 95 % for all layers and orders of a measure together. Intervals "
        "are 95 % each. Nothing is corrected across tests.",
        intervals,
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

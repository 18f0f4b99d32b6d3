"""Phase 1: collect routing statistics for every layer and context key, the answers for phase 2, and a trace.

Writes routing_stats.parquet, routing_stats.answers.safetensors, routing_trace.parquet, a summary and figures into
--output. If --output is a file such as NAME.parquet, writes that file and NAME.* instead. Rerun the same command to
resume a killed run.

All devices of the machine are used, each with the whole model unless --mesh divides it. Several machines divide the
documents: start the script on each, with --num_processes P, --process_id 0 to P - 1 and one --output that all of them
can access. With --coordinator, they also divide the model across all their devices.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from functools import partial

from analysis.collect.passes import EVERY_DOCUMENT, Share
from analysis.collect.run import STATS, TRACE, CollectSettings, analyze, finish, later_steps, merge_files, place
from analysis.collect.statistics import KeySettings
from analysis.command import path_argument, program
from analysis.questions import answer_quality, routers
from analysis.questions.by_layer import size
from analysis.questions.data import RoutingData, Source
from analysis.report.files import after_results, write_report
from analysis.report.output import Output
from analysis.report.provenance import provenance
from analysis.report.report import Report, text
from analysis.text import card
from analysis.traces.recording import record
from experiments.arguments import add_hosts, add_options, join, open_corpus, open_model, parser
from varjax import answersfile
from varjax.errors import InputError
from varjax.keys import ContextCounts
from varjax.stats import RoutingStats
from varjax.tablefiles import answers_next_to

GIB = 1 << 30


@program
def main(arguments: Sequence[str] | None) -> None:
    """Run the program."""
    keys, defaults = KeySettings(), CollectSettings()
    options = parser(__doc__, "results/phase1")
    options.add_argument("--orders", type=int, nargs="+", default=keys.orders, help="context lengths, in token ids")
    options.add_argument("--layers", type=int, nargs="+", help="layers to collect (default: all)")
    options.add_argument(
        "--answers",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="collect the answers (each expert's mean output at a key) in a second pass",
    )
    options.add_argument(
        "--answer_orders", type=int, nargs="+", help="context lengths that get answers (default: 1 to 3)"
    )
    add_options(
        options,
        ("split", str, "build", "split to collect from; 'all' for every document"),
        ("min_count", int, keys.min_count, "minimum number of occurrences of a key"),
        ("max_keys", int, keys.max_keys, "maximum number of keys over all context lengths"),
        ("answer_min_count", int, defaults.answer_min_count, "minimum number of occurrences of a key with answers"),
        ("answer_rank", int, defaults.answer_rank, "rank of the maps that make answers affine; 0 for constant answers"),
        ("map_tokens", int, defaults.map_tokens, "tokens of the documents from which the maps are fitted"),
        (
            "held_out_split",
            str,
            "tune",
            "split that chooses the ridge of the maps and measures their error; do not report results on it",
        ),
        ("trace_tokens", int, 200_000, "tokens in the trace; 0 for no trace"),
        ("save_tokens", int, defaults.save_tokens, "tokens between checkpoints"),
        ("stats_gib", float, defaults.stats_bytes / GIB, "memory for statistics per device, in GiB"),
        ("answer_gib", float, defaults.answer_bytes / GIB, "memory for the sums of answers per device, in GiB"),
    )
    add_hosts(options)
    options.add_argument(
        "--merge",
        type=path_argument,
        nargs="+",
        metavar="OUTPUT",
        help="merge the outputs of finished runs instead of collecting",
    )
    args = options.parse_args(arguments)
    join(args)
    output = place(args.output)
    part = f"process-{args.process_id}" if args.process_id and not args.coordinator else ""  # the first one merges
    with output.locked(part):
        if args.merge:
            _merge(args, output)
        else:
            _collect(args, output)


def _merge(args: argparse.Namespace, output: Output) -> None:
    paths = [path / STATS if path.is_dir() else path for path in args.merge]
    stats, without = merge_files(paths, output.main(".parquet"), {"provenance": provenance(seed=args.seed)})
    output.other(TRACE).unlink(missing_ok=True)  # it would belong to other statistics
    if without:
        print(f"no answers: there are none next to {', '.join(map(str, without))}")
    _present(args, output, stats, (("merged from", ", ".join(map(str, args.merge))),))


def _collect(args: argparse.Namespace, output: Output) -> None:
    """Collect this process's share of the documents; the first process writes what all of them found."""
    orders = tuple(sorted(set(args.orders)))
    answered = args.answer_orders or set(CollectSettings().answer_orders) & set(orders)
    settings = CollectSettings(
        keys=KeySettings(orders, args.min_count, args.max_keys),
        layers=args.layers and tuple(sorted(set(args.layers))),
        answer_orders=tuple(sorted(set(answered))) if args.answers else (),
        answer_min_count=args.answer_min_count,
        stats_bytes=int(args.stats_gib * GIB),
        answer_bytes=int(args.answer_gib * GIB),
        answer_rank=args.answer_rank if args.answers else 0,
        map_tokens=args.map_tokens,
        batch_size=args.batch_size,
        max_length=args.max_length,
        save_tokens=args.save_tokens,
    )
    if settings.answer_rank and (args.split == "all" or args.held_out_split in (args.split, "all")):
        raise InputError(
            f"--held_out_split {args.held_out_split} with --split {args.split}: maps need documents that the answers "
            "have not seen; give two different splits"
        )
    share = EVERY_DOCUMENT if args.coordinator else Share(args.process_id, args.num_processes)
    model = open_model(args)
    checked = card.announced(model, args.dataset)
    corpus = open_corpus(model, args, args.split, args.num_samples)
    held_out = open_corpus(model, args, args.held_out_split, None)
    found = analyze(model, corpus, args.output, settings, held_out=held_out, share=share, seed=args.seed)
    if found is None:
        return
    if args.trace_tokens:
        reading = {"batch_size": args.batch_size, "max_length": args.max_length}
        trace = partial(record, model, corpus, output.other(TRACE), max_tokens=args.trace_tokens, **reading)
        unsound = later_steps(args.output, {"trace_tokens": args.trace_tokens}).do("trace", int, trace)
        if unsound:
            print(f"{unsound:,} tokens are not in the trace: a router gave NaN or infinity")
    _print_keys(found.keys)
    if found.stats.documents == 1:
        print("one document: nothing can be tested on unseen text; divide a text file by lines <|endofdoc|>")
    if settings.answer_orders:
        print(
            f"answers at {found.answered:,} of the {found.answerable:,} keys that are frequent enough, "
            f"for {found.pairs:,} pairs of a key and an expert in each layer at most"
        )
    facts = (("model", model.name), ("data", f"{args.dataset}, split {args.split}"))
    _present(args, output, found.stats, (*facts, *card.facts(checked)))
    finish(args.output)


def _print_keys(keys: ContextCounts) -> None:
    """Print how much of the text the keys cover."""
    print("keys:")
    for order in keys.orders:
        share = order.occurrences_admitted / max(order.occurrences, 1)
        about = f" (counts up to {order.undercount} too low)" if order.undercount else ""
        print(
            f"  order {order.order}: {order.admitted:,} of {order.distinct:,} contexts, "
            f"{share:.1%} of occurrences{about}"
        )


def _present(args: argparse.Namespace, output: Output, stats: RoutingStats, facts: Sequence[tuple[str, str]]) -> None:
    """Print and write the summary with its figures."""
    with after_results(output.main(".parquet")):
        said_by = [routers.QUESTION.answer(RoutingData(Source(stats, {})))]
        path = answers_next_to(output.main(".parquet"))
        if path.is_file():
            said_by.append(answer_quality.QUESTION.answer(answersfile.read(path)[0]))
        facts = (*facts, ("statistics", f"{size(stats)}, {len(stats.keys):,} keys"))
        sections = tuple(section for one in said_by for section in one.sections)
        said = Report("Routing statistics", facts, (), sections)
        results = {name: value for one in said_by for name, value in (one.result or {}).items()}
        extra = {**results, "provenance": provenance(seed=args.seed)}
        write_report(said, output, f"{output.prefix}routing_summary", extra=extra)
    print(f"\n{text(said)}\nwritten to {args.output}; next:")
    asked = ("--input", output.main(".parquet"), "--output", output.other("hypotheses"))
    print(shlex.join(["python", "-m", "analysis.hypothesis_validation", *map(str, asked)]))


if __name__ == "__main__":
    main()

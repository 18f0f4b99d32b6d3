"""Phase 1: collect routing statistics of every layer and context key, the answers for phase 2, and a trace.

Writes into --output: routing_stats.parquet, routing_stats.answers.safetensors, routing_trace.parquet, a summary and
figures; for an --output such as NAME.parquet, that file and NAME.*. A killed run continues from its last checkpoint
when the same command is given again. Runs on all devices of the machine, each with the whole model unless --mesh
divides it. Several machines divide the documents: start it on each, with --num_processes P, --process_id 0 to P - 1
and one --output that all of them see. With --coordinator as well they run as one, with the model divided over all
their devices.

  --merge A B ...    collect nothing: put the outputs of several finished runs together
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence

from analysis.collect.passes import EVERY_DOCUMENT, Share
from analysis.collect.run import STATS, TRACE, CollectSettings, analyze, finish, merge_files, place
from analysis.collect.statistics import KeySettings
from analysis.command import path_argument, program
from analysis.questions import routers
from analysis.questions.by_layer import size
from analysis.questions.data import RoutingData, Source
from analysis.report.files import write_report
from analysis.report.output import Output
from analysis.report.provenance import provenance
from analysis.report.report import Report, text
from analysis.text import card
from analysis.traces.recording import record
from experiments.arguments import open_corpus, open_model, parser
from experiments.hosts import add_hosts, join
from varjax.keys import ContextCounts
from varjax.stats import RoutingStats

GIB = 1 << 30


@program
def main(arguments: Sequence[str] | None) -> None:
    keys, defaults = KeySettings(), CollectSettings()
    options = parser(__doc__, "results/phase1")
    options.add_argument("--split", default="build", help="documents to learn from; 'all' for every one")
    options.add_argument("--orders", type=int, nargs="+", default=keys.orders, help="context lengths")
    options.add_argument("--layers", type=int, nargs="+", default=None, help="layers to collect; none: all")
    options.add_argument("--min_count", type=int, default=keys.min_count, help="occurrences that a key needs")
    options.add_argument("--max_keys", type=int, default=keys.max_keys, help="keys over all orders")
    options.add_argument(
        "--answers",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="second pass: the answers, what each expert says at a key",
    )
    options.add_argument(
        "--answer_orders", type=int, nargs="+", default=None, help="orders that get them; none: 1 to 3"
    )
    options.add_argument(
        "--answer_min_count",
        type=int,
        default=defaults.answer_min_count,
        help="occurrences that such a key needs",
    )
    options.add_argument("--trace_tokens", type=int, default=200_000, help="tokens of the trace, 0: none")
    options.add_argument("--save_tokens", type=int, default=defaults.save_tokens, help="tokens between checkpoints")
    options.add_argument(
        "--stats_gib", type=float, default=defaults.stats_bytes / GIB, help="GiB of statistics per device"
    )
    options.add_argument(
        "--answer_gib", type=float, default=defaults.answer_bytes / GIB, help="GiB of the answers' sums per device"
    )
    add_hosts(options)
    options.add_argument("--merge", type=path_argument, nargs="+", metavar="A", help="outputs to put together")
    args = options.parse_args(arguments)
    join(args)
    output = place(args.output)
    part = f"process-{args.process_id}" if args.process_id and not args.coordinator else ""  # the first one merges
    with output.locked(part):
        if args.merge:
            merge(args, output)
        else:
            collect(args, output)


def merge(args: argparse.Namespace, output: Output) -> None:
    paths = [path / STATS if path.is_dir() else path for path in args.merge]
    stats, without = merge_files(paths, output.main(".parquet"), {"provenance": provenance(seed=args.seed)})
    output.other(TRACE).unlink(missing_ok=True)  # that of other statistics, if any
    if without:
        print(f"no answers: there are none beside {', '.join(map(str, without))}")
    present(args, output, stats, (("merged from", ", ".join(map(str, args.merge))),))


def collect(args: argparse.Namespace, output: Output) -> None:
    """This process's share of the run; the first process writes what all of them found."""
    orders = tuple(sorted(set(args.orders)))
    answered = args.answer_orders or set(CollectSettings().answer_orders) & set(orders)
    settings = CollectSettings(
        keys=KeySettings(orders, args.min_count, args.max_keys),
        layers=args.layers and tuple(sorted(set(args.layers))),
        answer_orders=tuple(sorted(set(answered))) if args.answers else (),
        answer_min_count=args.answer_min_count,
        stats_bytes=int(args.stats_gib * GIB),
        answer_bytes=int(args.answer_gib * GIB),
        batch_size=args.batch_size,
        max_length=args.max_length,
        save_tokens=args.save_tokens,
    )
    share = EVERY_DOCUMENT if args.coordinator else Share(args.process_id, args.num_processes)
    model = open_model(args)
    checked = card.announced(model, args.dataset)
    corpus = open_corpus(model, args, args.split)
    found = analyze(model, corpus, args.output, settings, share=share, seed=args.seed)
    if found is None:
        return
    if args.trace_tokens:
        reading = {"batch_size": args.batch_size, "max_length": args.max_length}
        unsound = record(model, corpus, output.other(TRACE), max_tokens=args.trace_tokens, **reading)
        if unsound:
            print(f"{unsound:,} tokens are not in the trace: a router gave NaN or infinity")
    print_keys(found.keys)
    if found.stats.documents == 1:
        print("one document: nothing can be tested on unseen text; lines <|endofdoc|> divide a text file")
    if settings.answer_orders:
        print(
            f"answers at {found.answered:,} of the {found.answerable:,} keys that are frequent enough, "
            f"for {found.pairs:,} pairs of a key and an expert in each layer at most"
        )
    facts = (("model", model.name), ("data", f"{args.dataset}, split {args.split}"))
    present(args, output, found.stats, (*facts, *card.facts(checked)))
    finish(args.output)


def print_keys(keys: ContextCounts) -> None:
    """How much of the text the keys cover."""
    print("keys:")
    for order in keys.orders:
        share = order.occurrences_admitted / max(order.occurrences, 1)
        about = f" (counts up to {order.undercount} too low)" if order.undercount else ""
        print(
            f"  order {order.order}: {order.admitted:,} of {order.distinct:,} contexts, "
            f"{share:.1%} of occurrences{about}"
        )


def present(args: argparse.Namespace, output: Output, stats: RoutingStats, facts: Sequence[tuple[str, str]]) -> None:
    """The summary, printed and written, and the figures."""
    answer = routers.QUESTION.answer(RoutingData(Source(stats, {})))
    facts = (*facts, ("statistics", f"{size(stats)}, {len(stats.keys):,} keys"))
    said = Report("Routing statistics", facts, (), answer.sections)
    beside = {**answer.result, "provenance": provenance(seed=args.seed)}
    write_report(said, output, f"{output.prefix}routing_summary", beside=beside)
    print(f"\n{text(said)}\nwritten to {args.output}; next:")
    asked = ("--input", output.main(".parquet"), "--output", output.other("hypotheses"))
    print(shlex.join(["python", "-m", "analysis.hypothesis_validation", *map(str, asked)]))


if __name__ == "__main__":
    main()

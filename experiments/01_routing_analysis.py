"""Phase 1: collect routing statistics of every layer and context key, the residual rows for phase 2, and a trace.

Writes into --output: routing_stats.parquet, routing_stats.residuals.safetensors, routing_trace.parquet, a summary and
figures. A killed run continues from its last checkpoint when the same command is given again. Runs on all devices of
the machine; on several machines, start it on each with --coordinator, --num_processes and --process_id, and one
--output that all of them see.

  --merge A B ...    collect nothing: put the outputs of several finished runs together
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from analysis import figures
from analysis.collection.merging import merge_files
from analysis.collection.run import STATS, Settings, analyse
from analysis.collection.statistics import KeySettings
from analysis.hypotheses import statistics_figures
from analysis.provenance import provenance, write_json
from analysis.text.encoded_corpus import EncodedCorpus
from analysis.traces.recording import record
from experiments.arguments import parser, run
from models import load_model
from varjax.keys import ContextCounts
from varjax.stats import RoutingStats

TRACE = "routing_trace.parquet"


def main() -> None:
    keys, defaults = KeySettings(), Settings()
    arguments = parser(__doc__, "results/phase1")
    arguments.add_argument("--split", default="build", help="documents to learn from; 'all' for every one")
    arguments.add_argument("--orders", type=int, nargs="+", default=keys.orders, help="context lengths")
    arguments.add_argument("--layers", type=int, nargs="+", default=None, help="layers to collect; none: all")
    arguments.add_argument("--min_count", type=int, default=keys.min_count, help="occurrences that a key needs")
    arguments.add_argument("--max_keys", type=int, default=keys.max_keys, help="keys over all orders")
    arguments.add_argument(
        "--residuals", action=argparse.BooleanOptionalAction, default=True, help="second pass: residual rows"
    )
    arguments.add_argument(
        "--residual_orders", type=int, nargs="+", default=None, help="orders that get them; none: 1 and 2"
    )
    arguments.add_argument(
        "--residual_min_count",
        type=int,
        default=defaults.residual_min_count,
        help="occurrences that such a key needs",
    )
    arguments.add_argument("--trace_tokens", type=int, default=200_000, help="tokens of the trace, 0: none")
    arguments.add_argument("--save_tokens", type=int, default=defaults.save_tokens, help="tokens between checkpoints")
    arguments.add_argument("--coordinator", help="HOST:PORT of process 0, where several run together")
    arguments.add_argument("--num_processes", type=int, help="how many run together")
    arguments.add_argument("--process_id", type=int, help="which of them this one is, from 0")
    arguments.add_argument("--merge", type=Path, nargs="+", metavar="A", help="outputs to put together")
    args = arguments.parse_args()
    if args.merge:
        paths = [path / STATS if path.is_dir() else path for path in args.merge]
        present(args.output, merge_files(paths, args.output / STATS, {"provenance": provenance(seed=args.seed)}))
        return
    if args.coordinator:
        jax.distributed.initialize(args.coordinator, args.num_processes, args.process_id)
    collect(args)


def collect(args: argparse.Namespace) -> None:
    """This process's share of the run; the first process writes what all of them found."""
    model = load_model(args.model, args.dtype, args.implementation)
    split = None if args.split == "all" else args.split
    corpus = EncodedCorpus(args.dataset, split, args.num_samples, model.tokenizer, model.config)
    orders = tuple(sorted(set(args.orders)))
    answered = args.residual_orders or set(Settings().residual_orders) & set(orders)
    settings = Settings(
        keys=KeySettings(orders, args.min_count, args.max_keys),
        layers=args.layers and tuple(sorted(set(args.layers))),
        residual_orders=tuple(sorted(set(answered))) if args.residuals else (),
        residual_min_count=args.residual_min_count,
        batch_size=args.batch_size,
        max_length=args.max_length,
        save_tokens=args.save_tokens,
    )
    processes, this = jax.process_count(), jax.process_index()
    folders = [args.output / f"process-{i}" for i in range(processes)] if processes > 1 else [args.output]
    stats, keys = analyse(model, corpus, folders[this], settings, seed=args.seed, progress=this == 0)
    if processes > 1:
        multihost_utils.sync_global_devices("all parts are written")
        if this > 0:
            return
        about = {"provenance": provenance(seed=args.seed, data=corpus.about)}
        stats = merge_files([folder / STATS for folder in folders], args.output / STATS, about)
    if args.trace_tokens:
        reading = {"batch_size": args.batch_size, "max_length": args.max_length}
        unsound = record(model, corpus, args.output / TRACE, max_tokens=args.trace_tokens, **reading)
        if unsound:
            print(f"{unsound:,} tokens are not in the trace: a router gave NaN or infinity")
    print_keys(keys, settings)
    present(args.output, stats)


def print_keys(keys: ContextCounts, settings: Settings) -> None:
    """How much of the text the keys cover."""
    print("keys:")
    for order in keys.orders:
        share = order.occurrences_admitted / max(order.occurrences, 1)
        about = f" (counts up to {order.undercount} too low)" if order.undercount else ""
        print(
            f"  order {order.order}: {order.admitted:,} of {order.distinct:,} contexts, "
            f"{share:.1%} of occurrences{about}"
        )
    if settings.residual_orders and keys.counts.max() < settings.residual_min_count:
        print(f"  no key occurs {settings.residual_min_count} times: no residual rows")


def present(output: Path, stats: RoutingStats) -> None:
    """The summary, printed and written, and the figures."""
    figures.save(statistics_figures.frequency_against_entropy(stats), output, "frequency_entropy")
    figures.save(statistics_figures.entropy_distribution(stats), output, "entropy_distribution")
    rows = summarise(stats)
    write_json(output / "routing_summary.json", {"layers": rows, "provenance": provenance()})
    print(f"\n{stats.tokens:,} tokens of {stats.documents:,} documents; over occurrences of token ids:")
    print(f"{'layer':>5}{'gate entropy [nats]':>21}{'of ln E':>9}{'< 0.5 nats':>12}{'consistency':>13}")
    for row in rows:
        print(
            f"{row['layer']:>5}{row['mean_entropy']:>21.3f}{row['normalised_entropy']:>9.1%}"
            f"{row['share_below_half_nat']:>12.1%}{row['routing_consistency']:>13.1%}"
        )
    for layer, left_out in enumerate(stats.nonfinite):
        if left_out:
            print(f"layer {layer}: {left_out:,} tokens left out, the router gave NaN or infinity")
    print(f"\nwritten to {output}; next: python -m analysis.hypothesis_validation --input {output / STATS}")


def summarise(stats: RoutingStats) -> list[dict[str, float]]:
    """Per layer that has any, over the occurrences of all token ids that are keys."""
    rows = []
    ones = stats.row_orders == 1
    for layer in range(len(stats.count)):
        seen = ones & (stats.count[layer] > 0)
        if not seen.any():
            continue
        weight = stats.count[layer, seen]
        entropy = stats.entropy.mean[layer, seen]
        mean = float(np.average(entropy, weights=weight))
        rows.append(
            {
                "layer": layer,
                "mean_entropy": mean,
                "normalised_entropy": mean / math.log(stats.num_experts),
                "share_below_half_nat": float(np.average(entropy < 0.5, weights=weight)),
                "routing_consistency": float(np.average(stats.routing_consistency[layer, seen], weights=weight)),
            }
        )
    return rows


if __name__ == "__main__":
    run(main)

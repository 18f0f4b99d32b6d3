"""Phase 1: collect routing statistics of every layer and context key, and the residual rows for phase 2.

Writes routing_stats.parquet, routing_stats.residuals.safetensors, a summary and figures into --output.
"""

from __future__ import annotations

import argparse
import dataclasses
import math

import numpy as np

from analysis import figures
from analysis.answer_collection import collect_answers
from analysis.collection import KeySettings, choose_keys, collect
from analysis.policy import candidate_rules
from analysis.provenance import provenance, write_json
from experiments.arguments import load, parser, run
from varjax import answersfile, statsfile
from varjax.stats import RoutingStats


def main() -> None:
    defaults = KeySettings()
    arguments = parser(__doc__, "results/phase1")
    arguments.add_argument("--split", default="build", help="documents to learn from; 'all' for every one")
    arguments.add_argument("--orders", type=int, nargs="+", default=defaults.orders, help="context lengths in tokens")
    arguments.add_argument("--min_count", type=int, default=defaults.min_count, help="occurrences that a key needs")
    arguments.add_argument("--max_keys", type=int, default=defaults.max_keys, help="keys over all orders")
    arguments.add_argument(
        "--residuals", action=argparse.BooleanOptionalAction, default=True, help="second pass: residual rows"
    )
    arguments.add_argument("--residual_orders", type=int, nargs="+", default=(1, 2), help="orders that get them")
    arguments.add_argument("--residual_min_count", type=int, default=15, help="occurrences that such a key needs")
    args = arguments.parse_args()

    split = None if args.split == "all" else args.split
    model, documents, origin = load(args, split)
    settings = KeySettings(tuple(sorted(args.orders)), args.min_count, args.max_keys)
    keys = choose_keys(model, documents, args.max_length, settings)
    print(f"{len(documents):,} documents; keys:")
    for order in keys.orders:
        share = order.occurrences_admitted / max(order.occurrences, 1)
        print(f"  order {order.order}: {order.admitted:,} of {order.distinct:,} contexts, {share:.1%} of occurrences")

    reading = {"batch_size": args.batch_size, "max_length": args.max_length}
    stats = collect(model, documents, keys, **reading)
    meta = {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "top_k": model.config.top_k,
        "vocab_size": model.config.vocab_size,
        "provenance": provenance(seed=args.seed, **origin, keys=dataclasses.asdict(settings)),
    }
    strings = model.tokenizer.convert_ids_to_tokens(range(len(model.tokenizer))) if model.tokenizer else None
    statsfile.write(args.output / "routing_stats.parquet", stats, meta, strings)
    if args.residuals:
        often = stats.count.max(axis=0) >= args.residual_min_count
        answerable = np.isin(stats.row_orders, args.residual_orders) & often
        rules = candidate_rules(model.config.num_layers, model.config.top_k)
        orders = tuple(sorted(args.residual_orders))
        answers = collect_answers(model, documents, stats.keys[answerable], orders, rules, **reading)
        answersfile.write(args.output / "routing_stats.residuals.safetensors", answers, meta)

    figures.save(figures.frequency_against_entropy(stats), args.output, "frequency_entropy")
    figures.save(figures.entropy_distribution(stats), args.output, "entropy_distribution")
    rows = summarise(stats)
    write_json(args.output / "routing_summary.json", {"layers": rows, "provenance": meta["provenance"]})
    print(f"\n{stats.tokens:,} tokens; over occurrences of token ids:")
    print(f"{'layer':>5}{'gate entropy [nats]':>21}{'of ln E':>9}{'< 0.5 nats':>12}{'consistency':>13}")
    for layer, row in enumerate(rows):
        print(
            f"{layer:>5}{row['mean_entropy']:>21.3f}{row['normalised_entropy']:>9.1%}"
            f"{row['share_below_half_nat']:>12.1%}{row['routing_consistency']:>13.1%}"
        )
    for layer, left_out in enumerate(stats.nonfinite):
        if left_out:
            print(f"layer {layer}: {left_out:,} tokens left out, the router gave NaN or infinity")
    print(f"\nwritten to {args.output}")


def summarise(stats: RoutingStats) -> list[dict[str, float]]:
    """Per layer, over the occurrences of all token ids that are keys."""
    rows = []
    ones = stats.row_orders == 1
    for layer in range(len(stats.count)):
        seen = ones & (stats.count[layer] > 0)
        weight = stats.count[layer, seen]
        entropy = stats.entropy.mean[layer, seen]
        mean = float(np.average(entropy, weights=weight))
        rows.append(
            {
                "mean_entropy": mean,
                "normalised_entropy": mean / math.log(stats.num_experts),
                "share_below_half_nat": float(np.average(entropy < 0.5, weights=weight)),
                "routing_consistency": float(np.average(stats.routing_consistency[layer, seen], weights=weight)),
            }
        )
    return rows


if __name__ == "__main__":
    run(main)

"""Measure what answers cost, and what the maps of affine answers add to that.

    python -m benchmarks.answers [--model reference] [--rank 64] [--batches 1 8]

By default the model has 160 million random parameters (8 layers, hidden size 512, 8 experts, top 2), because the time
does not depend on their values. In all runs one expert is kept at every token; nothing, constant answers or affine
answers stand in for the others. Prefills and decoding steps of each kind are timed in the same rounds, so that the
share of the maps is paired: the time with affine answers over that with constant ones, less 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from analysis.command import name_argument, program
from analysis.resampling import Estimate
from benchmarks import harness
from benchmarks.collection import random_model
from models import Model, load_model
from profiling.points import decoding, embedded_texts, policies, prefilling, random_answers, random_stats
from profiling.timing import compare, paired_ratio
from varjax import VARModel
from varjax.model import build_for

KINDS = {"no answers": "one", "constant": "answers, one", "affine": "affine, one"}  # -> name of a policy


@program
def main(arguments: Sequence[str] | None) -> None:
    options = harness.parser(__doc__)
    options.add_argument(
        "--model", default="random", type=name_argument, help="directory, hub id, 'reference' or 'random'"
    )
    options.add_argument("--rank", type=int, default=64, help="rank of the maps")
    options.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="sequences per call")
    options.add_argument("--length", type=int, default=256, help="tokens of each text of a prefill")
    options.add_argument("--cached", type=int, default=64, help="tokens before the decoding steps")
    options.add_argument("--steps", type=int, default=16, help="decoding steps per timed run")
    options.add_argument("--keys", type=int, default=500, help="number of keys in the table")
    options.add_argument("--repeats", type=int, default=31, help="number of timed rounds")
    args = options.parse_args(arguments)
    model = random_model(intermediate_size=1536) if args.model == "random" else load_model(args.model)
    if not 1 <= args.rank <= model.config.hidden_size:
        options.error(f"--rank {args.rank}: expected 1 to the hidden size of the model, {model.config.hidden_size}")
    documents = embedded_texts(model)
    stream = np.concatenate(documents)
    sides = var_models(model, documents, args.keys, args.rank)
    print(f"{harness.machine()}; {args.keys} keys, maps of rank {args.rank}, 1 of {model.config.top_k} experts kept")
    print(f"{'':26}{'constant answers':>20}{'constant / none':>26}{'share of the maps':>26}")
    for batch in args.batches:
        length = max(args.length, args.cached + args.steps)
        ids = stream[: batch * length].reshape(batch, length)
        prefills = {name: prefilling(side, ids[None, :, : args.length]) for name, side in sides.items()}
        print(line(f"prefill, {batch} x {args.length}", compare(prefills, args.repeats), 1))
        steps = {name: decoding(model, side, ids, args.cached, args.steps) for name, side in sides.items()}
        print(line(f"decode, {batch} x 1", compare(steps, args.repeats), args.steps))


def var_models(model: Model, documents: Sequence[np.ndarray], keys: int, rank: int) -> dict[str, VARModel]:
    """The model under a policy of each kind, which runs the same number of experts.

    Args:
        model: the plain model.
        documents: token ids, whose most frequent contexts the tables hold.
        keys: contexts at most.
        rank: of the maps.

    Returns:
        Kind -> model.
    """
    stats = random_stats(model, documents, keys)
    found = {}
    for kind, policy in KINDS.items():
        config = policies(model.config.num_layers)[policy]
        answers = None
        if kind != "no answers":
            answers = random_answers(model, stats.keys, rank if kind == "affine" else 0)
        table = build_for(model, config, stats, answers, keep_shapes=True)
        # Affine answers leave the first token of a text to the router: so do all kinds here.
        found[kind] = VARModel(model, config, replace(table, first_open=tuple(range(model.config.num_layers))))
    return found


def line(name: str, seconds: dict[str, np.ndarray], calls: int) -> str:
    """One row of the table.

    Args:
        name: of the call.
        seconds: kind -> seconds of each round, float64 [repeats].
        calls: in a round.

    Returns:
        The milliseconds of a call with constant answers, and the ratios.
    """
    constant = paired_ratio(seconds["constant"], seconds["no answers"])
    one = paired_ratio(seconds["affine"], seconds["constant"])
    share = Estimate(one.value - 1, one.low - 1, one.high - 1)
    took = 1e3 * float(np.median(seconds["constant"])) / calls
    return f"{name:26}{took:>17.3f} ms{f'{constant:.3f}':>26}{f'{share:+.1%}':>26}"


if __name__ == "__main__":
    main()

"""Measure what it saves to generate several tokens with each call from Python.

    python -m benchmarks.generation [--model reference] [--var_config models/reference/policy.var_config.json]

One text is continued greedily, by the plain model and, with a config, under VAR. Each round times every number of
tokens per dispatch; the ratio is the time with the first number over that with another one, paired.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from analysis.command import name_argument, path_argument, program
from analysis.inputs import table_files
from benchmarks import harness
from benchmarks.collection import random_model
from models import load_model
from profiling.points import embedded_texts
from profiling.timing import compare, paired_ratio
from varjax import VARConfig, VARModel, load_table


@program
def main(arguments: Sequence[str] | None) -> None:
    options = harness.parser(__doc__)
    options.add_argument(
        "--model", default="reference", type=name_argument, help="directory, hub id, 'reference' or 'random'"
    )
    options.add_argument("--var_config", type=path_argument, help="also time this policy")
    options.add_argument("--batch", type=int, default=1, help="number of texts")
    options.add_argument("--prompt", type=int, default=16, help="tokens of each prompt")
    options.add_argument("--new_tokens", type=int, default=128, help="tokens generated per run")
    options.add_argument("--tokens_per_dispatch", type=int, nargs="+", default=[1, 4, 16, 64], help="what to compare")
    options.add_argument("--repeats", type=int, default=21, help="number of timed rounds")
    args = options.parse_args(arguments)
    model = random_model(intermediate_size=1536) if args.model == "random" else load_model(args.model)
    stream = np.concatenate(embedded_texts(model))
    ids = stream[: args.batch * args.prompt].reshape(args.batch, args.prompt)
    sides: dict[str, Callable[..., Any]] = {"plain": partial(model.generate, ids, args.new_tokens)}
    if args.var_config:
        config, files = VARConfig.load(args.var_config), table_files(None, None, args.var_config)
        var_model = VARModel(model, config, load_table(model, config, files.routing_stats, files.answers))
        sides["VAR"] = partial(var_model.generate, ids, var_model.init(args.batch), args.new_tokens)
    print(f"{harness.machine()}; {args.batch} x {args.prompt} tokens of prompt, {args.new_tokens} new ones")
    print(f"{'tokens per dispatch':>26}{'ms a token':>12}{'faster by, paired':>20}")
    for name, side in sides.items():
        runs = {str(several): partial(side, tokens_per_dispatch=several) for several in args.tokens_per_dispatch}
        seconds = compare(runs, args.repeats)
        first, *_ = seconds.values()
        for several, own in seconds.items():
            ratio = paired_ratio(first, own)
            took = np.median(own) / args.new_tokens * 1e3
            print(f"{name:12}{several:>14}{took:>12.3f}{ratio.value:>10.2f}x {harness.interval(ratio)}")


if __name__ == "__main__":
    main()

"""Measure what VAR adds to one decoding step at batch 1.

    python -m benchmarks.step [--model reference]

Each round times the plain model's own step; VARModel with VAR switched off; VAR on with nothing planned (learned only);
and VAR on with a table for frequent contexts, one expert kept; the last two with and without the cached tier. `plan`
and `commit` are also timed alone, jitted together. Timed as a separate call, they include the overhead of a call, which
they do not have as part of a step.

A run feeds a stretch of an embedded document token by token, the same in every round, so the cached tier has seen all
of it. The runs with nothing planned show what VAR costs; the runs with a table run fewer experts. The table has keys of
orders 1 and 2; its content does not matter for the time, so its statistics are random.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from analysis.command import name_argument, program
from benchmarks import harness
from models import Model, load_model
from models.model import plain_step
from profiling.points import NEVER, ORDERS, decoding, embedded_texts, random_stats
from profiling.timing import compare, paired_ratio
from varjax import LayerPolicy, RouteTable, VARConfig, VARModel, VARState
from varjax import step as var_step
from varjax.model import build_for
from varjax.step import Settings


@program
def main(arguments: Sequence[str] | None) -> None:
    options = harness.parser(__doc__)
    options.add_argument("--model", default="reference", type=name_argument, help="directory, hub id or 'reference'")
    options.add_argument("--keys", type=int, default=20_000, help="number of keys in the table")
    options.add_argument("--tokens", type=int, default=32, help="tokens per timed run")
    options.add_argument("--repeats", type=int, default=100, help="number of timed rounds")
    args = options.parse_args(arguments)

    model = load_model(args.model)
    documents = embedded_texts(model)
    stats = random_stats(model, documents, args.keys)
    text = next(ids for ids in documents if len(ids) >= 2 * args.tokens)[: 2 * args.tokens]
    feed = partial(decoding, model, ids=text[None], cached=args.tokens, steps=args.tokens)
    plain: Any = PlainSteps(model)
    sides: dict[str, Callable[[], Any]] = {"plain": feed(plain)}
    for name, config in configs().items():
        table = build_for(model, config, stats, keep_shapes=True) if config.enable_var else None
        var_model = VARModel(model, config, table=table)
        sides[name] = feed(var_model)
        if table is not None and config.frequency_threshold != NEVER:
            sides[name.replace("table", "plan + commit")] = plan_and_commit(model, table, config, text)
    seconds = compare(sides, args.repeats)
    print(f"{args.model}: {model.config.num_layers} layers; {len(stats.keys):,} keys; {args.tokens} tokens a run")
    print(f"{'':28}{'µs a token':>12}{'of the plain step, paired':>28}")
    for name, own in seconds.items():
        ratio = paired_ratio(own, seconds["plain"])
        print(
            f"{name:28}{np.median(own) / args.tokens * 1e6:>12.1f}{ratio.value:>12.3f}{harness.interval(ratio, 3):>16}"
        )


class PlainSteps:
    """The plain model's own decoding steps, called in the way of a VARModel."""

    def __init__(self, model: Model):
        """Take the steps of a model."""
        self.model = model

    def init(self, batch_size: int) -> None:
        """There is no state."""

    def advance(self, state: None, ids: jax.Array, mask: jax.Array, kv: Any, **_: Any) -> tuple[SimpleNamespace, None]:
        """One step, which consumes `kv`."""
        logits, kv = plain_step(self.model.params, kv, ids, mask, self.model.network)
        return SimpleNamespace(logits=logits, kv=kv), None


def configs() -> dict[str, VARConfig]:
    answering = VARConfig(
        frequency_threshold=1,
        entropy_threshold=100.0,
        default=LayerPolicy(experts_kept=1, use_answers=False, ngram_orders=ORDERS),
    )
    found = {"switched off": VARConfig(enable_var=False)}
    nothing = dataclasses.replace(answering, frequency_threshold=NEVER, confidence_threshold=1.0)  # nor remembered
    for tiers, size in (("", 0), (", cached tier", answering.cache_size)):
        found[f"learned only{tiers}"] = dataclasses.replace(nothing, cache_size=size)
        found[f"table{tiers}"] = dataclasses.replace(answering, cache_size=size)
    return found


def plan_and_commit(model: Model, table: RouteTable, config: VARConfig, text: np.ndarray) -> Callable[[], Any]:
    """The same tokens through `plan` and `commit`, with the router's output for the last of them."""
    out = model.network.forward(model.params, jnp.asarray(text[None]))
    routing, probs = jax.tree.map(lambda leaf: leaf[:, :, -1:], (out.routing, out.router_probs))
    settings = Settings.of(config, model.config.num_layers)
    tokens = [jnp.asarray(text[None, at : at + 1]) for at in range(len(text) // 2, len(text))]
    var_model = VARModel(model, config, table=table)
    held = [var_step.init(table, config, 1)]
    one = jnp.ones((1, 1), bool)

    @partial(jax.jit, donate_argnames="state")
    def both(table: RouteTable, state: VARState, ids: jax.Array, now: Any, settings: Settings) -> tuple[Any, VARState]:
        plan = var_step.plan(table, state, ids, now, settings, one)
        return plan.tier, var_step.commit(state, plan, ids, routing, probs, now, settings, one)

    def run() -> Any:
        for ids in tokens:
            tier, held[0] = both(table, held[0], ids, var_step.timestamp(var_model.clock()), settings)
        return tier

    return run


if __name__ == "__main__":
    main()

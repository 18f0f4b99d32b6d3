"""What VAR adds to one step of decoding, batch 1.

    python -m profiling.step_bench [--model reference]

Round by round in one run: the plain model's own step; VARModel with VAR switched off; VAR on with nothing planned
(learned only); VAR on with a table that answers for frequent contexts, one expert kept; the last two each with and
without the cached tier. Beside them `plan` and `commit` alone, jitted together, as a share of the plain step: a call of
their own, so the cost of a call is in it, which is not when they are part of a step.

A run is a stretch of an embedded document fed token by token, the same in every round, so a cached tier knows it by
heart. What VAR costs is the learned-only side; the table's side runs fewer experts. The table has as many keys of
orders 1 and 2 as asked for; what it names does not matter for the time, so its statistics are drawn at random.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from analysis.command import name_argument, program
from analysis.text.corpus import load_documents
from analysis.text.encoding import iter_encode
from models import Model, load_model
from models.generation import Step
from models.kv_cache import KVCache
from models.model import plain_step
from profiling.timing import compare, paired_ratio
from varjax import LayerPolicy, Plan, RouteTable, VARConfig, VARModel, VARState
from varjax import step as var_step
from varjax.keys import count_contexts
from varjax.model import build_for
from varjax.stats import RoutingStats
from varjax.step import Settings

ORDERS = (1, 2)
NEVER = 10**9  # occurrences that no key has


@program
def main(arguments: Sequence[str] | None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="reference", type=name_argument, help="directory, hub id or 'reference' (the default)"
    )
    parser.add_argument("--keys", type=int, default=20_000, help="of the table (20000)")
    parser.add_argument("--tokens", type=int, default=32, help="per timed run (32)")
    parser.add_argument("--repeats", type=int, default=100, help="rounds (100)")
    args = parser.parse_args(arguments)

    model = load_model(args.model)
    texts = load_documents("embedded", split="build", limit=1500)
    documents = [document.ids for document in iter_encode(texts, model.tokenizer, model.config)]
    stats = random_stats(model, documents, args.keys)
    text = next(ids for ids in documents if len(ids) >= 2 * args.tokens)[: 2 * args.tokens]
    sides: dict[str, Callable[[], Any]] = {"plain": decoding(model, text, model._step, None)}
    for name, config in configs().items():
        table = build_for(model, config, stats, keep_shapes=True) if config.enable_var else None
        var_model = VARModel(model, config, table=table)
        sides[name] = decoding(model, text, as_step(var_model), var_model.init())
        if table is not None and config.frequency_threshold != NEVER:
            sides[name.replace("table", "plan + commit")] = plan_and_commit(model, table, config, text)
    seconds = compare(sides, args.repeats)
    print(f"{args.model}: {model.config.num_layers} layers; {len(stats.keys):,} keys; {args.tokens} tokens a run")
    print(f"{'':28}{'µs a token':>12}{'of the plain step, paired':>28}")
    for name, own in seconds.items():
        ratio = paired_ratio(own, seconds["plain"])
        interval = f"[{ratio.low:.3f}, {ratio.high:.3f}]"
        print(f"{name:28}{np.median(own) / args.tokens * 1e6:>12.1f}{ratio.value:>12.3f}{interval:>16}")


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


def random_stats(model: Model, documents: list[np.ndarray], num_keys: int) -> RoutingStats:
    """Statistics at the most frequent contexts of the documents: their true counts, random probabilities."""
    counted = count_contexts(documents, ORDERS, max_keys=num_keys)
    stats = RoutingStats.empty(counted.keys, ORDERS, model.config.num_layers, model.config.num_experts)
    count = np.broadcast_to(counted.counts, stats.count.shape).copy()
    probs = np.random.default_rng(0).dirichlet(np.ones(model.config.num_experts), count.shape)
    entropy = dataclasses.replace(stats.entropy, mean=np.ones(count.shape))
    return dataclasses.replace(stats, count=count, entropy=entropy, sum_probs=probs * count[..., None])


def as_step(var_model: VARModel) -> Step:
    def run(kv: Any, carry: Any, ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, Any, Any]:
        out, carry = var_model.advance(carry, ids, mask, kv, last_logits_only=True, donate=True)
        return out.logits, out.kv, carry

    return run


def decoding(
    model: Model, text: np.ndarray, step: Step, carry: Any, cached: int | None = None, steps: int | None = None
) -> Callable[[], Any]:
    """Feeds texts, int32 [B, n] or [n], token by token; the first ones are in the key/value cache beforehand.

    The carry goes on from run to run. Of the key/value cache, which every step spends, only the count of positions goes
    back: what stands behind it is not looked at.

    Args:
        cached: tokens of each text that are in the cache; None: the first half.
        steps: tokens that a run feeds; None: the rest of the text.
    """
    ids = np.atleast_2d(text)
    half = ids.shape[1] // 2 if cached is None else cached
    end = ids.shape[1] if steps is None else half + steps
    tokens = [jnp.asarray(ids[:, at : at + 1]) for at in range(half, end)]
    held = [_read(model, ids, half, end), carry]
    begin = {name: np.asarray(getattr(held[0], name)) for name in ("mask", "positions", "length")}
    one = jnp.ones((len(ids), 1), bool)

    def run() -> Any:
        kv, carry = dataclasses.replace(held[0], **begin), held[1]
        for ids in tokens:
            logits, kv, carry = step(kv, carry, ids, one)
        held[:] = kv, carry
        return logits

    return run


def _read(model: Model, ids: np.ndarray, cached: int, capacity: int) -> KVCache:
    """A key/value cache of `capacity` positions in which the first `cached` of texts int32 [B, n] stand.

    The texts are read whole and one by one, which compiles the same whatever their number and what is cached of them.
    """
    real = jnp.ones((1, ids.shape[1]), bool)

    def read(row: np.ndarray) -> KVCache | None:
        _, kv = plain_step(model.params, model.empty_cache(1, len(row)), jnp.asarray(row[None]), real, model.network)
        return kv

    rows = [read(row) for row in ids]
    whole = jax.tree.map(lambda *leaves: np.concatenate(leaves)[:, :capacity] if leaves[0].ndim else leaves[0], *rows)
    there = np.broadcast_to(np.arange(capacity) < cached, (len(ids), capacity))
    return jax.tree.map(jnp.asarray, dataclasses.replace(whole, mask=there, length=np.int32(cached)))


def plan_and_commit(model: Model, table: RouteTable, config: VARConfig, text: np.ndarray) -> Callable[[], Any]:
    """The same tokens through `plan` and `commit`, with what the model's routers said to the last of them."""
    out = model.network.forward(model.params, jnp.asarray(text[None]))
    routing, probs = jax.tree.map(lambda leaf: leaf[:, :, -1:], (out.routing, out.router_probs))
    settings = Settings.of(config, model.config.num_layers)
    tokens = [jnp.asarray(text[None, at : at + 1]) for at in range(len(text) // 2, len(text))]
    var_model = VARModel(model, config, table=table)
    held = [var_step.init(table, config, 1)]
    one = jnp.ones((1, 1), bool)

    @partial(jax.jit, donate_argnames="state")
    def both(table: RouteTable, state: VARState, ids: jax.Array, now: Any, settings: Settings) -> tuple[Plan, VARState]:
        plan = var_step.plan(table, state, ids, now, settings, one)
        return plan, var_step.commit(state, plan, ids, routing, probs, now, settings, one)

    def run() -> Any:
        for ids in tokens:
            plan, held[0] = both(table, held[0], ids, var_step.timestamp(var_model.clock()), settings)
        return plan.tier

    return run


if __name__ == "__main__":
    main()

"""Measure what collecting routing statistics costs in addition to the forward pass.

    python -m benchmarks.collection [--model reference]

By default the model has 100 million random parameters, because the time does not depend on their values. Each round
times the forward pass (without its head, which is not needed), the same with statistics, the update alone, and a
Python loop over tokens that keeps the same figures. The host's share (tokenizing, counting keys, moving sums to the
host) is timed separately, per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from analysis.collect.passes import FLUSH_TOKENS, Devices, PassSums
from analysis.collect.statistics import KeySettings, choose_keys
from analysis.command import name_argument, program
from analysis.text.batches import batches
from analysis.text.corpus import load_documents
from analysis.text.encoding import iter_encode
from benchmarks import harness
from models import Model, MoEConfig, load_model
from models.experts import get_engine
from models.parameters import Params, init_params, prepare
from profiling.timing import compare, paired_ratio
from varjax import stats
from varjax.keys import KeyIndex, find_rows
from varjax.stats import RoutingStats

LOOP_TOKENS = 64  # of a batch, for the Python loop: it is slow


@program
def main(arguments: Sequence[str] | None) -> None:
    options = harness.parser(__doc__)
    options.add_argument(
        "--model", default="random", type=name_argument, help="directory, hub id, 'reference' or 'random'"
    )
    options.add_argument(
        "--num_samples", type=int, default=1500, help="number of documents from which the keys are chosen"
    )
    options.add_argument("--repeats", type=int, default=9, help="number of timed rounds")
    args = options.parse_args(arguments)

    model = random_model() if args.model == "random" else load_model(args.model)
    texts = load_documents("embedded", split="build", limit=args.num_samples)
    documents, reading = harness.timed(lambda: list(iter_encode(texts, model.tokenizer, model.config)))
    tokens = sum(len(document.ids) for document in documents)
    keys, counting = harness.timed(lambda: choose_keys(model, documents, 256, KeySettings()))
    full = next((batch for batch in batches(documents, 8, 256) if batch.ids.shape[1] == 256), None)
    if full is None:
        options.error(f"--num_samples {args.num_samples}: none of these documents fills half of a window of 256 tokens")
    ids, mask = jnp.asarray(full.ids), jnp.asarray(full.mask)

    orders = tuple(count.order for count in keys.orders)
    layers = tuple(range(model.config.num_layers))
    empty = RoutingStats.empty(keys.keys, orders, len(layers), model.config.num_experts)
    sums = PassSums("statistics", stats.init, stats.update, stats.absorb, orders, layers)
    devices = Devices(model, keys.keys, sums)
    devices.begin(empty)

    def collecting() -> jax.Array:
        return devices.add(ids, mask).tokens

    @jax.jit
    def forward_only(params: Params) -> jax.Array:
        return model.network.forward(params, ids, attention_mask=mask).router_probs

    probs = forward_only(model.params)
    rows = jax.jit(find_rows, static_argnames="ngram_orders")(KeyIndex.build(keys.keys), ids, orders, mask)
    window = [stats.init(empty)]

    def updating() -> jax.Array:
        window[0] = stats.update(window[0], rows, probs, mask)
        return window[0].tokens

    host_rows, host_probs = np.asarray(rows[:, 0, :LOOP_TOKENS]), np.asarray(probs[:, 0, :LOOP_TOKENS])
    sides: dict[str, Callable[[], object]] = {
        "with statistics": collecting,
        "forward": lambda: forward_only(model.params),
        "update": updating,
        "loop": lambda: python_loop(host_rows, host_probs),
    }
    seconds = compare(sides, args.repeats)
    _, flushing = harness.timed(lambda: jax.block_until_ready(stats.init(stats.absorb(window[0], empty))))
    size = ids.size
    forward = float(np.median(seconds["forward"])) / size
    both = paired_ratio(seconds["with statistics"], seconds["forward"])
    loop = paired_ratio(seconds["loop"] / LOOP_TOKENS, seconds["update"] / size)
    # The text is read and tokenized once for the keys and once for the model; the model would need it once anyway.
    host = {"reading again": reading / tokens, "counting keys": counting / tokens, "moving": flushing / FLUSH_TOKENS}
    print(f"{sum(leaf.size for leaf in jax.tree.leaves(model.params)):,} parameters, {len(layers)} layers")
    print(f"{len(keys.keys):,} keys of orders {orders}, batch {ids.shape[0]} x {ids.shape[1]}")
    print(f"forward             {forward * size * 1e3:9.1f} ms a batch")
    print(f"with statistics     {both.value:9.3f}x {harness.interval(both, 3)}")
    print(f"update alone        {np.median(seconds['update']) * 1e3:9.1f} ms a batch")
    for name, cost in host.items():
        print(f"{name:20}{cost / forward:+9.3f}x")
    print(f"in all              {both.value + sum(host.values()) / forward:9.3f}x")
    print(f"Python loop         {loop.value:9.0f}x the update's time per token {harness.interval(loop, 0)}")


def random_model(intermediate_size: int = 960) -> Model:
    """A Mixtral of random parameters with the reference model's tokenizer.

    Args:
        intermediate_size: F. With 960 it has 100 million parameters, with 1,536 it has 160 million.

    Returns:
        The model.
    """
    reference = load_model("reference")
    config = MoEConfig(
        vocab_size=reference.config.vocab_size,
        hidden_size=512,
        intermediate_size=intermediate_size,
        num_layers=8,
        num_heads=8,
        num_kv_heads=2,
        head_dim=64,
        num_experts=8,
        top_k=2,
    )
    engine = get_engine()
    params = prepare(init_params(config, jax.random.key(0)), engine)
    return Model(config, params, engine, "random", "none", reference.tokenizer)


def python_loop(rows: np.ndarray, probs: np.ndarray) -> dict[tuple[int, int], list]:
    """The figures of `varjax.stats`, token by token (rows int32 [O, T], probs float32 [L, T, E])."""
    found: dict[tuple[int, int], list] = {}
    for token in range(rows.shape[1]):
        for layer, p in enumerate(probs[:, token]):
            entropy, confidence, first = float(-(p * np.log(p)).sum()), float(p.max()), int(p.argmax())
            for row in rows[:, token]:
                if row < 0:
                    continue
                key = layer, int(row)
                if key not in found:
                    blank = [0.0, 0.0, math.inf, -math.inf]  # mean, m2, min, max
                    found[key] = [0, [*blank], [*blank], np.zeros(len(p), int), np.zeros(len(p))]
                one = found[key]
                one[0] += 1
                for moments, value in ((one[1], entropy), (one[2], confidence)):
                    delta = value - moments[0]
                    moments[0] += delta / one[0]
                    moments[1] += delta * (value - moments[0])
                    moments[2], moments[3] = min(moments[2], value), max(moments[3], value)
                one[3][first] += 1
                one[4] += p
    return found


if __name__ == "__main__":
    main()

"""What collecting statistics costs on top of the forward pass that it needs anyway.

    python -m profiling.collection_bench [--model reference]

Both sides compute the gate probabilities and neither the head, which nobody asks for; the difference is the look-up of
the keys and the update of the sums. The move to the host, once per 131,072 tokens, is timed apart and spread over them.
"""

from __future__ import annotations

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from analysis.batches import batches, encode
from analysis.collection import FLUSH_TOKENS, KeySettings, choose_keys, collect_step
from analysis.corpus import load_documents
from models import load_model
from models.decoder import Params
from profiling.timing import compare, paired_ratio
from varjax import stats
from varjax.keys import KeyIndex
from varjax.stats import RoutingStats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="reference", help="directory, hub id or 'reference'")
    parser.add_argument("--num_samples", type=int, default=1500, help="documents that choose the keys")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()

    model = load_model(args.model)
    documents = encode(load_documents("embedded", split="build", limit=args.num_samples), model.tokenizer, model.config)
    keys = choose_keys(model, documents, 256, KeySettings())
    full = next(batch for batch in batches(documents, 8, 256) if batch.ids.shape[1] == 256)
    ids, mask = jnp.asarray(full.ids), jnp.asarray(full.mask)

    orders = tuple(count.order for count in keys.orders)
    empty = RoutingStats.empty(keys.keys, orders, model.config.num_layers, model.config.num_experts)
    index, special = KeyIndex.build(keys.keys), jnp.asarray(model.config.special_token_ids, jnp.int32)
    buffer = [stats.init(empty)]

    def collecting() -> jax.Array:
        buffer[0] = collect_step(buffer[0], index, special, model.params, ids, mask, model.network, orders)
        return buffer[0].tokens

    @jax.jit
    def forward_only(params: Params) -> jax.Array:
        return model.network.forward(params, ids, attention_mask=mask).router_probs

    seconds = compare({"collecting": collecting, "forward": lambda: forward_only(model.params)}, args.repeats)
    ratio = paired_ratio(seconds["collecting"], seconds["forward"])
    start = time.perf_counter()
    stats.flush(buffer[0], empty)
    flush = (time.perf_counter() - start) * ids.size / FLUSH_TOKENS / float(np.median(seconds["forward"]))
    print(f"{len(keys.keys):,} keys of orders {orders}, batch {ids.shape[0]} x {ids.shape[1]}")
    print(f"forward {np.median(seconds['forward']) * 1e3:.1f} ms")
    print(f"with statistics {ratio.value:.3f}x [{ratio.low:.3f}, {ratio.high:.3f}], flush {flush:+.3f}x on average")


if __name__ == "__main__":
    main()

"""Phase 1's pass over a corpus: the routing statistics of every layer and context key.

Letters: L layers, B sequences, T positions, O orders, E experts.

Token ids alone decide which keys are kept (`varjax.keys.count_contexts`), so the keys are chosen before the model runs
and the device works on arrays of a fixed size, whatever the corpus holds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from analysis.batches import Batch, Encoded, batches, num_batches
from models import Model
from models.decoder import Network, Params
from varjax import stats
from varjax.keys import NONE, ContextCounts, KeyIndex, contexts, count_contexts, find_orders
from varjax.stats import RoutingStats, StatsBuffer

FLUSH_TOKENS = 1 << 17  # device sums are moved to the host's float64 this often


@dataclasses.dataclass(frozen=True)
class KeySettings:
    """Which keys are worth a row."""

    orders: tuple[int, ...] = (1, 2, 3)  # context lengths in tokens, the current one included
    min_count: int = 5  # occurrences that a key needs
    max_keys: int | None = 50_000  # over all orders together: the most frequent ones


def choose_keys(model: Model, documents: Sequence[Encoded], max_length: int, settings: KeySettings) -> ContextCounts:
    """The keys of a corpus, counted over the same windows that the model will read."""
    rows = (
        batch.ids[row, batch.mask[row]]
        for batch in batches(documents, 1, max_length)
        for row in np.flatnonzero(batch.documents >= 0)
    )
    special = model.config.special_token_ids
    return count_contexts(rows, settings.orders, settings.min_count, settings.max_keys, special)


def collect(
    model: Model,
    documents: Sequence[Encoded],
    keys: ContextCounts,
    *,
    batch_size: int = 8,
    max_length: int = 256,
    progress: bool = True,
) -> RoutingStats:
    """The statistics of `model` over `documents`, on the keys that `choose_keys` found.

    Args:
        batch_size: rows per batch at `max_length`.
        max_length: tokens per window.
        progress: show a bar on standard error.
    """
    orders = tuple(count.order for count in keys.orders)
    found = RoutingStats.empty(keys.keys, orders, model.config.num_layers, model.config.num_experts)
    index, buffer = KeyIndex.build(keys.keys), stats.init(found)
    special = jnp.asarray(model.config.special_token_ids, jnp.int32)
    waiting = 0
    total = num_batches(documents, batch_size, max_length)
    for batch in tqdm(batches(documents, batch_size, max_length), total=total, unit="batch", disable=not progress):
        buffer = collect_step(buffer, index, special, model.params, *_arrays(batch), model.network, orders)
        waiting += int(batch.mask.sum())
        if waiting >= FLUSH_TOKENS:
            buffer, found = stats.flush(buffer, found)
            waiting = 0
    _, found = stats.flush(buffer, found, documents=len(documents))
    return found


@partial(jax.jit, static_argnames=("network", "orders"), donate_argnums=0)
def collect_step(
    buffer: StatsBuffer,
    index: KeyIndex,
    special: jax.Array,
    params: Params,
    ids: jax.Array,
    mask: jax.Array,
    network: Network,
    orders: tuple[int, ...],
) -> StatsBuffer:
    """One batch [B, T] through the model and into the statistics; special tokens (int32 [S]) route but do not count."""
    out = network.forward(params, ids, attention_mask=mask)
    rows = find_rows(index, ids, mask, orders)
    return stats.update(buffer, rows, out.router_probs, mask & ~jnp.isin(ids, special))


def find_rows(index: KeyIndex, ids: jax.Array, mask: jax.Array, orders: tuple[int, ...]) -> jax.Array:
    """int32 [O, B, T]: the key rows of whole windows, which begin without a past."""
    length = max(orders)
    recent = jnp.full((ids.shape[0], length - 1), NONE, jnp.int32)
    return find_orders(index, contexts(ids, recent, length, mask), orders)


def _arrays(batch: Batch) -> tuple[jax.Array, jax.Array]:
    return jnp.asarray(batch.ids), jnp.asarray(batch.mask)

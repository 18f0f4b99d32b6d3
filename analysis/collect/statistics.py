"""Phase 1's pass over a corpus: the routing statistics of every layer and context key.

Letters: G devices, L layers, B sequences, T positions, O orders, E experts.

Token ids alone decide which keys are kept (`varjax.keys.count_contexts`), so the keys are chosen before the model runs
and the devices work on arrays of a fixed size, whatever the corpus holds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from analysis.collect.checkpoints import Checkpoints
from analysis.collect.passes import (
    SAVE_TOKENS,
    SPLIT,
    SPLIT_LAYERS,
    WHOLE,
    on_all_devices,
    on_each_device,
    on_mesh,
    run_pass,
)
from analysis.text.batches import windows
from analysis.text.encoding import Encoded
from models import Model
from models.decoder import Network
from models.parameters import Params
from varjax import stats
from varjax.errors import InputError
from varjax.keys import NONE, ContextCounts, KeyIndex, contexts, count_contexts, find_orders
from varjax.progress import progress_bar
from varjax.stats import RoutingStats, StatsBuffer


@dataclasses.dataclass(frozen=True)
class KeySettings:
    """Which keys are worth a row."""

    orders: tuple[int, ...] = (1, 2, 3)  # context lengths in tokens, the current one included
    min_count: int = 5  # occurrences that a key needs
    max_keys: int | None = 50_000  # over all orders together: the most frequent ones; None: no bound
    capacity: int = 1 << 20  # different contexts of one order that are counted at a time: what memory depends on

    def __post_init__(self) -> None:
        at_least_one = {"min_count": self.min_count, "max_keys": self.max_keys, "capacity": self.capacity}
        faults = [f"{name}={value}" for name, value in at_least_one.items() if value is not None and value < 1]
        if not self.orders or min(self.orders) < 1:
            faults.append(f"orders={self.orders}")
        if faults:
            raise InputError(f"{', '.join(faults)}: expected at least 1, and at least one order")


def choose_keys(
    model: Model, documents: Iterable[Encoded], max_length: int, settings: KeySettings, *, progress: bool = False
) -> ContextCounts:
    """The keys of a corpus, counted over the same windows that the model will read.

    Raises:
        InputError: no context is frequent enough to be a key.
    """
    with progress_bar(documents, desc="keys", unit=" documents", show=progress) as read:
        rows = (window.ids[: window.size] for window in windows(read, max_length))
        special = model.special_token_ids
        keys = count_contexts(rows, settings.orders, settings.min_count, settings.max_keys, special, settings.capacity)
    if len(keys.keys) == 0:
        raise InputError(
            f"none of the contexts of {settings.orders} tokens occurs {settings.min_count} times; "
            "give more documents or a lower min_count"
        )
    return keys


def collect(
    model: Model,
    documents: Iterable[Encoded],
    keys: ContextCounts,
    *,
    layers: Sequence[int] | None = None,
    batch_size: int = 8,
    max_length: int = 256,
    checkpoints: Checkpoints | None = None,
    save_tokens: int = SAVE_TOKENS,
    progress: bool = True,
) -> RoutingStats:
    """The statistics of `model` over `documents`, on the keys that `choose_keys` found.

    Runs on the mesh that the model is divided over, or on all devices of this process.

    Args:
        layers: those to collect, ascending; None: all. The others have no occurrences.
        batch_size: rows per device and batch at `max_length`.
        max_length: tokens per window.
        checkpoints: where to resume from and to save to; None for a pass that starts anew.
        save_tokens: tokens between checkpoints.
        progress: show a bar on standard error.
    """
    num_layers = model.config.num_layers
    chosen = tuple(range(num_layers)) if layers is None else tuple(layers)
    orders = tuple(count.order for count in keys.orders)
    model, mesh = on_mesh(model)
    special = jnp.asarray(model.special_token_ids, jnp.int32)
    shared = on_all_devices((KeyIndex.build(keys.keys), special), mesh)

    def step(windows: StatsBuffer, ids: jax.Array, mask: jax.Array) -> StatsBuffer:
        return collect_step(windows, *shared, model.params, ids, mask, model.network, orders, chosen, mesh)

    found, read = run_pass(
        RoutingStats.empty(keys.keys, orders, len(chosen), model.config.num_experts),
        documents,
        begin=stats.init,
        step=step,
        absorb=stats.absorb,
        name="statistics",
        mesh=mesh,
        batch_size=batch_size,
        max_length=max_length,
        checkpoints=checkpoints,
        save_tokens=save_tokens,
        progress=progress,
    )
    return stats.spread(dataclasses.replace(found, documents=read), chosen, num_layers)


@partial(jax.jit, static_argnames=("network", "orders", "layers", "mesh"), donate_argnums=0)
def collect_step(
    windows: StatsBuffer,
    index: KeyIndex,
    special: jax.Array,
    params: Params,
    ids: jax.Array,
    mask: jax.Array,
    network: Network,
    orders: tuple[int, ...],
    layers: tuple[int, ...],
    mesh: Mesh,
) -> StatsBuffer:
    """One batch [G * B, T] through the model and into the windows [G, ...] of the devices.

    Special tokens (int32 [S]) route but do not count.
    """
    probs = network.forward(params, ids, attention_mask=mask).router_probs

    def add(
        window: StatsBuffer, index: KeyIndex, special: jax.Array, ids: jax.Array, mask: jax.Array, probs: jax.Array
    ) -> StatsBuffer:
        rows = find_rows(index, ids, mask, orders)
        return stats.update(window, rows, probs[jnp.array(layers)], mask & ~jnp.isin(ids, special))

    specs = (WHOLE, WHOLE, SPLIT, SPLIT, SPLIT_LAYERS)
    return on_each_device(add, mesh, *specs)(windows, index, special, ids, mask, probs)


def find_rows(index: KeyIndex, ids: jax.Array, mask: jax.Array, orders: tuple[int, ...]) -> jax.Array:
    """int32 [O, B, T]: the key rows of whole windows, which begin without a past."""
    length = max(1, *orders)
    recent = jnp.full((ids.shape[0], length - 1), NONE, jnp.int32)
    return find_orders(index, contexts(ids, recent, length, mask), orders)

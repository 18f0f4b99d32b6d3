"""The first pass of phase 1: the routing statistics of every layer and context key.

Token ids alone decide which keys are kept (`varjax.keys.count_contexts`), so the keys are chosen before the model runs
and the devices work on arrays of a fixed size, whatever the corpus contains.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Unpack

from analysis.collect.passes import PassSums, Reading, run_pass
from analysis.text.batches import cut
from analysis.text.encoding import Encoded
from models import Model
from varjax import stats
from varjax.errors import InputError
from varjax.keys import ContextCounts, count_contexts
from varjax.progress import progress_bar
from varjax.stats import RoutingStats


@dataclasses.dataclass(frozen=True)
class KeySettings:
    """Which keys get a row. Raises InputError for a setting out of range."""

    orders: tuple[int, ...] = (1, 2, 3)  # context lengths in tokens, the current one included
    min_count: int = 5  # occurrences that a key needs
    max_keys: int | None = 50_000  # over all orders together, the most frequent ones; None: no bound
    capacity: int = 1 << 20  # different contexts of one order that are counted at a time, which bounds memory

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
    """Choose the keys of a corpus, counted over the same windows that the model will read.

    Args:
        model: its special tokens are not keys.
        documents: the corpus.
        max_length: tokens per window.
        settings: which keys get a row.
        progress: show a bar on standard error.

    Returns:
        The keys with their counts.

    Raises:
        InputError: no context is frequent enough to be a key.
    """
    with progress_bar(documents, desc="keys", unit=" documents", show=progress) as read:
        windows = (window for index, one in enumerate(read) for window in cut(one.ids, index, max_length))
        rows = (window.ids[: window.size] for window in windows)
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
    **reading: Unpack[Reading],
) -> RoutingStats:
    """Collect the statistics of a model over documents.

    Args:
        model: the model.
        documents: in the same order whenever they are read.
        keys: see `choose_keys`.
        layers: the layers to collect, ascending; None: all. The others have no occurrences.
        reading: see `analysis.collect.passes.Reading`.

    Returns:
        The statistics.
    """
    num_layers = model.config.num_layers
    chosen = tuple(range(num_layers)) if layers is None else tuple(layers)
    orders = tuple(count.order for count in keys.orders)
    empty = RoutingStats.empty(keys.keys, orders, len(chosen), model.config.num_experts)
    sums = PassSums("statistics", stats.init, stats.update, stats.absorb, orders, chosen)
    found, read = run_pass(model, documents, keys.keys, empty, sums, **reading)
    return stats.spread(dataclasses.replace(found, documents=read), chosen, num_layers)

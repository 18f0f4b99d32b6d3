"""What an audit watches: one number per text in each of several streams.

Letters: B texts, L layers, M streams.

A stream is a signal in one layer and tier, or over all of them. The tokens of a text depend on each other, so a text's
mean over its tokens is one observation.

| signal | of a text |
|---|---|
| `error` | mean relative error of the layer's output, over its audited tokens, clipped at ERROR_CAP |
| `agreement` | share of its planned tokens whose predicted first expert is the learned router's |
| `open` | share of its tokens that the table does not know |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from varjax.config import VARConfig
from varjax.routing import CACHED, FAST
from varjax.step import TIERS as ALL_TIERS

ERROR_CAP = 1.0  # relative error that an observation is clipped to: that of no answer at all
TIERS = ALL_TIERS[FAST : CACHED + 1]  # those that plan


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tally:
    """Sums over the tokens of each text; tallies of a text's parts may be added up."""

    tokens: Any  # int32 [B], real ones
    planned: Any  # int32 [B, L, tiers]
    agreed: Any  # int32 [B, L, tiers], planned ones whose predicted first expert was the learned router's
    audited: Any  # int32 [B, L, tiers], also computed in full
    error: Any  # float32 [B, L, tiers], sum of their clipped relative errors


class Stream(NamedTuple):
    """What is watched."""

    signal: str  # "error", "agreement" or "open"
    layer: int | None = None  # None: all layers together
    tier: str | None = None  # None: both planning tiers together, or no matter

    @property
    def limits(self) -> tuple[float, float]:
        """No observation can pass them."""
        return 0.0, ERROR_CAP if self.signal == "error" else 1.0

    def __str__(self) -> str:
        where = "over all layers" if self.layer is None else f"in layer {self.layer}"
        return f"{self.signal} {where}" + (f", {self.tier} tier" if self.tier else "")


def watched(config: VARConfig, num_layers: int) -> tuple[Stream, ...]:
    """The streams of a config: over all layers, then of each layer and tier that may plan."""
    streams = [Stream("error"), Stream("agreement"), Stream("open")]
    for layer in range(num_layers):
        if config.policy(layer) is None:
            continue
        for tier in TIERS if config.caches(layer) else TIERS[:1]:
            streams += [Stream("error", layer, tier), Stream("agreement", layer, tier)]
        streams.append(Stream("open", layer))
    return tuple(streams)


def observe(tally: Tally, streams: tuple[Stream, ...]) -> np.ndarray:
    """float64 [B, M]: each text's mean in each stream; NaN where it has no token to say anything.

    `open` is the share that the table does not know, whatever the cache remembers of it: what a cache has learned so
    far is not the same from text to text.
    """
    tokens = np.asarray(tally.tokens, np.float64)
    tallied = {name: np.asarray(getattr(tally, name), np.float64) for name in ("planned", "agreed", "audited", "error")}
    columns = []
    for signal, layer, tier in streams:
        layers = slice(None) if layer is None else slice(layer, layer + 1)
        tiers = slice(None) if tier is None else slice(TIERS.index(tier), TIERS.index(tier) + 1)
        sums = {name: values[:, layers, tiers].sum(axis=(1, 2)) for name, values in tallied.items()}
        if signal == "open":
            every = tokens * tallied["planned"][:, layers].shape[1]
            above, below = every - tallied["planned"][:, layers, FAST].sum(axis=1), every
        elif signal == "agreement":
            above, below = sums["agreed"], sums["planned"]
        else:
            above, below = sums["error"], sums["audited"]
        # A float32 sum of clipped errors may pass the limit by its rounding.
        limit = Stream(signal).limits[1]
        columns.append(np.where(below > 0, np.minimum(above / np.maximum(below, 1), limit), np.nan))
    return np.stack(columns, axis=1)

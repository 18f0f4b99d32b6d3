"""How the documents of an evaluation meet the cached tier: each with a cache of its own, or all with one.

A document's loss must not depend on its company, so by default each document begins with an empty cache, which learns
from one window of the document to the next. (Within a window it decides nothing: a plan is made before the window is
read.) A service has one cache for all of its texts; measured like that, losses depend on the order of the documents and
on how many are read at a time, and the result says so.

Time passes by tokens, not by the machine's clock, so that what a cache forgets is the same in every run.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from analysis.text.batches import Batch, cut
from analysis.text.encoding import Encoded
from varjax.errors import InputError
from varjax.model import VARModel, VAROutput
from varjax.step import VARState, begin
from varjax.transfer import to_device

SECONDS_PER_TOKEN = 0.01
"""A stream of 100 tokens a second, the pace of a served text. A time to live of 10 s is then 1,000 tokens, one of 300 s
30,000: in the range in which documents repeat themselves. A replay has the same default."""


@dataclasses.dataclass(frozen=True)
class Caching:
    """Which documents share a cached tier, and how fast it ages.

    Raises:
        InputError: a time per token that is not above 0.
    """

    shared: bool = False  # one cache for all documents, as a service has it; False: one for each
    seconds_per_token: float = SECONDS_PER_TOKEN

    def __post_init__(self) -> None:
        if not (math.isfinite(self.seconds_per_token) and self.seconds_per_token > 0):
            raise InputError(f"seconds_per_token={self.seconds_per_token}: expected a time above 0, such as 0.01")

    def init(self, var_model: VARModel, batch_size: int = 1) -> VARState | None:
        """The state before the first document; None with VAR switched off."""
        return var_model.init(batch_size, shared_cache=self.shared)

    def enter(self, state: VARState, batch: Batch) -> tuple[VARState, float]:
        """The state in which a batch of windows is read, each without a past, and the time, seconds.

        Caches of their own age by what their documents have read, a shared one as `now` says.

        Args:
            batch: of `analysis.text.batches.in_order` where the documents have caches of their own.
        """
        if not state.own_caches:
            return begin(state, len(batch.ids)), self.now(state)
        kept = to_device(batch.goes_on) if batch.goes_on.any() else None
        return begin(state, len(batch.ids), kept), batch.start * self.seconds_per_token

    def read(self, var_model: VARModel, state: VARState | None, batch: Batch) -> tuple[VAROutput, VARState | None]:
        """A batch of windows under VAR, each without a past: what the model says, and the state afterwards."""
        now = 0.0
        if state is not None:
            state, now = self.enter(state, batch)
        ids, mask = to_device((batch.ids, batch.mask))
        return var_model.advance(state, ids, mask, now=now, donate=True)

    def now(self, state: VARState) -> float:
        """The time of a cache that all sequences share: it ages by all tokens that the state has counted, seconds."""
        tokens = int(np.asarray(state.counters.tokens)[0].sum()) if state.cache is not None else 0  # of layer 0
        return tokens * self.seconds_per_token

    def span(self, documents: Sequence[Encoded], max_length: int, stride: int | None = None) -> float:
        """The greatest age at which a decision may be asked for while `documents` are scored, seconds; 0: none ever is.

        Args:
            max_length, stride: as in `analysis.evaluate.quality.score`.
        """
        sizes = [[window.size for window in cut(one.ids, 0, max_length, stride)] for one in documents]
        if self.shared:
            tokens = sum(map(sum, sizes))
        else:
            tokens = max(((len(windows) - 1) * max_length for windows in sizes), default=0)
        return tokens * self.seconds_per_token

    def clock(self, start: float = 0.0) -> Callable[[], float]:
        """Seconds from `start` on that pass by one token a call: the clock of decoding."""
        ticks = itertools.count()
        return lambda: start + next(ticks) * self.seconds_per_token

    @property
    def words(self) -> str:
        """For a report."""
        whose = "one for all documents, so that losses depend on their order" if self.shared else "one per document"
        return f"{whose}; {self.seconds_per_token:g} s per token"


INDEPENDENT = Caching()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shared_cache",
        action="store_true",
        help="let all documents share one cached tier, as in a service; a document's loss then depends on the order of "
        "the documents and on the batch size. By default each document begins with an empty cache of its own",
    )
    parser.add_argument(
        "--seconds_per_token",
        type=float,
        default=SECONDS_PER_TOKEN,
        help="the time that a token takes on the clock that ages the cached tier, in seconds",
    )


def asked(args: argparse.Namespace) -> Caching:
    """What the arguments of `add_arguments` say."""
    return Caching(args.shared_cache, args.seconds_per_token)


def described(caching: Caching, config: Any) -> tuple[tuple[str, str], ...]:
    """The fact that a report states, where the config has a cached tier."""
    return (("cached tier", caching.words),) if config.enable_var and config.cache_size > 0 else ()

"""What the questions about routing are asked about: routing statistics, a routing trace, a second run, and settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from analysis.questions.drawn import SAMPLES, DocumentDraws
from analysis.questions.question import NotMeasuredError
from analysis.resampling import MIN_PERMUTATIONS, Measure
from analysis.traces.capture import on_all_layers
from analysis.traces.statistics import trace_statistics
from analysis.traces.trace import NO_ROUTING, Trace
from varjax.errors import InputError, NotTestableError
from varjax.stats import RoutingStats

Found = TypeVar("Found")

_GUESSED = "experts up to the largest id in the file"


@dataclass(frozen=True)
class TraceSettings:
    """How the estimates from a trace are made.

    Raises:
        InputError: a number that nothing can be estimated with.
    """

    orders: tuple[int, ...] = (1, 2, 3)  # context lengths in tokens, the current one included
    min_count: int = 10  # occurrences that a key needs
    permutations: int = 39  # of the nulls; 0 for none, at least 19 otherwise; p is at least 1 / (permutations + 1)
    samples: int = 1000  # bootstrap draws of documents
    seed: int = 0

    def __post_init__(self) -> None:
        if self.permutations != 0 and self.permutations < MIN_PERMUTATIONS:
            raise InputError(
                f"permutations is {self.permutations}; give 0 for no null, or at least {MIN_PERMUTATIONS}: "
                "fewer cannot make a 95% band"
            )
        for name in ("min_count", "samples"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; give at least 1")
        if not self.orders or min(self.orders) < 1:
            raise InputError(f"orders are {list(self.orders)}; give one or more context lengths of at least 1")
        object.__setattr__(self, "orders", tuple(sorted(set(self.orders))))

    @property
    def order_names(self) -> list[str]:
        """A name for each context order."""
        return [f"order {order}" for order in self.orders]


@dataclass(frozen=True)
class Source:
    """The contents of a file: statistics, or a trace and the statistics computed from it."""

    stats: RoutingStats
    meta: Mapping[str, Any]  # as `varjax.statsfile.read` returns it
    strings: Mapping[int, str] = field(default_factory=dict)  # the text of token ids, as far as known
    trace: Trace | None = None  # that the statistics were computed from


@dataclass(frozen=True)
class EntropyKind:
    """What the gate entropy in some statistics is the entropy of: all experts, or what a trace has of them."""

    experts: int  # probabilities it is over
    words: str  # the largest possible value
    caution: Sequence[str]  # where it is not the entropy that the published criteria mean
    no_verdict: str  # why it is a lower bound only, so that no criterion can PASS, or ""

    @property
    def most(self) -> float:
        """The largest possible entropy in nats; NaN where there is no choice."""
        return math.log(self.experts) if self.experts > 1 else math.nan


@dataclass(frozen=True)
class RoutingData:
    """Everything that the questions about routing may use."""

    source: Source
    trace: Trace | None = None  # for questions that need single tokens
    other: RoutingStats | None = None  # a second run, to compare with
    other_name: str = "another run"
    settings: TraceSettings = field(default_factory=TraceSettings)
    progress: bool = False  # show bars on standard error

    @property
    def stats(self) -> RoutingStats:
        """The routing statistics."""
        return self.source.stats

    @cached_property
    def entropy(self) -> EntropyKind:
        """What the gate entropy of the statistics is the entropy of."""
        return _entropy_kind(self.source)

    @cached_property
    def draws(self) -> DocumentDraws | None:
        """Bootstrap draws of the documents that the statistics were computed from; None where these are not known."""
        if self.source.trace is None:
            return None
        samples = min(self.settings.samples, SAMPLES)
        return DocumentDraws(self.source.trace, None, samples, self.settings.seed, self.progress)

    def name_of(self, row: int) -> str:
        """Name the token id of a key of order 1.

        Args:
            row: of the key in the statistics.

        Returns:
            The text of the token, if it is known, and its id.
        """
        token = int(self.stats.keys[row, -1])
        text = self.source.strings.get(token)
        return f"id {token}" if text is None else f"{text!r} (id {token})"

    def on_trace(self, estimate: Callable[[Trace], Found]) -> Found:
        """Estimate something on the captured layers of the trace.

        Args:
            estimate: takes the trace with its captured layers only.

        Returns:
            The estimate on all layers; layers that were not captured have NaN, or -1 among integers.

        Raises:
            NotMeasuredError: there is no trace.
        """
        if self.trace is None:
            raise NotMeasuredError(
                "needs a trace: experiments/01_routing_analysis.py records one next to the statistics "
                "(--trace_tokens), analysis.traces.importing imports one; then give --trace FILE"
            )
        captured = self.trace.captured
        found = estimate(self.trace.captured_part())
        return found if captured.all() else _on_all_layers(found, captured)


def needs_routing(data: RoutingData) -> None:
    """Check that there is routing to ask about, as the `needs` of a question.

    Args:
        data: statistics.

    Raises:
        NotTestableError: there is one expert per layer.
    """
    if data.stats.num_experts == 1:
        guessed = f" ({_GUESSED})" if "num_experts" in data.source.meta.get("filled", {}) else ""
        raise NotTestableError(f"every layer has one expert, which every token runs{guessed}: {NO_ROUTING}")


def needs_selection(data: RoutingData) -> None:
    """Check that the router selects some experts of many, as the `needs` of a question about which ones run.

    Args:
        data: statistics, and a trace if there is one.

    Raises:
        NotTestableError: every token runs all experts.
    """
    needs_routing(data)
    if data.trace is not None:
        check_selection(data.trace)


def check_selection(trace: Trace) -> None:
    """Check that the router selects some experts of many.

    Args:
        trace: the trace.

    Raises:
        NotTestableError: every token runs all experts.
    """
    if trace.top_k == trace.num_experts:
        raise NotTestableError(f"every token runs all {trace.num_experts} experts of a layer: the router selects none")


def trace_source(trace: Trace) -> Source:
    """Compute the statistics of a trace on all token ids.

    Args:
        trace: with ranked experts.

    Returns:
        The statistics. Their metadata say as `entropy_from` what entropy was computed from (`all` or `chosen` as in
        `Trace.probs_over`, None where it is the gate's own), and as `scores` what the probabilities come from.
    """
    entropy_from = trace.probs_over if trace.entropy is None else None
    meta = {**trace.origin, "entropy_from": entropy_from, "top_k": trace.top_k, "filled": {}, "rows_with_nan": 0}
    if trace.probs is not None:
        meta["scores"] = trace.scores
    return Source(trace_statistics(trace), meta, trace.token_strings, trace)


def _entropy_kind(source: Source) -> EntropyKind:
    meta, experts, why = source.meta, source.stats.num_experts, ""
    if meta.get("entropy_from") == "chosen":
        # The K largest probabilities over their sum majorize all E of them, so their entropy never exceeds the gate's.
        experts = int(meta["top_k"])
        why = f"the criterion is on gate entropy, of which the {experts} chosen experts' is a lower bound"
    elif meta.get("entropy_from") == "all":
        why = "gate entropy is known as a lower bound only"
    words = f"ln {experts} = {math.log(experts):.3f} nats"
    if "num_experts" in meta.get("filled", {}):
        words += f" ({_GUESSED})"
    caution = []
    if why:
        caution.append(
            "Caution: the trace has the chosen experts' probabilities only, so the entropy here is a lower bound of "
            "that of the router: a FAIL for high entropy is valid, a PASS for low entropy is not, and rho is not "
            "bounded."
        )
    if meta.get("scores") == "sigmoid":
        caution.append(
            "Caution: the router has sigmoid scores; they are divided by their sum here. The published criteria are "
            "about the entropy of a softmax."
        )
    return EntropyKind(experts, words, caution, why)


def _on_all_layers(found: Any, captured: np.ndarray) -> Any:
    """Findings on the captured layers, bool [L], as findings on all L: the others have NaN, and -1 among integers.

    Arrays of findings have the layers first, those of a `Measure` second. Coverages are the same in every layer.
    """
    if isinstance(found, Measure):
        arrays = {name: one for name, one in vars(found).items() if isinstance(one, np.ndarray)}
        if found.name.endswith("coverage"):
            changed: dict[str, Any] = {
                name: np.repeat(one[:, :1], len(captured), axis=1) for name, one in arrays.items()
            }
        else:
            changed = {name: on_all_layers(one, captured, np.nan, axis=1) for name, one in arrays.items()}
        return replace(found, **changed)
    if isinstance(found, np.ndarray):
        return on_all_layers(found, captured, -1 if np.issubdtype(found.dtype, np.integer) else np.nan)
    if isinstance(found, Mapping):
        return {name: _on_all_layers(one, captured) for name, one in found.items()}
    if is_dataclass(found) and not isinstance(found, type):
        return replace(found, **{one.name: _on_all_layers(getattr(found, one.name), captured) for one in fields(found)})
    return found

"""What one configuration is worth on the tuning documents: how much faster, at what cost, how surely.

Letters: N documents.

The cost is the relative change of perplexity per token, with a one-sided upper confidence limit over documents:
tokens of one document depend on each other, documents do not. It is Student's limit for a ratio of sums (Cochran 1977,
chapter 6), good enough to search by; what holds for every N is the certificate, on other documents.

A hopeless configuration is given up early. Documents are scored in a random order, some at a time, and after each part
a confidence sequence (`varjax.bounds`) asks whether the mean clipped increase per document, which the certificate will
have to bound, has passed the limit beyond doubt. It may be asked as often as wanted, and stops a configuration that is
within the limit with a probability of at most 1 - confidence.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import cached_property
from typing import Literal

import jax
import numpy as np
from scipy import stats as distributions

from analysis.evaluate.certificate import CLIP, LIMIT
from analysis.evaluate.losses import Losses, score, var_runner
from analysis.evaluate.points import Subject, score_point
from analysis.evaluate.policy_search import Choice, Ladder, Measured, climb, policies
from analysis.resampling import Estimate
from models import MoEConfig
from profiling.calls import PHASES
from profiling.costs import flops_per_token
from profiling.timing import geometric_mean, measure
from tuning.points import PREDICTED, Outcome
from varjax import bounds
from varjax.config import VARConfig
from varjax.errors import InputError
from varjax.model import VARModel, build_for
from varjax.progress import progress_bar
from varjax.step import TIERS, summary
from varjax.table import RouteTable, asked_orders, with_policies

PARTS = 5  # in which the documents are scored
PROGRAMS = 8  # sizes of the cached tier whose compiled programs are kept

Speed = Literal["measured", "model"]


@dataclasses.dataclass(frozen=True)
class Objective:
    """How configurations are judged. One table is built for all of them; they differ in its rules.

    Raises:
        InputError: settings out of their ranges, a config that bounds its answers, or as
            `analysis.evaluate.points.Subject`.
    """

    subject: Subject  # its documents are those of the tune split
    speed: Speed = "measured"  # against the plain model, paired; or predicted by active assignments, which repeats
    phases: tuple[str, ...] = PHASES  # that count, if measured
    repeats: int = 7  # timed rounds
    confidence: float = 0.95  # of the upper limit
    limit: float = math.expm1(LIMIT)  # relative change of perplexity, from which a configuration is hopeless

    def __post_init__(self) -> None:
        if not 0 < self.confidence < 1:
            raise InputError(f"confidence={self.confidence}: expected a probability between 0 and 1, such as 0.95")
        if not 0 < self.limit < math.expm1(CLIP):
            raise InputError(f"limit={self.limit}: expected a relative change between 0 and {math.expm1(CLIP):.2f}")
        if not self.phases or not set(self.phases) <= set(PHASES):
            raise InputError(f"phases={self.phases}: expected one or more of {', '.join(PHASES)}")
        bound = self.subject.config.answers_per_layer
        if bound is not None:  # which answers are the most valuable depends on each policy's own keys
            raise InputError(
                f"answers_per_layer={bound}: all configurations of a search share one table, which holds every answer; "
                "search with answers_per_layer=None and bound the answers of the configuration that is found"
            )

    def evaluate(self, config: VARConfig) -> Outcome:
        """The configuration on the tuning documents, as far as it is not hopeless, and its speed."""
        self._make_room(config)
        table = with_policies(self._table, config, self.subject.stats, self.subject.answers)
        found, experts, learned = self._losses(config, table)
        change, seen = found - self._plain.nll[self._order][: len(found)], self._tokens[: len(found)]
        value, upper = upper_limit(change, seen, self.confidence)
        speedups = self._speedups(config, table, experts)
        return Outcome(
            degradation=value,
            upper=upper,
            documents=len(found),
            hopeless=len(found) < len(self._order),
            experts_per_token=experts,
            learned_share=learned,
            speedups=speedups,
            speedup=geometric_mean(one.value for one in speedups.values()),
        )

    def ladder(self) -> Ladder:
        """Each layer alone at several tolerances; kept on disk by the subject, where it has a folder."""
        subject, top_k = self.subject, self.subject.model.config.top_k
        orders = tuple(order for order in subject.answers.ngram_orders if order > 0)
        bar = progress_bar(unit=" policies", show=subject.progress, desc="layers alone")

        def measured(choices: Sequence[Choice]) -> Measured:
            layers = policies(choices, subject.model.config.num_experts, orders)
            config = dataclasses.replace(subject.config, default=None, layers=layers, cache_size=0)
            table = with_policies(self._table, config, subject.stats, subject.answers)
            found = score_point(subject, config, table)
            bar.update()
            change = (found.nll - self._plain.nll).sum() / self._plain.tokens.sum()
            return Measured(tuple(choices), math.expm1(change), found.experts_per_token)

        with bar:
            return climb(measured, subject.answers, subject.config.answer_shrinkage, top_k)

    @cached_property
    def _table(self) -> RouteTable:
        nothing = dataclasses.replace(self.subject.config, default=None, layers={})
        return build_for(self.subject.model, nothing, self.subject.stats, self.subject.answers, keep_shapes=True)

    def _make_room(self, config: VARConfig) -> None:
        """Let go of compiled programs before there are too many.

        Each size of the cached tier has its own, some thousands of memory mappings on a CPU, and Linux gives a process
        65,530 unless told otherwise; beyond them the compiler fails.
        """
        size = (config.cache_size, config.context_window_size) if config.cache_size else None
        if size not in self._sizes and len(self._sizes) >= PROGRAMS:
            jax.clear_caches()
            self._sizes.clear()
        self._sizes.add(size)

    @cached_property
    def _sizes(self) -> set[tuple[int, int] | None]:
        """Of the cached tier, of which compiled programs are held."""
        return set()

    @cached_property
    def _plain(self) -> Losses:
        """Kept on disk by the subject, where it has a folder."""
        return score_point(self.subject)

    @cached_property
    def _order(self) -> np.ndarray:
        """int64 [N]: the documents that have a scored token, in the order of scoring."""
        scored = np.flatnonzero(self._plain.tokens > 0)
        return np.random.default_rng(self.subject.seed).permutation(scored)

    @property
    def _tokens(self) -> np.ndarray:
        """int64 [N], scored, in the order of scoring."""
        return self._plain.tokens[self._order]

    def _losses(self, config: VARConfig, table: RouteTable) -> tuple[np.ndarray, float, float]:
        """float64 [<= N], nats, in the order of scoring; experts per token; share of the learned tier."""
        caching = self.subject.caching
        var_model = VARModel(self.subject.model, config, table=table)
        state, found = caching.init(var_model, self.subject.batch_size), np.zeros(0)
        sequence = bounds.begin(-CLIP, CLIP, self.confidence, "lower")
        for part in np.array_split(self._order, min(PARTS, len(self._order))):
            scores, state = score(
                var_runner(var_model, caching),
                state,
                [self.subject.documents[index] for index in part],
                batch_size=self.subject.batch_size,
                max_length=self.subject.max_length,
                stride=self.subject.stride,
                progress=False,
            )
            rates = (scores.nll - self._plain.nll[part]) / scores.tokens
            sequence = bounds.update(sequence, np.clip(rates, -CLIP, CLIP))
            found = np.concatenate([found, scores.nll])
            if sequence.lower > math.log1p(self.limit):
                break
        assert state is not None  # VAR is on
        shares = summary(state.counters, self.subject.model.config.top_k)
        return found, shares["experts_per_token"], shares["tiers"][TIERS[-1]]

    def _speedups(self, config: VARConfig, table: RouteTable, experts: float) -> dict[str, Estimate]:
        if self.speed == "model":
            value = predicted_speedup(self.subject.model.config, self.subject.max_length, experts)
            return {PREDICTED: Estimate(value, value, value)}
        # A table of one's own would look up no more than this; all else that is there and unused costs little.
        asked = asked_orders(config, table.num_layers) or table.ngram_orders[:1]
        timed = measure(
            VARModel(self.subject.model, config, table=dataclasses.replace(table, ngram_orders=asked)),
            self.subject.documents,
            batch_size=self.subject.batch_size,
            max_length=self.subject.max_length,
            repeats=self.repeats,
            seed=self.subject.seed,
            phases=self.phases,
            seconds_per_token=self.subject.caching.seconds_per_token,
        )
        return {phase: Estimate(**timed["speedup"][phase]) for phase in self.phases}


def upper_limit(change: np.ndarray, tokens: np.ndarray, confidence: float) -> tuple[float, float]:
    """The relative change of perplexity per token, and its one-sided upper confidence limit.

    Args:
        change: float64 [N], added loss of each document, nats.
        tokens: int64 [N], scored.
        confidence: of the limit; with one document it is infinite.
    """
    value = float(change.sum() / tokens.sum())
    if len(change) < 2:
        return math.expm1(value), math.inf
    spread = math.sqrt(len(change) * float(np.var(change - value * tokens, ddof=1))) / float(tokens.sum())
    quantile = float(distributions.t.ppf(confidence, len(change) - 1))
    return math.expm1(value), math.expm1(value + quantile * spread)


def predicted_speedup(model: MoEConfig, length: int, experts: float) -> float:
    """Of prefill, by the operations that are left: the ceiling where time is arithmetic, and the same at every run.

    Args:
        length: tokens of a window.
        experts: that run per token and layer.
    """
    context = (length + 1) // 2
    plain, var = (sum(flops_per_token(model, context, k).values()) for k in (float(model.top_k), experts))
    return plain / var

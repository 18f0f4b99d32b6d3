"""The value of one configuration on the tune documents: how much faster, at what loss of quality, how certainly.

Letters: N documents.

The loss of quality is the relative increase in perplexity per token, with a one-sided upper confidence limit over
documents: Student's limit for a ratio of sums (Cochran 1977, chapter 6), since tokens of one document depend on each
other. That is good enough to search by; a guarantee for every N is the certificate's task, on other documents.

A hopeless configuration is given up early. Documents are scored in a random order, part by part, and after each part a
confidence sequence (`varjax.bounds`) checks whether the mean clipped increase per document, which the certificate will
bound, has certainly passed the limit. A configuration within the limit is stopped with probability 1 - confidence at
most.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import cached_property
from typing import Literal

import jax
import numpy as np
import optuna
from scipy import stats as distributions

from analysis.criteria import MAX_DEGRADATION
from analysis.evaluate.certificate import CLIP
from analysis.evaluate.losses import Losses, score, var_runner
from analysis.evaluate.points import Subject, score_point
from analysis.evaluate.policy_search import config_with
from analysis.evaluate.prices import Choice, Prices, measure_prices
from analysis.resampling import Estimate
from analysis.text.encoding import Encoded
from models import MoEConfig
from profiling.calls import PHASES
from profiling.costs import flops_per_token
from profiling.timing import geometric_mean, measure
from tuning.points import PREDICTED, Outcome, Point
from tuning.space import Space, config_at, suggest
from varjax import bounds
from varjax.config import VARConfig
from varjax.errors import InputError
from varjax.model import VARModel
from varjax.step import TIERS, summary
from varjax.table import RouteTable, asked_orders, with_policies

PARTS = 5  # the documents are scored in this many parts
PROGRAMS = 8  # compiled programs are kept for this many sizes of the cached tier


@dataclasses.dataclass(frozen=True)
class Objective:
    """How configurations are judged. One table serves all of them; they differ in its rules only.

    Raises:
        InputError: a setting is out of range, the config bounds its answers, or as
            `analysis.evaluate.points.Subject`.
    """

    subject: Subject  # its documents are those of the tune split
    space: Space = ()  # the parameters that trials vary; the rest stays as in the subject's config
    speed: Literal["measured", "model"] = "measured"  # paired timing, or prediction from active assignments
    phases: tuple[str, ...] = PHASES  # phases that are timed
    repeats: int = 7  # timed rounds
    confidence: float = 0.95  # of the upper limit
    limit: float = MAX_DEGRADATION  # relative increase in perplexity above which a configuration is hopeless

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

    def attempt(self, trial: optuna.Trial) -> Point:
        """Evaluate one trial of a search.

        Args:
            trial: suggests the values of the parameters in `space`.

        Returns:
            The trial's values, the config that they stand for, and its outcome.
        """
        values = suggest(self.space, trial)
        config = config_at(values, self.subject.config, self.prices, self.orders)
        return Point(trial.number, values, config, self.evaluate(config))

    def evaluate(self, config: VARConfig) -> Outcome:
        """Score a configuration on the tune documents until it proves hopeless, and determine its speed.

        Args:
            config: a configuration over the subject's statistics and answers.

        Returns:
            Its loss of quality and its speed-up over the plain model.
        """
        self._make_room(config)
        table = with_policies(self._table, config, self.subject.stats, self.subject.answers)
        nll, experts, learned = self._score(VARModel(self.subject.model, config, table))
        seen = self._order[: len(nll)]
        degradation, upper = upper_limit(nll - self._plain.nll[seen], self._plain.tokens[seen], self.confidence)
        if self.speed == "model":
            maps = self.subject.answers.maps
            rank = 0 if maps is None else maps.rank
            value = _predicted_speedup(self.subject.model.config, self.subject.max_length, experts, rank)
            speedups = {PREDICTED: Estimate(value, value, value)}
        else:  # a table of its own would look up these orders only; scoring shares one compiled program instead
            asked = asked_orders(config, table.num_layers) or table.ngram_orders[:1]
            own = VARModel(self.subject.model, config, dataclasses.replace(table, ngram_orders=asked))
            speedups = timed(self.subject, own, self.subject.documents, self.repeats, phases=self.phases)
        return Outcome(
            degradation=degradation,
            upper=upper,
            documents=len(nll),
            hopeless=len(nll) < len(self._order),
            experts_per_token=experts,
            learned_share=learned,
            speedups=speedups,
            speedup=geometric_mean(one.value for one in speedups.values()),
        )

    @property
    def orders(self) -> tuple[int, ...]:
        """Context orders whose answers are of use."""
        return self.subject.answers.useful_orders

    @cached_property
    def prices(self) -> Prices:
        """What errors cost on the tune documents."""
        subject = self.subject
        config = config_with(subject, [Choice(layer, 1.0) for layer in subject.answers.layers])
        return measure_prices(subject, config, with_policies(self._table, config, subject.stats, subject.answers))

    @cached_property
    def _table(self) -> RouteTable:
        nothing = dataclasses.replace(self.subject.config, default=None, layers={})
        return self.subject.build(nothing)

    def _make_room(self, config: VARConfig) -> None:
        """Drop compiled programs before there are too many.

        Each size of the cached tier has its own, which take some thousands of memory mappings on a CPU. By default
        Linux allows a process 65,530; beyond that the compiler fails.
        """
        size = (config.cache_size, config.context_window_size) if config.cache_size else None
        if size not in self._sizes and len(self._sizes) >= PROGRAMS:
            jax.clear_caches()
            self._sizes.clear()
        self._sizes.add(size)

    @cached_property
    def _sizes(self) -> set[tuple[int, int] | None]:
        """Sizes of the cached tier whose compiled programs are held."""
        return set()

    @cached_property
    def _plain(self) -> Losses:
        return score_point(self.subject)

    @cached_property
    def _order(self) -> np.ndarray:
        """int64 [N]: the documents that have a scored token, in the order of scoring."""
        scored = np.flatnonzero(self._plain.tokens > 0)
        return np.random.default_rng(self.subject.seed).permutation(scored)

    def _score(self, var_model: VARModel) -> tuple[np.ndarray, float, float]:
        """float64 [<= N], nats, in the order of scoring; experts per token; share of the learned tier."""
        subject = self.subject
        state, nll = subject.caching.init(var_model, subject.batch_size), np.zeros(0)
        sequence = bounds.begin(-CLIP, CLIP, self.confidence, "lower")
        for part in np.array_split(self._order, min(PARTS, len(self._order))):
            scores, state = score(
                var_runner(var_model, subject.caching),
                state,
                [subject.documents[index] for index in part],
                progress=False,
                **subject.windows,
            )
            nll = np.concatenate([nll, scores.nll])
            rates = (scores.nll - self._plain.nll[part]) / scores.tokens
            sequence = bounds.update(sequence, np.clip(rates, -CLIP, CLIP))
            if sequence.lower > math.log1p(self.limit):
                break
        assert state is not None  # VAR is on
        shares = summary(state.counters, subject.model.config.top_k)
        return nll, shares["experts_per_token"], shares["tiers"][TIERS[-1]]


def timed(
    subject: Subject,
    var_model: VARModel,
    documents: Sequence[Encoded],
    repeats: int,
    seed: int | None = None,
    phases: Sequence[str] = PHASES,
) -> dict[str, Estimate]:
    """Measure the speed-up of a VAR model over its plain model, paired.

    Args:
        subject: says how documents are read.
        var_model: the model under VAR.
        documents: texts to read.
        repeats: number of timed rounds.
        seed: draws the texts; None: the subject's.
        phases: those of "prefill" and "decode" to time.

    Returns:
        The speed-up by phase, with a 95% interval over rounds.
    """
    found = measure(
        var_model,
        documents,
        batch_size=subject.batch_size,
        max_length=subject.max_length,
        repeats=repeats,
        seed=subject.seed if seed is None else seed,
        phases=phases,
        seconds_per_token=subject.caching.seconds_per_token,
    )
    return {phase: Estimate(**found["speedup"][phase]) for phase in phases}


def upper_limit(change: np.ndarray, tokens: np.ndarray, confidence: float) -> tuple[float, float]:
    """Estimate the relative increase in perplexity per token and its one-sided upper confidence limit.

    Args:
        change: float64 [N], added loss of each document, nats.
        tokens: int64 [N], scored tokens.
        confidence: of the limit.

    Returns:
        The increase and its limit, which is infinite for one document.
    """
    value = float(change.sum() / tokens.sum())
    if len(change) < 2:
        return math.expm1(value), math.inf
    spread = math.sqrt(len(change) * float(np.var(change - value * tokens, ddof=1))) / float(tokens.sum())
    quantile = float(distributions.t.ppf(confidence, len(change) - 1))
    return math.expm1(value), math.expm1(value + quantile * spread)


def _predicted_speedup(model: MoEConfig, length: int, experts: float, answer_rank: int = 0) -> float:
    """Of prefill, by the remaining operations: a ceiling, and the same in every run."""
    context = (length + 1) // 2
    plain, var = (sum(flops_per_token(model, context, k, answer_rank).values()) for k in (float(model.top_k), experts))
    return plain / var

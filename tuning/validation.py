"""What the configurations that a search chose are worth on documents that it never saw.

Two sets of documents, neither of which the search or its tables have seen, answer two questions:

- The calibrate split certifies and chooses. The candidates are tested one after the other
  (`analysis.evaluate.certificate`), those that were surest on the tuning documents first, so the error of all
  certificates together is controlled: with the stated confidence no candidate that is certified costs more than the
  limit. Of the certified ones the fastest is chosen, by timings on these documents.
- The test split judges that one configuration. The best of several measurements is better than what it measures, so
  no measurement that chose takes part here. The documents are dealt out to several repeats, each with its own
  documents, seed and timing.

A verdict must follow from a limit, not from an estimate: the speed-up passes where its one-sided lower confidence limit
over the repeats is above the bar, the loss where its one-sided upper confidence limit over the documents is below it.
Student's limit takes the logarithms of the repeats' speed-ups as draws from a normal distribution.

The presets are measured next to the chosen configuration: a search has to beat what costs nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from scipy import stats as distributions

from analysis.criteria import TUNING_SPEEDUP, Criterion
from analysis.evaluate.certificate import CLIP, LIMIT, Certificate, certify
from analysis.evaluate.points import Point, Subject, score_point
from analysis.resampling import Estimate, ratio_estimate
from analysis.text.encoding import Drawn
from profiling.timing import geometric_mean, measure
from tuning.objective import upper_limit
from varjax.config import VARConfig
from varjax.errors import InputError
from varjax.model import VARModel, build_for
from varjax.progress import progress_bar
from varjax.table import RouteTable

REPEATS = 5  # fewer have a wide limit: over 3 the quantile is 2.9 standard errors, over 5 it is 2.1
PROGRAMS = 4  # configurations whose compiled programs are held at once
SPREAD = 0.15  # relative distance of a repeat's speed-up from their mean, up to which repeats agree


@dataclasses.dataclass(frozen=True)
class Timed:
    """The speed of one configuration on some documents, against the plain model in the same rounds."""

    speedups: Mapping[str, Estimate]  # by phase
    speedup: float  # their geometric mean


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One searched configuration on the calibrate documents: what it is chosen by."""

    name: str
    experts_per_token: float
    timed: Timed


@dataclasses.dataclass(frozen=True)
class Repeat:
    """One configuration on one set of test documents."""

    documents: int
    degradation: Estimate  # relative change of perplexity per token
    timed: Timed


@dataclasses.dataclass(frozen=True)
class Judged:
    """One configuration on all sets of test documents; none of these measurements chose it."""

    name: str
    experts_per_token: float
    degradation: Estimate  # over all test documents
    upper: float  # one-sided upper confidence limit of the degradation, at the level of the validation
    repeats: tuple[Repeat, ...]

    @property
    def speedups(self) -> np.ndarray:
        """float64 [repeats]."""
        return np.array([one.timed.speedup for one in self.repeats])

    @property
    def speedup(self) -> float:
        """The geometric mean over the repeats."""
        return geometric_mean(self.speedups)

    def consistent(self, limit: float) -> bool:
        """Whether no repeat is far from the others in speed, and none shows a loss above the limit by its interval.

        Args:
            limit: on the relative change of perplexity.
        """
        near = np.abs(self.speedups / self.speedup - 1) <= SPREAD
        return bool(near.all()) and all(one.degradation.low <= limit for one in self.repeats)


@dataclasses.dataclass(frozen=True)
class Validation:
    """The candidates in the order of testing, the one that was chosen, and the presets it was measured with."""

    certificate: Certificate
    candidates: tuple[Candidate, ...]
    chosen: Judged | None  # None: no candidate is certified, so nothing was judged and no test document was read
    presets: tuple[Judged, ...]
    limit: float  # relative change of perplexity
    level: float  # confidence of every limit

    @property
    def passed(self) -> bool:
        """Whether there is a chosen configuration that meets every criterion."""
        return self.chosen is not None and all(one.passed for one in self.criteria(self.chosen))

    def criteria(self, chosen: Judged) -> tuple[Criterion, ...]:
        """The published criteria, each judged by a confidence limit."""
        (bound,) = (one.overall for one in self.certificate.configurations if one.name == chosen.name)
        least, rivals = lower_limit(chosen.speedups, self.level), self._rivals()
        margins = {one.name: lower_limit(chosen.speedups / one.speedups, self.level) for one in rivals}
        closest = min(margins, key=lambda name: margins[name], default=None)
        certified = "–" if bound.perplexity_bound is None else f"{bound.perplexity_bound:+.2%}"
        at, most = f"at {self.level:.4g} confidence", f"{self.limit:.2%}"
        low, high = chosen.speedups.min(), chosen.speedups.max()
        return (
            Criterion(
                "degradation, test documents",
                f"upper limit < {most}",
                f"{chosen.degradation.value:+.2%}, at most {chosen.upper:+.2%} {at}",
                chosen.upper < self.limit,
            ),
            Criterion(f"degradation, certified {at}", f"<= {most}", certified, bound.within_limit),
            Criterion(
                "speed-up",
                f"lower limit > {TUNING_SPEEDUP}x",
                f"{chosen.speedup:.2f}x, at least {least:.2f}x {at}",
                least > TUNING_SPEEDUP,
            ),
            Criterion(
                f"consistent over {len(chosen.repeats)} repeats",
                f"within {SPREAD:.0%} of their mean, none above {most} by its interval",
                f"{low:.2f}x to {high:.2f}x",
                chosen.consistent(self.limit),
            ),
            Criterion(
                f"faster than every preset within {self.limit:+.2%}",
                "lower limit of the ratio > 1",
                "there is none" if closest is None else f"{closest}: at least {margins[closest]:.2f} times {at}",
                all(margin > 1 for margin in margins.values()),
            ),
        )

    def _rivals(self) -> list[Judged]:
        """The presets that may be within the limit: an estimate is enough to make one a rival."""
        return [one for one in self.presets if one.degradation.value < self.limit]


def validate(
    calibrate: Subject,
    test: Subject,
    candidates: Mapping[str, VARConfig],
    presets: Mapping[str, VARConfig],
    *,
    repeats: int = REPEATS,
    rounds: int = 11,
    level: float = 0.95,
    limit: float = math.expm1(LIMIT),
    drawn: Drawn | None = None,
) -> Validation:
    """Certify the candidates, choose the fastest certified one, and judge it on test documents, with the presets.

    Args:
        calibrate: model, statistics and answers over documents of the calibrate split.
        test: the same over documents of the test split; its `seed` deals them out to the repeats.
        candidates: by name, the surest first.
        presets: by name.
        repeats: sets of test documents, at least 2.
        rounds: of timing, per repeat.
        level: confidence of the certificate, and of every limit on the test documents.
        limit: relative change of perplexity.
        drawn: how the calibrate documents came out of their split; None: that was not recorded.

    Raises:
        InputError: too few repeats, or fewer test documents than repeats; as `analysis.evaluate.certificate.certify`.
    """
    if not 2 <= repeats <= len(test.documents):
        raise InputError(f"{repeats} repeats of {len(test.documents)} test documents: expected at least 2, and no more")
    bar = progress_bar(
        total=len(candidates) + 1 + len(presets), unit="configuration", desc="validation", show=test.progress
    )
    scored: dict[str, Point] = {}
    found: list[Candidate] = []
    for name, config in candidates.items():
        table = _table(calibrate, config, len(found))
        scored[name] = score_point(calibrate, config, table)
        timed = _timed(calibrate, config, table, range(len(calibrate.documents)), rounds, calibrate.seed)
        found.append(Candidate(name, scored[name].experts_per_token, timed))
        bar.update()
    certified = certify(
        score_point(calibrate),
        scored,
        clip=CLIP,
        model_sha256=calibrate.model.fingerprint,
        config_sha256={name: config.digest(calibrate.table_sha256) for name, config in candidates.items()},
        level=level,
        limit=math.log1p(limit),
        seed=calibrate.seed,
        drawn=drawn,
        cached=[name for name, one in candidates.items() if one.cache_size > 0 and calibrate.caching.shared],
    )
    judged: list[Judged] = []
    if chosen := choose(certified, found):
        plain = score_point(test)
        for name, config in {chosen: candidates[chosen], **presets}.items():
            table = _table(test, config, len(found) + len(judged))
            judged.append(_judge(test, plain, name, config, table, repeats, rounds, level))
            bar.update()
    bar.close()
    return Validation(certified, tuple(found), judged[0] if judged else None, tuple(judged[1:]), limit, level)


def choose(certified: Certificate, candidates: Sequence[Candidate]) -> str | None:
    """The name of the candidate that was the fastest of the certified ones; None if none is certified."""
    there = [one for one in candidates if one.name in certified.certified]
    return max(there, key=lambda one: one.timed.speedup).name if there else None


def lower_limit(ratios: np.ndarray, level: float) -> float:
    """The one-sided lower confidence limit of the geometric mean of ratios that were drawn independently.

    Args:
        ratios: float64 [N], at least 2, all above 0.
        level: of the limit.
    """
    logs = np.log(ratios)
    error = float(np.std(logs, ddof=1)) / math.sqrt(len(logs))
    return math.exp(float(logs.mean()) - float(distributions.t.ppf(level, len(logs) - 1)) * error)


def _judge(
    test: Subject,
    plain: Point,
    name: str,
    config: VARConfig,
    table: RouteTable,
    repeats: int,
    rounds: int,
    level: float,
) -> Judged:
    """One configuration on all test documents, which are dealt out to the repeats."""
    scored = score_point(test, config, table)
    change = scored.nll - plain.nll
    shares = np.array_split(np.random.default_rng(test.seed).permutation(len(test.documents)), repeats)
    measured = []
    for seed, share in enumerate(shares, test.seed):
        timed = _timed(test, config, table, share, rounds, seed)
        measured.append(Repeat(len(share), _degradation(change[share], plain.tokens[share], seed), timed))
    _, upper = upper_limit(change, plain.tokens, level)
    overall = _degradation(change, plain.tokens, test.seed)
    return Judged(name, scored.experts_per_token, overall, upper, tuple(measured))


def _table(subject: Subject, config: VARConfig, built: int) -> RouteTable:
    """A table of its own, as the configuration would run; `built` tables were built before it."""
    # No other configuration has a table of this size, and programs must not pile up; the plain model's serve all.
    if built and built % PROGRAMS == 0:
        jax.clear_caches()
    return build_for(subject.model, config, subject.stats, subject.answers)


def _timed(
    subject: Subject, config: VARConfig, table: RouteTable, share: Sequence[int] | np.ndarray, rounds: int, seed: int
) -> Timed:
    """The speed on some of the subject's documents."""
    found = measure(
        VARModel(subject.model, config, table=table),
        [subject.documents[one] for one in share],
        batch_size=subject.batch_size,
        max_length=subject.max_length,
        repeats=rounds,
        seed=seed,
        seconds_per_token=subject.caching.seconds_per_token,
    )
    speedups = {phase: Estimate(**ratio) for phase, ratio in found["speedup"].items()}
    return Timed(speedups, geometric_mean(one.value for one in speedups.values()))


def _degradation(change: np.ndarray, tokens: np.ndarray, seed: int) -> Estimate:
    return ratio_estimate(change, tokens, 2000, seed, np.expm1)

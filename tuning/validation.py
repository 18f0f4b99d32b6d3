"""What the configurations that a search chose are worth on documents that it never saw, and what a report says of it.

Two sets of documents, neither of which the search or its tables have seen, answer two questions:

- The calibrate split certifies and chooses. The candidates are tested one after the other, the most certain first
  (`analysis.evaluate.certificate`), so with the stated confidence no certified candidate costs more than the limit.
  The fastest certified one, by timings on these documents, is chosen.
- The test split judges the chosen one. No measurement that chose takes part, because the best of several measurements
  is too good. The documents are divided among several repeats, each with its own documents, seed and timing.

A verdict follows from a confidence limit, not from an estimate: the lower limit of the speed-up over the repeats
(Student's, on the logarithms) and the upper limit of the loss over the documents. The presets are measured too, because
a search has to beat what costs nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from scipy import stats as distributions

from analysis.criteria import MAX_DEGRADATION, TUNING_SPEEDUP, Criterion
from analysis.evaluate import certificate
from analysis.evaluate.certificate import CLIP, Certificate, certify
from analysis.evaluate.points import Point, Subject, score_point
from analysis.report.report import UNKNOWN, Column, Section, Table
from analysis.resampling import Estimate, ratio_estimate
from analysis.text.encoding import Drawn
from profiling.timing import geometric_mean
from tuning.objective import timed, upper_limit
from varjax.config import VARConfig
from varjax.errors import InputError
from varjax.model import VARModel
from varjax.progress import progress_bar

REPEATS = 5  # the quantile is 2.9 standard errors over 3 repeats and 2.1 over 5
PROGRAMS = 4  # compiled programs are kept for this many configurations
SPREAD = 0.15  # largest relative distance of a repeat's speed-up from the mean at which repeats agree


@dataclasses.dataclass(frozen=True)
class Repeat:
    """One configuration on one set of documents."""

    documents: int
    degradation: Estimate  # relative increase in perplexity per token
    speedups: Mapping[str, Estimate]  # by phase, over the plain model in the same rounds
    speedup: float  # their geometric mean


@dataclasses.dataclass(frozen=True)
class Measured:
    """One configuration on all documents of a split."""

    name: str
    experts_per_token: float
    degradation: Estimate  # over all documents
    upper: float  # one-sided upper confidence limit of the degradation, at the level of the validation
    repeats: tuple[Repeat, ...]

    @property
    def speedups(self) -> np.ndarray:
        """float64 [repeats]."""
        return np.array([one.speedup for one in self.repeats])

    @property
    def speedup(self) -> float:
        """The geometric mean over the repeats."""
        return geometric_mean(self.speedups)

    def _agrees(self, limit: float) -> bool:
        """Whether repeats agree in speed and none shows a loss above the limit by its interval."""
        near = np.abs(self.speedups / self.speedup - 1) <= SPREAD
        return bool(near.all()) and all(one.degradation.low <= limit for one in self.repeats)


@dataclasses.dataclass(frozen=True)
class Validation:
    """The candidates in the order of testing, the chosen one, and the presets it was measured with."""

    certificate: Certificate
    candidates: tuple[Measured, ...]  # on the calibrate documents: what they were chosen by
    chosen: Measured | None  # on the test documents; None: no candidate is certified, no test document was read
    presets: tuple[Measured, ...]  # on the test documents
    limit: float  # on the relative increase in perplexity
    level: float  # confidence of every limit

    @property
    def passed(self) -> bool:
        """Whether there is a chosen configuration that meets every criterion."""
        return self.chosen is not None and all(one.passed for one in self.criteria)

    @property
    def criteria(self) -> tuple[Criterion, ...]:
        """The published criteria, each judged by a confidence limit; none without a chosen configuration."""
        chosen = self.chosen
        if chosen is None:
            return ()
        (bound,) = (one.overall for one in self.certificate.configurations if one.name == chosen.name)
        least = _lower_limit(chosen.speedups, self.level)
        rivals = [one for one in self.presets if one.degradation.value < self.limit]  # an estimate makes a rival
        margins = {one.name: _lower_limit(chosen.speedups / one.speedups, self.level) for one in rivals}
        closest = min(margins, key=lambda name: margins[name], default=None)
        at, most = f"at {self.level:.4g} confidence", f"{self.limit:.2%}"
        return (
            Criterion(
                "degradation, test documents",
                f"upper limit < {most}",
                f"{chosen.degradation.value:+.2%}, at most {chosen.upper:+.2%} {at}",
                chosen.upper < self.limit,
            ),
            Criterion(
                f"degradation, certified {at}", f"<= {most}", _percent(bound.perplexity_bound), bound.within_limit
            ),
            Criterion(
                "speed-up",
                f"lower limit > {TUNING_SPEEDUP}x",
                f"{chosen.speedup:.2f}x, at least {least:.2f}x {at}",
                least > TUNING_SPEEDUP,
            ),
            Criterion(
                f"consistent over {len(chosen.repeats)} repeats",
                f"within {SPREAD:.0%} of their mean, none above {most} by its interval",
                f"{chosen.speedups.min():.2f}x to {chosen.speedups.max():.2f}x",
                chosen._agrees(self.limit),
            ),
            Criterion(
                f"faster than every preset within {self.limit:+.2%}",
                "lower limit of the ratio > 1",
                "there is none" if closest is None else f"{closest}: at least {margins[closest]:.2f} times {at}",
                all(margin > 1 for margin in margins.values()),
            ),
        )


def validate(
    calibrate: Subject,
    test: Subject,
    candidates: Mapping[str, VARConfig],
    presets: Mapping[str, VARConfig],
    *,
    repeats: int = REPEATS,
    rounds: int = 11,
    level: float = 0.95,
    limit: float = MAX_DEGRADATION,
    drawn: Drawn | None = None,
) -> Validation:
    """Certify the candidates, choose the fastest certified one, and judge it on test documents, with the presets.

    Args:
        calibrate: model, statistics and answers over documents of the calibrate split.
        test: the same over documents of the test split; its `seed` divides them among the repeats.
        candidates: configurations by name, the most certain first.
        presets: configurations by name.
        repeats: sets of test documents, at least 2.
        rounds: timed rounds per repeat.
        level: confidence of the certificate and of every limit on the test documents.
        limit: on the relative increase in perplexity.
        drawn: how the calibrate documents were drawn from their split; None: not recorded.

    Returns:
        What was measured, and what was chosen.

    Raises:
        InputError: too few repeats, fewer test documents than repeats, or as
            `analysis.evaluate.certificate.certify`.
    """
    if not 2 <= repeats <= len(test.documents):
        raise InputError(f"{repeats} repeats of {len(test.documents)} test documents: expected at least 2, and no more")
    built, total = itertools.count(), len(candidates) + 1 + len(presets)
    bar = progress_bar(total=total, unit="configuration", desc="validation", show=test.progress)

    def measured(subject: Subject, plain: Point, name: str, config: VARConfig, parts: int) -> tuple[Measured, Point]:
        # Each configuration has a table of its own size, and programs must not pile up.
        if (number := next(built)) and number % PROGRAMS == 0:
            jax.clear_caches()
        table = subject.build(config, keep_shapes=False)
        scored, var_model = score_point(subject, config, table), VARModel(subject.model, config, table=table)
        change, everything = scored.nll - plain.nll, np.arange(len(subject.documents))
        order = everything if parts == 1 else np.random.default_rng(subject.seed).permutation(everything)
        found = []
        for seed, share in enumerate(np.array_split(order, parts), subject.seed):
            speedups = timed(subject, var_model, [subject.documents[one] for one in share], rounds, seed)
            cost = ratio_estimate(change[share], plain.tokens[share], 2000, seed, np.expm1)
            speedup = geometric_mean(one.value for one in speedups.values())
            found.append(Repeat(len(share), cost, speedups, speedup))
        _, upper = upper_limit(change, plain.tokens, level)
        overall = ratio_estimate(change, plain.tokens, 2000, subject.seed, np.expm1)
        bar.update()
        return Measured(name, scored.experts_per_token, overall, upper, tuple(found)), scored

    with bar:
        plain = score_point(calibrate)
        tried = {name: measured(calibrate, plain, name, config, 1) for name, config in candidates.items()}
        found = tuple(one for one, _ in tried.values())
        certified = certify(
            plain,
            {name: scored for name, (_, scored) in tried.items()},
            clip=CLIP,
            model_sha256=calibrate.model.fingerprint,
            config_sha256={name: config.digest(calibrate.table_sha256) for name, config in candidates.items()},
            level=level,
            limit=math.log1p(limit),
            seed=calibrate.seed,
            drawn=drawn,
            cached=[name for name, one in candidates.items() if one.cache_size > 0 and calibrate.caching.shared],
        )
        chosen = _choose(certified, found)
        if chosen is None:
            return Validation(certified, found, None, (), limit, level)
        plain, judged = score_point(test), {chosen: candidates[chosen], **presets}
        first, *others = (measured(test, plain, name, config, repeats)[0] for name, config in judged.items())
        return Validation(certified, found, first, tuple(others), limit, level)


def _choose(certified: Certificate, candidates: Sequence[Measured]) -> str | None:
    """The name of the fastest certified candidate on the calibrate documents; None if none is certified."""
    there = [one for one in candidates if one.name in certified.certified]
    return max(there, key=lambda one: one.speedup).name if there else None


def _lower_limit(ratios: np.ndarray, level: float) -> float:
    """The one-sided lower confidence limit of the geometric mean of independent ratios, float64 [N], at least 2."""
    logs = np.log(ratios)
    error = float(np.std(logs, ddof=1)) / math.sqrt(len(logs))
    return math.exp(float(logs.mean()) - float(distributions.t.ppf(level, len(logs) - 1)) * error)


def section(found: Validation) -> Section:
    """Report the chosen configuration against the criteria.

    Args:
        found: the result of `validate`.

    Returns:
        A section whose verdict is FAIL if none is certified or any criterion is missed.
    """
    title, chosen, name = "Does it hold on documents that the search never saw?", found.chosen, "validation"
    words = (
        *certificate.sentences(found.certificate),
        "The fastest certified candidate is chosen by timings on the calibrate documents. The verdict uses only the "
        "test documents, on which nothing was chosen; the other candidates are not judged.",
        f"A criterion is met only if a one-sided limit at {found.level:.4g} confidence meets it, over the repeats for "
        "speed-ups and over the documents for losses. A FAIL may mean that measurements vary too much; more repeats "
        "narrow the limit.",
        "A speed-up is the geometric mean of its phases (prefill of a batch, decode of one sequence), paired with the "
        "plain model. Presets are neither searched nor certified; they show what thresholds alone give.",
    )
    if chosen is None:
        closest = min(found.certificate.configurations, key=lambda one: one.p)
        outcome = (
            f"no configuration is certified to cost at most {found.limit:+.2%}; the nearest is {closest.name}, at most "
            f"{_percent(closest.overall.perplexity_bound)}"
        )
        unread = "Since none is certified, no test document was read: they can still judge another configuration."
        return Section(name, title, "FAIL", outcome, (unread, *words), (_candidates(found),))
    rows = tuple((one.name, one.bound, one.measured, one.verdict) for one in found.criteria)
    columns = (Column("criterion"), Column("bound"), Column("value"), Column("verdict"))
    criteria = Table(f"The criteria, for {chosen.name}, on the test documents", columns, rows)
    outcome = (
        f"{chosen.name}: {chosen.speedup:.2f}x, perplexity {chosen.degradation.value:+.2%} "
        f"[{chosen.degradation.low:+.2%}, {chosen.degradation.high:+.2%}], {chosen.experts_per_token:.2f} experts per "
        f"token; {sum(bool(one.passed) for one in found.criteria)} of {len(rows)} criteria hold"
    )
    tables = (criteria, _candidates(found), *_judged((chosen, *found.presets), found.limit))
    verdict = "PASS" if found.passed else "FAIL"
    return Section(name, title, verdict, outcome, words, tables, headline=f"{chosen.speedup:.2f}x")


def _candidates(found: Validation) -> Table:
    phases = list(found.candidates[0].repeats[0].speedups)
    bounds = {one.name: one.overall.perplexity_bound for one in found.certificate.configurations}
    columns = (
        *(Column("configuration"), Column("speed-up", ".2f"), *(Column(phase, ".2f") for phase in phases)),
        *(Column("experts", ".2f"), Column("certified at most", "+.2%"), Column("certified"), Column("judged")),
    )
    rows = tuple(
        (
            *(one.name, one.speedup, *(one.repeats[0].speedups[phase].value for phase in phases)),
            *(one.experts_per_token, bounds[one.name], one.name in found.certificate.certified),
            found.chosen is not None and one.name == found.chosen.name,
        )
        for one in found.candidates
    )
    return Table("What chose: the candidates on the calibrate documents, in the order of testing", columns, rows)


def _judged(judged: Sequence[Measured], limit: float) -> tuple[Table, Table]:
    """The totals and every repeat."""
    phases = list(judged[0].repeats[0].speedups)
    loss = tuple(Column(name, "+.2%") for name in ("perplexity", "low", "high"))
    times = tuple(Column(f"{phase}{end}", ".2f") for phase in phases for end in ("", " low", " high"))
    totals, repeats = [], []
    for one in judged:
        quality = dataclasses.astuple(one.degradation)
        totals.append((one.name, one.speedup, one.experts_per_token, *quality, one._agrees(limit)))
        for number, repeat in enumerate(one.repeats, 1):
            speedups = [value for phase in phases for value in dataclasses.astuple(repeat.speedups[phase])]
            repeats.append((one.name, number, repeat.documents, *dataclasses.astuple(repeat.degradation), *speedups))
    columns = (Column("configuration"), Column("speed-up", ".2f"), Column("experts", ".2f"), *loss)
    title = "What was judged: the chosen configuration and the presets on the test documents"
    return (
        Table(title, (*columns, Column("consistent")), tuple(totals)),
        Table(
            "Every repeat: other documents, another order of timing",
            (Column("configuration"), Column("repeat"), Column("documents", ",d"), *loss, *times),
            tuple(repeats),
        ),
    )


def _percent(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:+.2%}"

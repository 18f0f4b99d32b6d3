"""What the configurations that a search chose are worth on documents that it never saw.

Two sets of documents, none of which the search or its tables have seen, answer two questions:

- The calibrate split certifies (`analysis.evaluation.certificate`). The candidates are tested one after the other,
  those that were surest on the tuning documents first, so the error of all certificates together is controlled: with
  the stated confidence no candidate that is certified costs more than the limit.
- The test split measures. It is cut into several sets of different documents, and each repeat scores and times every
  candidate on its own set with its own seed. A result that holds on one set and not on the next is no result.

The presets run beside the candidates: what was found by a search has to beat what comes for nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import jax
import numpy as np

from analysis.evaluation import certificate
from analysis.evaluation.certificate import LIMIT, Certificate, Drawn, certify
from analysis.evaluation.comparison import Estimate, ratio_interval
from analysis.policies.scored_points import Losses, Subject, losses
from profiling.throughput import measure
from profiling.timing import Ratio, geometric_mean
from varjax.config import VARConfig
from varjax.errors import InputError
from varjax.model import VARModel, build_for
from varjax.progress import progress_bar

MIN_SPEEDUP = 1.3  # published criterion
PROGRAMS = 4  # configurations whose compiled programs are held at once
SPREAD = 0.1  # relative distance of a repeat's speed-up from their mean, up to which repeats agree


@dataclasses.dataclass(frozen=True)
class Repeat:
    """One configuration on one set of test documents."""

    documents: int
    degradation: Estimate  # relative change of perplexity per token
    speedups: Mapping[str, Ratio]  # by phase
    speedup: float  # their geometric mean


@dataclasses.dataclass(frozen=True)
class Validated:
    """One configuration on all of them."""

    name: str
    searched: bool  # False: a preset, which is not certified
    experts_per_token: float
    degradation: Estimate  # over all test documents
    repeats: tuple[Repeat, ...]

    @property
    def speedup(self) -> float:
        """The geometric mean over the repeats."""
        return geometric_mean(one.speedup for one in self.repeats)

    def consistent(self, limit: float) -> bool:
        """Whether every repeat is on the same side of both criteria, and no speed-up is far from their mean.

        Args:
            limit: on the relative change of perplexity.
        """
        cheap = {one.degradation.value < limit for one in self.repeats}
        fast = {one.speedup > MIN_SPEEDUP for one in self.repeats}
        near = all(abs(one.speedup / self.speedup - 1) <= SPREAD for one in self.repeats)
        return len(cheap) == len(fast) == 1 and near


@dataclasses.dataclass(frozen=True)
class Validation:
    """The candidates in the order in which they were tested, then the presets."""

    certificate: Certificate
    configurations: tuple[Validated, ...]
    limit: float  # relative change of perplexity

    @property
    def chosen(self) -> Validated | None:
        """The fastest of those that are certified; None if none is."""
        certified = [one for one in self.configurations if one.name in self.certificate.certified]
        return max(certified, key=lambda one: one.speedup, default=None)

    @property
    def best_preset(self) -> Validated | None:
        """The fastest preset whose degradation on the test documents is within the limit; None if there is none."""
        cheap = [one for one in self.configurations if not one.searched and one.degradation.value < self.limit]
        return max(cheap, key=lambda one: one.speedup, default=None)


def validate(
    calibrate: Subject,
    test: Subject,
    candidates: Mapping[str, VARConfig],
    presets: Mapping[str, VARConfig],
    *,
    repeats: int = 3,
    rounds: int = 11,
    level: float = 0.95,
    limit: float = math.expm1(LIMIT),
    drawn: Drawn = "unknown",
) -> Validation:
    """Certify the candidates, and measure them and the presets.

    Args:
        calibrate: model, statistics and answers over documents of the calibrate split.
        test: the same over documents of the test split; its `seed` deals them out to the repeats.
        candidates: by name, the surest first.
        presets: by name.
        repeats: sets of test documents, at least 2.
        rounds: of timing, per repeat.
        level: of the certificate.
        limit: relative change of perplexity.
        drawn: how the calibrate documents came out of their split.

    Raises:
        InputError: too few repeats, or fewer test documents than repeats; as `analysis.evaluation.certificate.certify`.
    """
    if not 2 <= repeats <= len(test.documents):
        raise InputError(f"{repeats} repeats of {len(test.documents)} test documents: expected at least 2, and no more")
    every = {**candidates, **presets}
    shares = np.array_split(np.random.default_rng(test.seed).permutation(len(test.documents)), repeats)
    plain, increases, found = losses(test), {}, []
    for name, config in progress_bar(every.items(), unit="configuration", desc="validation", show=test.progress):
        table = build_for(test.model, test.stats, config, test.answers)
        var_model = VARModel(test.model, config, table=table)
        if name in candidates:
            increases[name] = losses(calibrate, config, table)
        scored = losses(test, config, table)
        change = scored.nll - plain.nll
        measured = []
        for index, share in enumerate(shares):
            timed = measure(
                var_model,
                [test.documents[one] for one in share],
                batch_size=test.batch_size,
                max_length=test.max_length,
                repeats=rounds,
                seed=test.seed + index,
            )
            speedups = {phase: Ratio(**ratio) for phase, ratio in timed["speedup"].items()}
            mean = geometric_mean(one.value for one in speedups.values())
            estimate = _degradation(change[share], plain.tokens[share], test.seed + index)
            measured.append(Repeat(len(share), estimate, speedups, mean))
        overall = _degradation(change, plain.tokens, test.seed)
        found.append(Validated(name, name in candidates, scored.experts_per_token, overall, tuple(measured)))
        # No other configuration has a table of this size, and programs are not to pile up; the plain model's serve all.
        if len(found) % PROGRAMS == 0:
            jax.clear_caches()
    certified = certify(
        _of(calibrate, losses(calibrate)),
        {name: _of(calibrate, one) for name, one in increases.items()},
        clip=certificate.CLIP,
        model_sha256=calibrate.model.fingerprint,
        config_sha256={name: config.digest() for name, config in candidates.items()},
        level=level,
        limit=math.log1p(limit),
        seed=calibrate.seed,
        drawn=drawn,
        cached=[name for name, config in candidates.items() if config.cache_size > 0],
    )
    return Validation(certified, tuple(found), limit)


def _of(subject: Subject, found: Losses) -> certificate.Losses:
    """The losses as a certificate takes them."""
    documents = subject.documents
    return certificate.Losses([one.id for one in documents], [one.group for one in documents], found.nll, found.tokens)


def _degradation(change: np.ndarray, tokens: np.ndarray, seed: int) -> Estimate:
    return ratio_interval(change, tokens, 2000, seed, math.expm1)

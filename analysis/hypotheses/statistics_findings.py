"""Every test on routing statistics in one call, with intervals over documents where the documents are known."""

from __future__ import annotations

from dataclasses import dataclass

from analysis.hypotheses import criteria
from analysis.hypotheses import document_intervals as intervals
from analysis.hypotheses.consistency import Consistency, consistency
from analysis.hypotheses.document_draws import SAMPLES, draw_documents
from analysis.traces.trace import Trace
from varjax.stats import RoutingStats


@dataclass(frozen=True)
class Drawn:
    """What the intervals were made of, where documents were drawn."""

    documents: int
    samples: int


@dataclass(frozen=True)
class StatisticsFindings:
    """What statistics say, and whose draws the intervals are."""

    zipf: criteria.Zipf
    correlation: criteria.Correlation
    distribution: criteria.EntropyDistribution
    consistency: Consistency
    coverage: criteria.Coverage
    covered: float  # share of all occurrences at token ids that are keys; NaN: there are none
    drawn: Drawn | None  # None: the intervals treat token ids as independent


def examine_statistics(
    stats: RoutingStats,
    trace: Trace | None = None,
    *,
    first_choices_known: bool = True,
    samples: int = SAMPLES,
    seed: int = 0,
    progress: bool = False,
) -> StatisticsFindings:
    """All tests on the token ids of statistics; points and verdicts do not depend on the kind of intervals.

    Args:
        trace: what the statistics were computed from; None: documents are not known.
        first_choices_known: as in `consistency`.
        samples: draws of documents, at most SAMPLES are made.
        progress: show a bar on standard error.
    """
    found = StatisticsFindings(
        zipf=criteria.zipf(stats),
        correlation=criteria.frequency_entropy(stats),
        distribution=criteria.entropy_distribution(stats),
        consistency=consistency(stats, first_choices_known, seed=seed),
        coverage=criteria.coverage(stats),
        covered=criteria.covered_by_ids(stats),
        drawn=None,
    )
    if trace is None:
        return found
    draws = draw_documents(trace, min(samples, SAMPLES), seed, progress)
    return StatisticsFindings(
        zipf=intervals.zipf_over_documents(found.zipf, draws),
        correlation=intervals.correlation_over_documents(found.correlation, draws),
        distribution=intervals.entropy_over_documents(found.distribution, draws),
        consistency=intervals.consistency_over_documents(found.consistency, draws),
        coverage=intervals.coverage_over_documents(found.coverage, draws),
        covered=found.covered,
        drawn=Drawn(draws.documents, draws.samples),
    )

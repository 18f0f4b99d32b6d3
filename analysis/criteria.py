"""The published bars that varjax is judged by, and a criterion that a result met or missed.

Every bar has one name and is used from here, in verdicts, figures and documents alike.
"""

from dataclasses import dataclass

# Phase 1: hypotheses on routing statistics
MAX_RHO = -0.4  # Spearman's rho of frequency and gate entropy is below this
LOW_ENTROPY = 0.5  # nats, mean gate entropy below which routing counts as certain
MIN_LOW_SHARE = 0.3  # more than this share of the token ids has an entropy below LOW_ENTROPY
MIN_COVERED = 0.4  # the fast path covers more than this share of the occurrences

# Phases 2 and 3: a VAR configuration against the plain model
MAX_DEGRADATION = 0.01  # relative increase in perplexity stays below this
EVALUATION_SPEEDUP = 1.2  # phase 2: speed-up in prefill and in decode is at least this
TUNING_SPEEDUP = 1.3  # phase 3: speed-up of the validated configuration is above this
MAX_LEARNED = 0.15  # share of tokens and layers that the learned router still decides stays below this

# Phase 5: the performance model
MAX_PREDICTION_ERROR = 0.1  # median relative error of predicted times stays below this


@dataclass(frozen=True)
class Criterion:
    """One criterion and whether a result meets it."""

    name: str
    bound: str  # in words, such as "< 1%"
    measured: str  # what was measured, in words; a dash where nothing was
    passed: bool | None  # None: not measured
    value: float | None = None  # the measured number, where there is one

    @property
    def verdict(self) -> str:
        """PASS, FAIL or "not measured", as reports say it."""
        return {True: "PASS", False: "FAIL", None: "not measured"}[self.passed]

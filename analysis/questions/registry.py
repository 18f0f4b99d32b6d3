"""All questions, in the order of the reports. To add one, write its file and add its `QUESTION` here."""

from analysis.evaluate.points import Subject
from analysis.questions import (
    alternatives,
    choice_entropy,
    co_activation,
    consistency,
    coverage,
    entropy_distribution,
    error_sources,
    expert_load,
    frequency_entropy,
    generation_drift,
    paired_runs,
    predictability,
    repetition,
    table_size,
    zipf,
)
from analysis.questions.data import RoutingData
from analysis.questions.question import Question

ROUTING_QUESTIONS: tuple[Question[RoutingData], ...] = (
    zipf.QUESTION,
    frequency_entropy.QUESTION,
    entropy_distribution.QUESTION,
    consistency.QUESTION,
    coverage.QUESTION,
    paired_runs.QUESTION,
    predictability.QUESTION,
    choice_entropy.QUESTION,
    repetition.QUESTION,
    expert_load.QUESTION,
    co_activation.QUESTION,
)

STUDY_QUESTIONS: tuple[Question[Subject], ...] = (
    alternatives.QUESTION,
    table_size.QUESTION,
    error_sources.QUESTION,
    generation_drift.QUESTION,
)

"""All questions, in the order of the reports. To add one, write its file and add its `QUESTION` here."""

from analysis.questions import (
    choice_entropy,
    co_activation,
    consistency,
    coverage,
    entropy_distribution,
    expert_load,
    frequency_entropy,
    paired_runs,
    predictability,
    repetition,
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

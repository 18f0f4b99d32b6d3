"""Everything that phase 1 asks of a routing trace, in one call; what a trace cannot answer is said, not raised."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from analysis.estimators.choice_entropy import ChoiceEntropy, conditional_entropy
from analysis.estimators.co_activation import CoActivation, co_activation
from analysis.estimators.expert_load import Load, load
from analysis.estimators.predictability import Predictability, predictability
from analysis.estimators.repetition import Repetition, repetition
from analysis.estimators.resampling import check_permutations
from analysis.traces.trace import Trace
from varjax.errors import InputError, NotTestableError

Found = TypeVar("Found")


@dataclass(frozen=True)
class Settings:
    """How the estimates are made.

    Raises:
        InputError: a number that nothing can be estimated with.
    """

    orders: tuple[int, ...] = (1, 2, 3)  # context lengths in tokens, the current one included
    min_count: int = 10  # occurrences that a key needs
    permutations: int = 39  # of the nulls; 0 for none
    samples: int = 1000  # bootstrap draws over documents
    seed: int = 0

    def __post_init__(self) -> None:
        check_permutations(self.permutations)
        for name in ("min_count", "samples"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; give at least 1")
        if not self.orders or min(self.orders) < 1:
            raise InputError(f"orders are {list(self.orders)}; give one or more context lengths of at least 1")


@dataclass(frozen=True)
class TraceFindings:
    """What a trace says; a text in place of a finding is why it cannot be had."""

    tokens: int
    documents: int
    predictability: Predictability | str
    choice_entropy: ChoiceEntropy | str
    repetition: Repetition | str
    load: Load | str
    co_activation: CoActivation | str


def examine_trace(trace: Trace, settings: Settings, progress: bool = False) -> TraceFindings:
    """Held-out predictability, entropy of the choice, repetition, load and co-activation.

    Args:
        progress: show bars on standard error.
    """
    drawn: dict[str, Any] = {"samples": settings.samples, "seed": settings.seed}
    permuted = drawn | {"permutations": settings.permutations, "progress": progress}
    by_key = permuted | {"min_count": settings.min_count}
    return TraceFindings(
        tokens=len(trace.token_id),
        documents=len(np.unique(trace.document)),
        predictability=_or_why(lambda: predictability(trace, settings.orders, **by_key)),
        choice_entropy=_or_why(lambda: conditional_entropy(trace, settings.orders, **by_key)),
        repetition=_or_why(lambda: repetition(trace, **permuted)),
        load=_or_why(lambda: load(trace, **drawn)),
        co_activation=_or_why(lambda: co_activation(trace, **drawn)),
    )


def _or_why(find: Callable[[], Found]) -> Found | str:
    try:
        return find()
    except NotTestableError as error:  # too few documents or keys, experts that are not ranked
        return str(error)

"""Everything that phase 1 asks of a routing trace, in one call; what a trace cannot answer is said, not raised."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import numpy as np

from analysis.estimators.choice_entropy import ChoiceEntropy, conditional_entropy
from analysis.estimators.co_activation import CoActivation, co_activation
from analysis.estimators.expert_load import Load, load
from analysis.estimators.predictability import Predictability, predictability
from analysis.estimators.repetition import Repetition, repetition
from analysis.resampling import Measure, check_permutations
from analysis.traces.capture import on_all_layers
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

    The figures of layers that were not captured are NaN; they are left out of means, nulls and bands.

    Args:
        progress: show bars on standard error.
    """
    captured, whole = trace.captured, trace
    trace = trace.captured_part()
    drawn: dict[str, Any] = {"samples": settings.samples, "seed": settings.seed}
    permuted = drawn | {"permutations": settings.permutations, "progress": progress}
    by_key = permuted | {"min_count": settings.min_count}
    found = TraceFindings(
        tokens=len(whole.token_id),
        documents=len(np.unique(whole.document)),
        predictability=_or_why(lambda: predictability(trace, settings.orders, **by_key)),
        choice_entropy=_or_why(lambda: conditional_entropy(trace, settings.orders, **by_key)),
        repetition=_or_why(lambda: repetition(trace, **permuted)),
        load=_or_why(lambda: load(trace, **drawn)),
        co_activation=_or_why(lambda: co_activation(trace, **drawn)),
    )
    return found if captured.all() else _on_all_layers(found, captured)


def _or_why(find: Callable[[], Found]) -> Found | str:
    try:
        return find()
    except NotTestableError as error:  # too few documents or keys, experts that are not ranked
        return str(error)


def _on_all_layers(found: Any, captured: np.ndarray) -> Any:
    """Findings on the captured layers, bool [L], as findings on all L: the others have NaN, and -1 among integers.

    Arrays of findings have the layers first, those of a `Measure` second. Coverages are the same in every layer.
    """
    if isinstance(found, Measure):
        arrays = {name: one for name, one in vars(found).items() if isinstance(one, np.ndarray)}
        changed: dict[str, Any]
        if found.name.endswith("coverage"):
            changed = {name: np.repeat(one[:, :1], len(captured), axis=1) for name, one in arrays.items()}
        else:
            changed = {name: _spread(one.T, captured).T for name, one in arrays.items()}
        return replace(found, **changed)
    if isinstance(found, np.ndarray):
        return _spread(found, captured)
    if isinstance(found, Mapping):
        return {name: _on_all_layers(one, captured) for name, one in found.items()}
    if is_dataclass(found) and not isinstance(found, type):
        return replace(found, **{one.name: _on_all_layers(getattr(found, one.name), captured) for one in fields(found)})
    return found


def _spread(values: np.ndarray, captured: np.ndarray) -> np.ndarray:
    """[L, ...]: values of the captured layers at their places, and what is unknown at the others."""
    return on_all_layers(values, captured, -1 if np.issubdtype(values.dtype, np.integer) else np.nan)

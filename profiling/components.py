"""Where the time of a call goes, component by component, measured in two ways that share nothing but the clock.

    found = measure_components(var_model, ids, "decode", folder="traces")
    found.by_trace["experts"], found.by_ablation["experts"], found.disagreements()

A profiler trace says what ran when (`profiling.traces`); leaving a component out says what its absence saves
(`profiling.ablation`). Where both agree, the number may be believed. The call itself is timed without a trace, in turns
with those that are traced.

A trace slows the call down: recording an operation takes a third of a microsecond or more, and a step of decoding has
hundreds. What recording costs is measured apart, on the plain model's decoding (`plain_recording`), and taken off where
it falls: of the time between operations, in a loop of that of the loop. So the sum over components can be held against
the untraced call, and `recording` says how much was taken off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from profiling.ablation import WHOLE, by_ablation
from profiling.calls import Calls, jitted, prepare, sides
from profiling.compiling import at_once
from profiling.programs import describe
from profiling.scopes import OTHER
from profiling.traces import (
    ComponentTimes,
    component_times,
    cost_of_recording,
    in_turns,
    quartile,
    undisturbed,
    wall_times,
)
from varjax.model import VARModel

AGREE = 1.5  # factor within which two measurements of a component agree
TURN = 0.04  # seconds of calls between those that are traced and those that are not
TURNS = 9
SMALL = 0.03  # share of the call under which a difference is no disagreement


@dataclass(frozen=True)
class Breakdown:
    """Seconds per call: at each call of a turn the lower quartile over turns, and their mean over the turn."""

    side: str  # "plain" or "VAR"
    phase: str  # "prefill" or "decode"
    batch: int  # B
    length: int  # T of a call
    total: float  # untraced
    traced: float  # of the call while it is traced
    recording: float  # what the trace is held to have added
    by_trace: dict[str, float]  # of COMPONENTS and OTHER, less `recording`
    idle: float  # in OTHER, less its part of `recording`: no operation ran
    whole: float | None  # of the program that components were left out of; None: nothing was
    by_ablation: dict[str, float]  # of the COMPONENTS that the program has; may come out below zero

    @property
    def explained(self) -> float:
        """Sum of the components by trace, OTHER included, over the untraced call."""
        return sum(self.by_trace.values()) / self.total

    @property
    def attributed(self) -> float:
        """The same without OTHER: what has a name."""
        return self.explained - self.by_trace[OTHER] / self.total

    @property
    def saved(self) -> float | None:
        """Sum of the components by ablation, over the whole."""
        return sum(self.by_ablation.values()) / self.whole if self.whole else None

    def disagreements(self, factor: float = AGREE, small: float = SMALL) -> list[str]:
        """Components whose two measurements are a factor apart, and more than a small share of the call."""
        return [
            name
            for name, ablated in self.by_ablation.items()
            for less, more in [sorted((self.by_trace[name], ablated))]
            if more - less > small * self.total and more > factor * less
        ]


def measure_components(
    var_model: VARModel,
    ids: np.ndarray,
    phase: str,
    *,
    folder: str | Path,
    name: str | None = None,
    turns: int = TURNS,
    max_calls: int = 16,
    ablate: bool = True,
    recording: float | None = None,
    seed: int = 0,
) -> Breakdown:
    """The components of a call of `var_model`, VAR on or off.

    Args:
        ids: int32 [B, T], texts, all positions real; see `profiling.calls` for what is made of them.
        phase: "prefill" or "decode".
        folder: TensorBoard's log directory, which the trace is added to.
        name: of the trace in it; None: side, phase and batch.
        turns: without a trace and with one. Each takes as many rounds as fill `TURN`; a round is a prefill, or up to
            `max_calls` steps.
        ablate: compile and time the program without each component as well, which takes two programs for each.
        recording: seconds per operation, from `plain_recording`; None: it is measured.

    Raises:
        InputError: an unknown phase, or texts too short.
    """
    calls = prepare(var_model, ids, phase, max_calls)
    side = "plain" if var_model.table is None else "VAR"
    step = jitted(calls.step)
    module = describe(calls.traced())
    each_turn = turn(calls, step)
    cost = plain_recording(var_model, ids, phase, max_calls, turns) if recording is None else recording
    name = name or f"{phase}-{side}-batch-{calls.batch}"
    untraced, traced = in_turns(each_turn, folder, name, turns, lambda path: component_times(path, [module]))
    ablated = by_ablation(calls, turns, seed) if ablate else {}
    medians = {part: float(np.median(seconds)) for part, seconds in ablated.items()}
    return Breakdown(
        side=side,
        phase=phase,
        batch=calls.batch,
        length=calls.length,
        total=float(undisturbed(untraced).mean()),
        whole=medians.pop(WHOLE, None),
        by_ablation=medians,
        **_undisturbed(traced, cost),
    )


def measure_sides(
    var_model: VARModel, texts: Mapping[str, np.ndarray], *, folder: str | Path, **options: Any
) -> list[Breakdown]:
    """The plain model and, unless VAR is switched off, `var_model`, phase by phase.

    Args:
        texts: phase -> int32 [B, T].
        options: those of `measure_components`.
    """
    kinds = [(side, ids, phase) for phase, ids in texts.items() for side in sides(var_model).values()]
    at_once(partial(_compile, *kind) for kind in kinds)
    phase = "decode" if "decode" in texts else next(iter(texts))
    if "recording" not in options:
        options["recording"] = plain_recording(var_model, texts[phase], phase, turns=options.get("turns", TURNS))
    return [measure_components(*kind, folder=folder, **options) for kind in kinds]


def plain_recording(var_model: VARModel, ids: np.ndarray, phase: str, max_calls: int = 16, turns: int = TURNS) -> float:
    """`cost_of_recording` by the plain model's calls: what it says of other programs is tested by their sums."""
    calls = prepare(var_model.disabled(), ids, phase, max_calls)
    return cost_of_recording(turn(calls, jitted(calls.step)), turns)


def turn(calls: Calls, step: Any) -> Callable[[], Iterator[Callable[[], Any]]]:
    """The calls of a turn: as many rounds of a jitted `step` as fill `TURN`, one at least. Compiles it."""
    wall_times(calls.each(step))
    seconds = wall_times(calls.each(step)).sum()
    return partial(calls.each, step, max(round(TURN / seconds), 1))


def _compile(var_model: VARModel, ids: np.ndarray, phase: str) -> None:
    """The step of these calls, so that who measures them finds it compiled."""
    prepare(var_model, ids, phase, max_calls=1).traced().lower().compile()


def _undisturbed(traced: list[ComponentTimes], cost: float) -> dict[str, Any]:
    """What the traces of the turns say of a call: at each call, that of the turn whose wall time is `undisturbed`."""
    walls = np.stack([times.wall for times in traced])
    chosen = np.argsort(walls, axis=0)[quartile(len(walls))]

    def mean(values: list[np.ndarray]) -> float:
        return float(np.take_along_axis(np.stack(values), chosen[None], axis=0).mean())

    off = {part: cost * events for part, events in traced[-1].recorded.items()}  # alike in all
    return {
        "traced": mean([times.wall for times in traced]),
        "recording": sum(off.values()),
        "by_trace": {part: mean([times.seconds[part] for times in traced]) - off[part] for part in off},
        "idle": mean([times.idle for times in traced]) - off[OTHER],
    }

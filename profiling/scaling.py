"""How time grows with the tokens of a call, against what the performance model expects of the same calls.

A call's time is not a power of its tokens: overheads weigh on small calls, attention grows with the square of the
length. So the expected exponent is not 1 but that of the model's times, fitted in the same way over the same calls.
They are calls that the model had not seen: on those that it was fitted to it would agree with itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import linregress

from analysis.report.figures import MARKERS, panels
from analysis.report.report import Column, ReportFigure, Section, Table
from profiling.performance_model import PointError, Study

NAME = "scaling"
FEWEST = 3  # kinds of calls that a line is fitted to
OFF = 0.15  # by how much the exponent may differ from what is expected
NOTE = ReportFigure(
    NAME,
    "Time of a call by its tokens",
    "Markers: measured, one kind of call each. Lines: what the performance model says of the same calls. Cost per "
    "token falls where a line is flatter than the dotted one, which is proportional.",
    "Calls of one length in several batches and of several lengths stand side by side; attention makes long ones "
    "dearer.",
)


@dataclass(frozen=True)
class Scaling:
    """One phase, plain or under one policy."""

    phase: str
    policy: str
    tokens: tuple[int, ...]  # of a call
    measured: tuple[float, ...]  # s
    predicted: tuple[float, ...]  # s
    exponent: float
    error: float  # standard error of the exponent
    expected: float

    @property
    def consistent(self) -> bool:
        """Whether time grows no faster than expected, give or take OFF."""
        return self.exponent - self.expected < OFF


def scalings(study: Study) -> list[Scaling]:
    """Of every phase and policy with unseen calls of enough sizes, plain first; those that VAR plans come last."""
    every = study.unseen.each
    found = []
    for phase, policy in dict.fromkeys((_phase(one), _policy(one)) for one in every):
        here = sorted((one for one in every if (_phase(one), _policy(one)) == (phase, policy)), key=_tokens)
        if len({_tokens(one) for one in here}) >= FEWEST:
            found.append(_fitted(phase, policy, here))
    return sorted(found, key=lambda one: (one.phase, one.policy != "plain"))


def section(found: Sequence[Scaling]) -> Section:
    """The criterion: time grows no faster than the performance model expects."""
    if not found:
        return Section(NAME, _TITLE, "not measured", f"no kind of call was timed at {FEWEST} sizes")
    off = max(found, key=lambda one: one.exponent - one.expected)
    rows = tuple(
        (
            *(f"{one.phase}, {one.policy}", len(one.tokens), min(one.tokens), max(one.tokens)),
            *(one.exponent, one.error, one.expected),
            *(1e6 * one.measured[end] / one.tokens[end] for end in (0, -1)),
        )
        for one in found
    )
    columns = (
        *(Column("calls"), Column("kinds"), Column("fewest tokens", ",d"), Column("most", ",d")),
        *(Column("exponent", ".2f"), Column("standard error", ".2f"), Column("expected", ".2f")),
        *(Column("µs a token, smallest", ",.1f"), Column("largest", ",.1f")),
    )
    return Section(
        NAME,
        _TITLE,
        "PASS" if all(one.consistent for one in found) else "FAIL",
        f"exponent of time over tokens at most {OFF} above the expected one: farthest off is {off.phase}, "
        f"{off.policy}, {off.exponent:.2f} against {off.expected:.2f}",
        ("Expected is the exponent of the performance model's times of the same calls, none of which calibrated it.",),
        (Table("Exponents", columns, rows),),
        (NOTE,),
    )


def figure(found: Sequence[Scaling]) -> Figure:
    phases = list(dict.fromkeys(one.phase for one in found)) or ["prefill"]
    drawn, axes = panels(len(phases))
    for axis, phase in zip(axes, phases, strict=True):
        for index, one in enumerate(one for one in found if one.phase == phase):
            gray = str(0.6 * index / max(len(found) - 1, 1))
            axis.plot(one.tokens, np.multiply(1e3, one.measured), MARKERS[index], color=gray, label=one.policy)
            axis.plot(one.tokens, np.multiply(1e3, one.predicted), color=gray, linewidth=0.8)
            if index == 0:
                proportional = one.measured[0] / one.tokens[0] * np.array(one.tokens)
                axis.plot(one.tokens, 1e3 * proportional, ":", color="0.5")
        axis.set(xscale="log", yscale="log", xlabel="tokens of a call", title=phase)
        if found:
            axis.legend(fontsize="small")
    axes[0].set_ylabel("time of a call [ms]")
    drawn.tight_layout()
    return drawn


_TITLE = "How does time grow with the tokens?"


def _fitted(phase: str, policy: str, here: Sequence[PointError]) -> Scaling:
    tokens = [_tokens(one) for one in here]
    measured, predicted = [one.point.seconds for one in here], [one.predicted for one in here]
    line = linregress(np.log(tokens), np.log(measured))
    expected = linregress(np.log(tokens), np.log(predicted)).slope
    return Scaling(
        phase,
        policy,
        tuple(tokens),
        tuple(measured),
        tuple(predicted),
        float(line.slope),
        float(line.stderr),
        float(expected),
    )


def _tokens(one: PointError) -> int:
    return one.point.workload.tokens


def _phase(one: PointError) -> str:
    return one.point.name.split()[0]


def _policy(one: PointError) -> str:
    return one.point.name.partition(", ")[2]

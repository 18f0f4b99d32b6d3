"""What a study of the audit says: what was noticed, how soon, and what was not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from analysis.report.figures import subplots
from analysis.report.report import Column, Report, ReportFigure, Section, Table
from analysis.resampling import allowed
from varjax.drift import ALPHA, Calibration

if TYPE_CHECKING:
    from analysis.audit_study import Outcome

NAME = "audit_noticed"
ANEW = "same domain, calibrated anew"  # the situation that the promise is about: calibration and run, both by chance
NOTE = ReportFigure(
    NAME,
    "What the audit noticed, and how soon",
    "One row per situation. Bar: share of the orders of the documents in which drift was declared. Numbers: how many "
    "documents that took, the median and the most. Dotted line: the promised rate of false alarms.",
    "Drift is not harm: foreign text is noticed even where VAR loses less on it, and a small fault may cost much or "
    "nothing. Orders share their documents, so they are not independent.",
)


def report(
    outcomes: Sequence[Outcome],
    calibration: Calibration,
    runs: Mapping[str, float],
    facts: Sequence[tuple[str, str]] = (),
) -> Report:
    """The outcomes for people.

    Args:
        runs: expert runs per token and layer, of VAR and of the audit beside it.
        facts: about model and data.
    """
    quiet = next(row for row in outcomes if row.name == ANEW)
    most = allowed(quiet.repeats, ALPHA)
    section = Section(
        "audit",
        "Does the audit notice what is wrong, and nothing else?",
        "PASS" if quiet.noticed <= most * quiet.repeats else "FAIL",
        f"where nothing is wrong, {quiet.noticed} false alarms in {quiet.repeats} calibrations, each drawn anew; "
        f"{ALPHA:.0%} are promised at most, {most:.1%} are within chance",
        (
            "Harm: nats per token lost against the plain model. Error: relative, of a layer's output where audited. "
            "Agreement: share of planned tokens whose first expert the router would choose. Open: share that the table "
            "does not know. The last three are means over documents, all layers together.",
            f"{calibration.texts} calibration documents; {calibration.share:.0%} of the planned tokens audited, "
            f"{runs['audit']:.2f} expert runs per token and layer beside VAR's {runs['var']:.2f}.",
        ),
        (Table("Situations", _COLUMNS, (_calibrated(calibration), *map(_row, outcomes))),),
        (NOTE,),
    )
    known = (("calibration", f"{calibration.texts:,} documents"), *facts)
    return Report("Study of the audit", known, (), (section,))


def figure(outcomes: Sequence[Outcome]) -> Figure:
    """Share of the orders in which each situation was noticed, and after how many documents."""
    drawn, axis = subplots(figsize=(6.4, 1.4 + 0.3 * len(outcomes)))
    shares = [row.noticed / row.repeats for row in outcomes]
    axis.barh(range(len(outcomes)), shares, color="0.7", edgecolor="0", linewidth=0.5)
    for place, row in enumerate(outcomes):
        if row.median is not None:
            axis.text(0.02, place, f"{row.median:.0f}, at most {row.longest}", va="center", fontsize=8)
    axis.axvline(ALPHA, color="0", linewidth=0.8, linestyle=":")
    axis.set_yticks(range(len(outcomes)), [row.name for row in outcomes])
    axis.invert_yaxis()
    axis.set(xlabel="share of the orders in which drift was declared", xlim=(0, 1))
    return drawn


_COLUMNS = (
    *(Column("situation"), Column("harm", "+.4f")),
    *(Column(name, ".3f") for name in ("error", "agreement", "open")),
    *(Column("noticed"), Column("documents until", ".0f"), Column("at most", ".0f"), Column("first signal")),
)


def _calibrated(calibration: Calibration) -> tuple[str | float | None, ...]:
    return ("calibration", None, *(value.mean for value in calibration.values[:3]), None, None, None, "")


def _row(row: Outcome) -> tuple[str | float | None, ...]:
    measured = (row.harm, row.error, row.agreement, row.open)
    noticed = f"{row.noticed} of {row.repeats}"
    return (row.name, *measured, noticed, row.median, row.longest, ", ".join(sorted(row.first)))

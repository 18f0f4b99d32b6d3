"""What a report says of bottlenecks: which, how severe, by what evidence, and what to do."""

from __future__ import annotations

from collections.abc import Sequence

from analysis.report.report import Column, Section, Table
from profiling.bottlenecks import HIGH, MEDIUM, Bottleneck

NAME = "bottlenecks"


def section(found: Sequence[Bottleneck]) -> Section:
    """The criterion: none of high severity."""
    ordered = sorted(found, key=lambda one: ("high", "medium", "low").index(one.severity))
    high = [one for one in ordered if one.severity == "high"]
    named = ", ".join(f"{one.name} ({one.where})" for one in high) or "none"
    columns = (Column("bottleneck"), Column("where"), Column("severity"), Column("cost", ".0%"))
    rows = tuple((one.name, one.where, one.severity, one.cost) for one in ordered)
    return Section(
        NAME,
        "What keeps it from being faster?",
        "FAIL" if high else "PASS",
        f"bottlenecks of high severity: {named}",
        (
            f"Severity is the share of a call that would be saved without the bottleneck: high from {HIGH:.0%}, medium "
            f"from {MEDIUM:.0%}. What merely tells the nature of a call is low.",
            *(f"{one.name} ({one.where}, {one.severity}): {one.evidence}. Advice: {one.advice}." for one in ordered),
        ),
        (Table("Bottlenecks", columns, rows),) if rows else (),
    )
